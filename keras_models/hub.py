"""The same detector as keras_hub's RetinaNetObjectDetector, with its losses, anchors and decoding."""

import math
from typing import Any

import keras

from mobiatt_tf.errors import UserError

_HUB_CHANNELS = 256  # written into keras_hub's heads and its pyramid's default
_MARKS = ("fpn_lateral2", "fpn_output6", "box_head_output")


def as_keras_hub(detector: keras.Model) -> Any:
    """A `keras_hub.models.RetinaNetObjectDetector` on our pyramid as its FeaturePyramidBackbone.

    It shares the backbone's layers with `detector` and takes copies of the weights of pyramid network and heads, so it
    gives the same outputs: "bbox_regression" is our "boxes", "cls_logits" our "logits". Its label encoder and its
    decoding take boxes as xyxy; anchors are those of the strides of the detector.

    Args:
        detector: of `RetinaNetMobiAtt` with 256 channels and one convolution or more in each head, for square images:
            keras_hub 0.32 counts the places of its coarser levels from the height alone.

    Raises:
        ValueError: `detector` is no such model.
        UserError: keras_hub is not installed.
    """
    names = {layer.name for layer in detector.layers}
    if not names.issuperset(_MARKS):
        raise ValueError(f"{detector.name} is no detector of keras_models.RetinaNetMobiAtt.")
    channels, (height, width) = detector.get_layer("fpn_lateral2").filters, detector.inputs[0].shape[1:3]
    if channels != _HUB_CHANNELS or height != width:
        raise ValueError(
            f"keras_hub has RetinaNet with {_HUB_CHANNELS} channels and for square images, but {detector.name} has "
            f"{channels} channels and images of {height} x {width}."
        )
    try:
        import keras_hub
    except ImportError as error:
        raise UserError("keras_hub is needed for its form of a detector: pip install keras-hub.") from error

    maps = {f"P{stage + 1}": detector.get_layer(f"fpn_lateral{stage}").input for stage in (2, 3, 4)}
    encoder = keras_hub.models.FeaturePyramidBackbone(detector.inputs, maps, name="pyramid")
    encoder.pyramid_outputs = maps
    # P3 to P7 by name; what strides they have concerns the anchors alone.
    backbone = keras_hub.models.RetinaNetBackbone(
        encoder, min_level=3, max_level=7, use_p5=True, image_shape=(height, width, 3)
    )
    stride = height // maps["P3"].shape[1]
    level = round(math.log2(stride))
    anchors = keras_hub.layers.AnchorGenerator(
        "xyxy", min_level=level, max_level=level + 4, num_scales=3, aspect_ratios=[0.5, 1.0, 2.0], anchor_size=4
    )
    depth = sum(name.startswith("box_head_conv") for name in names)
    model = keras_hub.models.RetinaNetObjectDetector(
        backbone,
        num_classes=detector.get_layer("logits").output.shape[-1],
        bounding_box_format="xyxy",
        anchor_generator=anchors,
        pre_logits_num_conv_layers=depth,
        name=detector.name,
    )
    _copy_weights(detector, model, depth)
    return model


def _copy_weights(detector: keras.Model, model: Any, depth: int) -> None:
    """Of the pyramid network and the heads, from ours to keras_hub's."""
    network = model.backbone.feature_pyramid
    pairs = [(f"fpn_lateral{stage}", network.lateral_conv_layers[f"P{stage + 1}"]) for stage in (2, 3, 4)]
    pairs += [(f"fpn_output{stage}", network.output_conv_layers[f"P{stage + 1}"]) for stage in (2, 3, 4, 5, 6)]
    for name, head in (("box_head", model.box_head), ("class_head", model.classification_head)):
        pairs += [(f"{name}_conv{index}", head.conv_layers[index]) for index in range(depth)]
        pairs.append((f"{name}_output", head.prediction_layer))
    for name, layer in pairs:
        layer.set_weights(detector.get_layer(name).get_weights())
