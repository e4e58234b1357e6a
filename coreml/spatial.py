"""The kernels that look at neighbouring pixels: convolution, pooling, upsampling. See `kernels`."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from coreml.rounding import Arguments, Rounding


def _padding(
    arguments: Arguments, sides: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Zeros before and after the rows and the columns."""
    kind = arguments.get("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(sides)
    if kind == "custom":
        pad = [int(width) for width in arguments["pad"]]
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise NotImplementedError(f"pad_type {kind!r}")
    widths = []
    for side, extent, stride in zip(sides, kernel, strides, strict=True):
        total = max((-(-side // stride) - 1) * stride + extent - side, 0)
        first = total // 2 if kind == "same" else total - total // 2
        widths.append((first, total - first))
    return widths


def _windows(
    x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], padding: list[tuple[int, int]], fill: float = 0.0
) -> np.ndarray:
    """[1, C, H, W] to the windows of a kernel, a view [1, C, H', W', height, width] of the padded map."""
    padded = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=fill)
    return sliding_window_view(padded, tuple(kernel), axis=(2, 3))[:, :, :: strides[0], :: strides[1]]


def conv(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    """MIL's conv of [1, C, H, W]."""
    x, weight = arguments["x"], arguments["weight"]  # [1, C, H, W], [out, C / groups, height, width]
    groups = int(arguments.get("groups", 1))
    strides = [int(step) for step in arguments.get("strides", (1, 1))]
    if any(int(rate) != 1 for rate in arguments.get("dilations", (1, 1))):
        raise NotImplementedError("dilated convolution")
    if x.ndim != 4:
        raise NotImplementedError(f"convolution of rank {x.ndim}")
    kernel = weight.shape[2:]
    windows = _windows(x, kernel, strides, _padding(arguments, x.shape[2:], kernel, strides))
    batch, channels, height, width = windows.shape[:4]
    columns = windows.transpose(0, 1, 4, 5, 2, 3)  # [1, C, h, w, H', W']
    columns = columns.reshape(batch, groups, channels // groups * kernel[0] * kernel[1], height * width)
    rows = weight.reshape(1, groups, len(weight) // groups, -1)  # [1, groups, out / groups, C / groups * h * w]
    result = rounding.matmul(rows, columns).reshape(batch, len(weight), height, width)
    bias = arguments.get("bias")
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def pool(largest: bool) -> Callable[..., np.ndarray]:
    """MIL's max_pool, or avg_pool, of [1, C, H, W]."""

    def kernel(arguments: Arguments, rounding: Rounding) -> np.ndarray:
        x = arguments["x"]
        sizes = [int(size) for size in arguments["kernel_sizes"]]
        strides = [int(step) for step in arguments.get("strides", (1, 1))]
        if arguments.get("ceil_mode", False):
            raise NotImplementedError("pooling with ceil_mode")
        padding = _padding(arguments, x.shape[2:], sizes, strides)
        if largest:
            return _windows(x, sizes, strides, padding, -np.inf).max(axis=(4, 5))
        total = rounding.sum(_windows(x, sizes, strides, padding), (4, 5))[..., 0, 0]
        if not arguments.get("exclude_padding_from_average", False):
            return total / np.float32(sizes[0] * sizes[1])
        return total / _windows(np.ones_like(x), sizes, strides, padding).sum(axis=(4, 5))

    return kernel


def upsample_bilinear(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    """MIL's upsample_bilinear of [1, C, H, W]."""
    x = arguments["x"]
    align_corners = bool(arguments.get("align_corners", True))
    half_pixel_centers = bool(arguments.get("half_pixel_centers", not align_corners))  # iOS 16
    if align_corners and half_pixel_centers:
        raise NotImplementedError("align_corners with half_pixel_centers")
    for axis, factor in ((2, arguments["scale_factor_height"]), (3, arguments["scale_factor_width"])):
        side = x.shape[axis]
        target = int(np.floor(side * float(factor)))
        if align_corners:
            places = np.arange(target) * ((side - 1) / max(target - 1, 1))
        else:
            shift = 0.5 if half_pixel_centers else 0.0
            places = np.clip((np.arange(target) + shift) * (side / target) - shift, 0, side - 1)
        low = np.floor(places).astype(int)
        share = (places - low).astype(np.float32)
        shape = [-1 if dimension == axis else 1 for dimension in range(4)]
        below, above = np.take(x, low, axis), np.take(x, np.minimum(low + 1, side - 1), axis)
        x = rounding(below + (above - below) * share.reshape(shape))
    return x


def upsample_nearest(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    """MIL's upsample_nearest_neighbor of [1, C, H, W]."""
    x = arguments["x"]
    for axis, factor in ((2, arguments["scale_factor_height"]), (3, arguments["scale_factor_width"])):
        if float(factor) != int(factor):
            raise NotImplementedError("upsampling by a fraction")
        x = np.repeat(x, int(factor), axis)
    return x
