"""A Dense child of a layer, built at once."""

from typing import Any

import keras


def copy_of(initializer: Any) -> Any:
    """A fresh copy: an unseeded Keras initializer used twice gives the same values twice. None stays None."""
    return None if initializer is None else keras.initializers.get(keras.initializers.serialize(initializer))


def built_dense(
    name: str, units: int, input_shape: Any, kernel_initializer: Any, dtype_policy: Any
) -> keras.layers.Dense:
    """A `keras.layers.Dense` with bias, built for inputs of `input_shape` [..., D]."""
    dense = keras.layers.Dense(units, kernel_initializer=copy_of(kernel_initializer), name=name, dtype=dtype_policy)
    dense.build(input_shape)
    return dense
