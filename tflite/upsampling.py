"""Nearest-neighbour upsampling in operators that XNNPACK takes over.

`keras.layers.UpSampling2D` repeats rows and columns, which TFLite's converter writes as TILE on five dimensions.
XNNPACK (ai-edge-litert 2.3) leaves it out, so that every level of a pyramid splits the graph in two, and GPU delegates
take no more than four dimensions. Concatenating a tensor with itself along its last axis copies the same numbers, in
float and in int8. Bilinear upsampling becomes RESIZE_BILINEAR, which XNNPACK has.
"""

from typing import Any

import keras
import numpy as np

from mobiatt_tf.ops import Tensor


class ConcatenatedUpsampling(keras.layers.Layer):
    """Every pixel of [B, H, W, C] `size` times in each direction: [B, H * rows, W * columns, C].

    Args:
        size: (rows, columns).
    """

    def __init__(self, size: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = (int(size[0]), int(size[1]))

    def call(self, inputs: Tensor) -> Tensor:
        rows, columns = self.size
        batch, height, width, channels = inputs.shape
        x = keras.ops.concatenate([inputs] * columns, axis=-1)  # [B, H, W, columns * C]
        x = keras.ops.reshape(x, (batch, height, columns * width * channels))
        x = keras.ops.concatenate([x] * rows, axis=-1)  # [B, H, rows * columns * W * C]
        return keras.ops.reshape(x, (batch, rows * height, columns * width, channels))

    def compute_output_shape(self, input_shape: Any) -> Any:
        batch, height, width, channels = input_shape
        return batch, self.size[0] * height, self.size[1] * width, channels

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


def with_concatenations(model: keras.Model) -> keras.Model:
    """A copy of a functional model of known batch size whose nearest-neighbour upsampling is `ConcatenatedUpsampling`.

    Without such a layer it is the model itself.
    """
    if not any(_is_nearest(layer) for layer in model.layers):
        return model

    def rewritten(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.layers.Layer):
            return layer
        if _is_nearest(layer):
            return ConcatenatedUpsampling(layer.size, name=layer.name, dtype=layer.dtype_policy)
        return layer.__class__.from_config(layer.get_config())

    source = model.inputs[0]
    images = keras.Input(batch_shape=source.shape, dtype=source.dtype, name=source.name)
    copy = keras.models.clone_model(model, input_tensors=images, clone_function=rewritten)
    for weight, value in zip(copy.weights, model.get_weights(), strict=True):
        weight.assign(np.asarray(value))
    return copy


def _is_nearest(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.UpSampling2D
        and layer.interpolation == "nearest"
        and layer.data_format == "channels_last"
    )
