"""Semantic FPN on the pyramids of the three families.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.1, as mmsegmentation's FPNHead has it, which
PVTv2 and EfficientFormerV2 are published with: a pyramid of 256 channels; each level brought to the first one's size in
steps of a 3 x 3 convolution, batch norm, ReLU and bilinear upsampling by 2; their sum; a 1 x 1 convolution.
"""

from typing import Any

import keras

from keras_models.common import Attention, ImageSize
from keras_models.pyramid import feature_pyramid, pyramid
from mobiatt_tf.layers import ConvBN
from mobiatt_tf.models import dtype_policy

# (channels of the pyramid, of the head): of the published configuration, and of a toy that trains on two cores.
_PUBLISHED_SIZE = (256, 128)
_SIZES = {"quickstart": (48, 48)}


def SemanticFPNMobiAtt(
    family: str = "pvt_v2",
    variant: str | None = None,
    image_size: ImageSize = 512,
    num_classes: int = 150,
    channels: int | None = None,
    head_channels: int | None = None,
    dropout: float = 0.1,
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
    """A segmenter as a functional Keras model from normalised images to class logits of a quarter of their sides.

    Args:
        family: "deit", "pvt_v2" or "efficientformer_v2".
        variant: of the family; None takes its smallest published one. DeiT's "quickstart" has patches of 8 pixels here.
        image_size: side in pixels, or (height, width); multiples of the stride of the last stage (32; 16 for
            "quickstart").
        num_classes: classes of pixels.
        channels: of the pyramid; None takes 256 (published; 48 for "quickstart").
        head_channels: of the head; None takes 128 (published; 48 for "quickstart").
        dropout: rate of whole channels before the last convolution.
        attention: of the backbone, see its builder.
        training_size: the image size at which the backbone's weights were trained, which sets `reference_tokens` of
            every Mobile-Attention; None: `image_size`.
        drop_path: stochastic depth rate of the backbone's last block; None takes the variant's.
        num_heads: heads of the backbone's attention; see its builder.
        head_dim: channels of a head instead of their number.
        freeze_batch_norm: the backbone's batch norm keeps statistics, scales and offsets (EfficientFormerV2; the other
            families have none). The head's is new and learns.
        synchronized_batch_norm: batch statistics of backbone and head are those of all devices of a strategy.
        batch_size: fixed batch size of the input; None leaves it open. Exports need 1.
        dtype: dtype policy such as "float32" or "mixed_bfloat16"; None takes Keras' global policy. Logits are float32.
        name: name of the model.

    Returns:
        A `keras.Model` from float [B, height, width, 3] (ImageNet mean and deviation, see `mobiatt_tf.data`) to
        float32 [B, height / s, width / s, num_classes], s the stride of the first stage (4; 2 for "quickstart").

    Raises:
        ValueError: an unknown family, variant or attention, sides that are no multiples of the stride, or a number of
            classes or channels that cannot be.
    """
    default_channels, default_head = _SIZES.get(variant or "", _PUBLISHED_SIZE)
    channels = default_channels if channels is None else channels
    head_channels = default_head if head_channels is None else head_channels
    if min(num_classes, channels, head_channels) < 1:
        raise ValueError(
            "A segmenter needs num_classes, channels and head_channels of 1 or more, but "
            f"num_classes={num_classes}, channels={channels}, head_channels={head_channels} were given."
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
        branches = [
            _to_first_size(x, index, head_channels, synchronized_batch_norm)
            for index, x in enumerate(feature_pyramid(backbone.maps, channels, 1))
        ]
        x = branches[0]
        for index, branch in enumerate(branches[1:], start=2):
            x = keras.layers.Add(name=f"segment_add{index}")([x, branch])  # [B, H / s, W / s, head_channels]
        x = keras.layers.SpatialDropout2D(dropout, name="segment_dropout")(x)
        logits = keras.layers.Conv2D(
            num_classes,
            1,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),  # mmsegmentation's conv_seg
            dtype="float32",
            name="segment_logits",
        )(x)
    return keras.Model(backbone.images, logits, name=name or f"semantic_fpn_{backbone.label}")


def _to_first_size(x: Any, doublings: int, channels: int, synchronized: bool) -> Any:
    """Level `doublings` of the pyramid, [B, h, w, C], to [B, h * 2**doublings, w * 2**doublings, channels]."""
    name = f"segment_stage{doublings + 1}"
    for step in range(max(1, doublings)):
        x = ConvBN(
            channels,
            3,
            kernel_initializer=keras.initializers.HeNormal(),  # mmcv's ConvModule
            synchronized=synchronized,
            activation="relu",
            name=f"{name}_conv{step}",
        )(x)
        if doublings:
            x = keras.layers.UpSampling2D(interpolation="bilinear", name=f"{name}_upsample{step}")(x)
    return x
