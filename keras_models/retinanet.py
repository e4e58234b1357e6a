"""RetinaNet on the pyramids of the three families.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as keras_hub's RetinaNetObjectDetector computes it
(tests/models/test_retinanet.py holds ours against it) and mmdetection's RetinaNet with PVTv2 is configured: 256
channels, levels from stage 2 on, P6 from the last map of the backbone and P7 from P6, four convolutions in each head.
A flat graph of Keras layers, so that quantization and the converters see every one of them.
"""

import math
from typing import Any

import keras

from keras_models.common import Attention, ImageSize
from keras_models.pyramid import feature_pyramid, pyramid
from mobiatt_tf.models import dtype_policy

ANCHORS_PER_PLACE = 9  # 3 sizes times 3 aspect ratios
LEVELS = 5
# (channels, convolutions of each head): of the published configuration, and of a toy that trains on two cores.
_PUBLISHED_SIZE = (256, 4)
_SIZES = {"quickstart": (48, 1)}
_PRIOR = 0.01  # probability of an object at the start of training (section 4.1)


def RetinaNetMobiAtt(
    family: str = "pvt_v2",
    variant: str | None = None,
    image_size: ImageSize = (800, 1344),
    num_classes: int = 80,
    channels: int | None = None,
    head_depth: int | None = None,
    attention: Attention = "mobile",
    training_size: ImageSize | None = 224,
    drop_path: float | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    freeze_batch_norm: bool = False,
    synchronized_batch_norm: bool = False,
    batch_size: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> keras.Model:
    """A detector as a functional Keras model from normalised images to box deltas and class logits of all anchors.

    Args:
        family: "deit", "pvt_v2" or "efficientformer_v2".
        variant: of the family; None takes its smallest published one. DeiT's "quickstart" has patches of 8 pixels here.
        image_size: side in pixels, or (height, width); multiples of the stride of the last stage (32; 16 for
            "quickstart"). The default holds COCO's 1333 x 800.
        num_classes: classes of objects, without background.
        channels: of the pyramid and the heads; None takes 256 (published; 48 for "quickstart").
        head_depth: convolutions of each head before its last; None takes 4 (published; 1 for "quickstart").
        attention: of the backbone, see its builder.
        training_size: the image size at which the backbone's weights were trained, which sets `reference_tokens` of
            every Mobile-Attention; None: `image_size`.
        drop_path: stochastic depth rate of the backbone's last block; None takes the variant's.
        num_heads: heads of the backbone's attention; see its builder.
        head_dim: channels of a head instead of their number.
        freeze_batch_norm: the backbone's batch norm keeps statistics, scales and offsets (EfficientFormerV2; the other
            families have none).
        synchronized_batch_norm: the backbone's batch statistics are those of all devices of a strategy.
        batch_size: fixed batch size of the input; None leaves it open. Exports need 1.
        dtype: dtype policy such as "float32" or "mixed_bfloat16"; None takes Keras' global policy. Outputs are float32.
        name: name of the model.

    Returns:
        A `keras.Model` from float [B, height, width, 3] (ImageNet mean and deviation, see `mobiatt_tf.data`) to
        {"boxes": float32 [B, A, 4], "logits": float32 [B, A, num_classes]}, level by level, row by row, 9 anchors a
        place. Boxes are (dx, dy, dw, dh) relative to their anchors, see `mobiatt_tf.tasks.anchors`.

    Raises:
        ValueError: an unknown family, variant or attention, sides that are no multiples of the stride, or a number of
            classes, channels or convolutions that cannot be.
    """
    default_channels, default_depth = _SIZES.get(variant or "", _PUBLISHED_SIZE)
    channels = default_channels if channels is None else channels
    head_depth = default_depth if head_depth is None else head_depth
    if num_classes < 1 or channels < 1 or head_depth < 0:
        raise ValueError(
            "A detector needs num_classes and channels of 1 or more and head_depth of 0 or more, but "
            f"num_classes={num_classes}, channels={channels}, head_depth={head_depth} were given."
        )
    with dtype_policy(dtype):
        backbone = pyramid(
            family,
            variant,
            image_size,
            attention=attention,
            training_size=training_size,
            drop_path=drop_path,
            num_heads=num_heads,
            head_dim=head_dim,
            freeze_batch_norm=freeze_batch_norm,
            synchronized_batch_norm=synchronized_batch_norm,
            batch_size=batch_size,
        )
        levels = _with_coarser_levels(feature_pyramid(backbone.maps[1:], channels, 2), backbone.maps[-1], channels)
        prior = keras.initializers.Constant(-math.log((1 - _PRIOR) / _PRIOR))
        outputs = {
            "boxes": _head(levels, "box_head", "boxes", 4, channels, head_depth, "zeros"),  # [B, A, 4]
            "logits": _head(
                levels, "class_head", "logits", num_classes, channels, head_depth, prior
            ),  # [B, A, num_classes]
        }
    return keras.Model(backbone.images, outputs, name=name or f"retinanet_{backbone.label}")


def _with_coarser_levels(levels: list[Any], last_map: Any, channels: int) -> list[Any]:
    """Two more levels, each with half the sides of the one before (rounded up): P6 and P7 of the paper."""

    def halved(x: Any, stage: int) -> Any:
        return keras.layers.Conv2D(channels, 3, strides=2, padding="same", name=f"fpn_output{stage}")(x)

    sixth = halved(last_map, 5)
    seventh = halved(keras.layers.ReLU(name="fpn_relu")(sixth), 6)
    return [*levels, sixth, seventh]


def _head(levels: list[Any], name: str, output: str, width: int, channels: int, depth: int, bias: Any) -> Any:
    """One head on all levels with the same weights, to float32 [B, A, width]; `output` names the last layer."""
    convolutions = [
        keras.layers.Conv2D(
            channels,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            name=f"{name}_conv{index}",
        )
        for index in range(depth)
    ]
    last = keras.layers.Conv2D(
        ANCHORS_PER_PLACE * width,
        3,
        padding="same",
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer=bias,
        dtype="float32",
        name=f"{name}_output",
    )
    flat = []
    for index, x in enumerate(levels):
        for convolution in convolutions:
            x = convolution(x)  # [B, h, w, channels]
        x = last(x)  # [B, h, w, 9 * width]
        flat.append(keras.layers.Reshape((-1, width), dtype="float32", name=f"{name}_flat{index + 2}")(x))
    return keras.layers.Concatenate(axis=1, dtype="float32", name=output)(flat)
