"""Float32 arithmetic, and pure float16 as a phone may do it."""

from typing import Any

import numpy as np

Arguments = dict[str, Any]  # of an operator, by name

# Products and sums of this many terms count as exact in pure float16; what is carried from block to block is rounded.
# An assumption about hardware that Apple does not document: between sums that round at every term and at the end only.
_BLOCK = 32


class Rounding:
    """How intermediate results inside a kernel are kept: in float32, or in pure float16.

    Args:
        float16: round every intermediate result to float16, and sums after each block of 32 terms.
    """

    def __init__(self, float16: bool = False) -> None:
        self.float16 = float16
        self.largest = 0.0  # magnitude that was rounded so far, before rounding

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not self.float16:
            return x
        if x.size:
            self.largest = max(self.largest, float(np.abs(x).max()))
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x @ y."""
        inner = x.shape[-1]
        if not self.float16 or inner <= _BLOCK:
            return self(np.matmul(x, y))
        total = self(np.matmul(x[..., :_BLOCK], y[..., :_BLOCK, :]))
        for start in range(_BLOCK, inner, _BLOCK):
            part = np.matmul(x[..., start : start + _BLOCK], y[..., start : start + _BLOCK, :])
            total = self(total + self(part))
        return total

    def sum(self, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """Sum over axes, which stay with length 1."""
        if not self.float16:
            return x.sum(axis=axes, keepdims=True)
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        shape = [1 if axis in axes else side for axis, side in enumerate(x.shape)]
        flat = x.transpose(*kept, *axes).reshape(*[x.shape[axis] for axis in kept], -1)
        total = np.zeros(flat.shape[:-1], np.float32)
        for start in range(0, flat.shape[-1], _BLOCK):
            total = self(total + self(flat[..., start : start + _BLOCK].sum(axis=-1)))
        return total.reshape(shape)

    def mean(self, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """Mean over axes, which stay with length 1."""
        return self(self.sum(x, axes) / np.float32(np.prod([x.shape[axis] for axis in axes])))
