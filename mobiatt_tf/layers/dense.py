"""A Dense child of a layer, built at once."""

from typing import Any

import keras


def built_dense(
    name: str, units: int, input_shape: Any, kernel_initializer: Any, dtype_policy: Any
) -> keras.layers.Dense:
    """A `keras.layers.Dense` with bias, built for inputs of `input_shape` [..., D].

    The initializer is copied: an unseeded Keras initializer used twice gives the same values twice.
    """
    initializer = keras.initializers.get(keras.initializers.serialize(kernel_initializer))
    dense = keras.layers.Dense(units, kernel_initializer=initializer, name=name, dtype=dtype_policy)
    dense.build(input_shape)
    return dense
