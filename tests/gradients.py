"""Gradients of a Keras function on whichever backend is loaded."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def gradients(
    function: Callable[[Any], Any], x: np.ndarray, weights: list[Any], cotangent: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Gradients of sum(function(x) * cotangent) with respect to x and the given Keras variables, as NumPy arrays."""
    backend = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]
    dx, dweights = backend(function, x, weights, cotangent)
    return np.asarray(dx), [np.asarray(gradient) for gradient in dweights]


def _tensorflow(function: Any, x: np.ndarray, weights: list[Any], cotangent: np.ndarray) -> Any:
    import tensorflow as tf

    x = tf.constant(x)
    variables = [weight.value for weight in weights]
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(function(x) * cotangent)
    dx, *dweights = tape.gradient(loss, [x, *variables])
    return dx, dweights


def _jax(function: Any, x: np.ndarray, weights: list[Any], cotangent: np.ndarray) -> Any:
    import jax

    def loss(x: Any, values: list[Any]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            return (function(x) * cotangent).sum()

    return jax.grad(loss, argnums=(0, 1))(x, [weight.value for weight in weights])


def _torch(function: Any, x: np.ndarray, weights: list[Any], cotangent: np.ndarray) -> Any:
    import torch

    tensor = torch.tensor(x, requires_grad=True)
    (function(tensor) * torch.tensor(cotangent)).sum().backward()
    return tensor.grad, [weight.value.grad for weight in weights]
