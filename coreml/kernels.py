"""What each operator of an ML program computes, in NumPy.

Definitions: coremltools' reference of MIL operators (coremltools/converters/mil/mil/ops/defs). A kernel takes the
operator's arguments by name, as arrays, and a `Rounding` for what it computes on the way; it returns the result in
float32 or as integers. The interpreter rounds the result to its declared type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import erf

from coreml import spatial
from coreml.rounding import Arguments, Rounding


def _axes(x: np.ndarray, axes: Any) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(x.ndim))
    return tuple(int(axis) % x.ndim for axis in np.atleast_1d(axes))


def _reduction(compute: Callable[[np.ndarray, tuple[int, ...], Rounding], np.ndarray]) -> Callable[..., np.ndarray]:
    def kernel(arguments: Arguments, rounding: Rounding) -> np.ndarray:
        x = arguments["x"]
        axes = _axes(x, arguments.get("axes"))
        result = compute(x, axes, rounding)
        return result if arguments.get("keep_dims", False) else result.squeeze(axes)

    return kernel


def _binary(compute: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda arguments, rounding: compute(arguments["x"], arguments["y"])


def _unary(compute: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda arguments, rounding: compute(arguments["x"])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def _softmax(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x, axis = arguments["x"], _axes(arguments["x"], arguments.get("axis", -1))
    powers = rounding(np.exp(rounding(x - x.max(axis=axis, keepdims=True))))
    return powers / rounding.sum(powers, axis)


def _gelu(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x, mode = arguments["x"], arguments.get("mode", "EXACT")
    if mode == "EXACT":
        share = 0.5 * (1 + rounding(erf(x * np.float32(2**-0.5)).astype(np.float32)))
    elif mode == "TANH_APPROXIMATION":
        inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
        share = 0.5 * (1 + rounding(np.tanh(inner)))
    else:
        share = rounding(sigmoid(np.float32(1.702) * x))
    return x * share


def _layer_norm(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x = arguments["x"]
    axes = _axes(x, arguments.get("axes"))
    centred = rounding(x - rounding.mean(x, axes))
    variance = rounding.mean(rounding(centred * centred), axes)
    result = rounding(centred * rounding(1 / np.sqrt(variance + arguments.get("epsilon", 1e-5))))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    if arguments.get("gamma") is not None:
        result = rounding(result * arguments["gamma"].reshape(shape))
    if arguments.get("beta") is not None:
        result = result + arguments["beta"].reshape(shape)
    return result


def _batch_norm(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x = arguments["x"]

    def by_channel(values: Any) -> Any:
        return values.reshape(1, -1, *[1] * (x.ndim - 2))

    deviation = np.sqrt(arguments["variance"] + arguments.get("epsilon", 1e-5))
    result = rounding((x - by_channel(arguments["mean"])) / by_channel(deviation))
    if arguments.get("gamma") is not None:
        result = rounding(result * by_channel(arguments["gamma"]))
    return result + by_channel(arguments["beta"]) if arguments.get("beta") is not None else result


def _matmul(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x, y = arguments["x"], arguments["y"]
    x = x.swapaxes(-1, -2) if arguments.get("transpose_x", False) else x
    y = y.swapaxes(-1, -2) if arguments.get("transpose_y", False) else y
    return rounding.matmul(x, y)


def _linear(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    result = rounding.matmul(arguments["x"], arguments["weight"].T)
    return result + arguments["bias"] if arguments.get("bias") is not None else result


def _slice_by_index(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x = arguments["x"]

    def mask(name: str) -> Sequence[bool]:
        return arguments.get(name, [False] * x.ndim)

    strides = arguments.get("stride", [1] * x.ndim)
    cuts = []
    for axis in range(x.ndim):
        if mask("squeeze_mask")[axis]:
            if mask("begin_mask")[axis]:
                raise NotImplementedError("an axis with both begin_mask and squeeze_mask")
            place = int(arguments["begin"][axis])
            cuts.append(slice(place, place + 1 or None))
            continue
        begin = None if mask("begin_mask")[axis] else int(arguments["begin"][axis])
        end = None if mask("end_mask")[axis] else int(arguments["end"][axis])
        cuts.append(slice(begin, end, int(strides[axis])))
    return x[tuple(cuts)].squeeze(tuple(axis for axis in range(x.ndim) if mask("squeeze_mask")[axis]))


def _slice_by_size(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    cuts = []
    for side, begin, size in zip(arguments["x"].shape, arguments["begin"], arguments["size"], strict=True):
        first = int(begin) % side
        cuts.append(slice(first, side if int(size) == -1 else first + int(size)))
    return arguments["x"][tuple(cuts)]


def _reshape(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    if any(int(side) == 0 for side in arguments["shape"]):
        raise NotImplementedError("a side of 0, whose meaning changed with iOS 17")
    return arguments["x"].reshape([int(side) for side in arguments["shape"]])


def _pad(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    if arguments.get("mode", "constant") != "constant":
        raise NotImplementedError(f"pad mode {arguments['mode']!r}")
    x, widths = arguments["x"], np.asarray(arguments["pad"]).reshape(-1, 2)
    padding = [(0, 0)] * (x.ndim - len(widths)) + [(int(first), int(last)) for first, last in widths]
    return np.pad(x, padding, constant_values=arguments.get("constant_val", 0.0))


def _concat(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    if arguments.get("interleave", False):
        raise NotImplementedError("interleaved concat")
    return np.concatenate(arguments["values"], axis=int(arguments["axis"]))


def _split(arguments: Arguments, rounding: Rounding) -> tuple[np.ndarray, ...]:
    x, axis = arguments["x"], int(arguments["axis"])
    if arguments.get("split_sizes") is not None:
        return tuple(np.split(x, np.cumsum(arguments["split_sizes"])[:-1], axis))
    return tuple(np.split(x, int(arguments["num_splits"]), axis))


def _gather(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    if int(arguments.get("batch_dims", 0)):
        raise NotImplementedError("gather with batch_dims")
    return np.take(arguments["x"], arguments["indices"], axis=int(arguments.get("axis", 0)))


def _steps(scale: np.ndarray, zero_point: Any, x: np.ndarray, axis: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point as float32 that broadcast to x."""
    scale, zero_point = np.asarray(scale, np.float32), np.asarray(0 if zero_point is None else zero_point, np.float32)
    shape = [1] * x.ndim
    if axis is not None and scale.size > 1:
        shape[int(axis)] = -1
        scale = scale.reshape(shape)
        zero_point = zero_point.reshape(shape) if zero_point.size > 1 else zero_point
    return scale, zero_point


def _quantize(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x, dtype = arguments["input"], np.dtype(str(arguments["output_dtype"]))
    scale, zero_point = _steps(arguments["scale"], arguments.get("zero_point"), x, arguments.get("axis"))
    limits = np.iinfo(dtype)
    return np.clip(np.round(x / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantize(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    codes = arguments["input"].astype(np.float32)
    scale, zero_point = _steps(arguments["scale"], arguments.get("zero_point"), codes, arguments.get("axis"))
    return (codes - zero_point) * scale


def _constexpr_affine_dequantize(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    return _dequantize({**arguments, "input": arguments["quantized_data"]}, rounding)


def _constexpr_lut_to_dense(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    lut, indices = arguments["lut"], arguments["indices"]
    if "shape" not in arguments:  # iOS 18: indices in their shape, a table [..., values, 1] for each block
        if lut.size != lut.shape[-2]:
            raise NotImplementedError("a palette of several blocks or of vectors")
        return lut.reshape(-1)[indices]
    shape = tuple(int(side) for side in arguments["shape"])
    bits = int(np.log2(lut.size))
    stream = np.unpackbits(indices, bitorder="little")[: int(np.prod(shape)) * bits].reshape(-1, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)).sum(axis=1)
    return lut.reshape(-1)[codes].reshape(shape)


def _constexpr_blockwise_shift_scale(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    data, scale = arguments["data"], arguments["scale"]
    blocks = [side // parts for side, parts in zip(data.shape, scale.shape, strict=True)]

    def spread(values: np.ndarray) -> np.ndarray:
        for axis, length in enumerate(blocks):
            values = np.repeat(values, length, axis)
        return values.astype(np.float32)

    offset = arguments.get("offset")
    shifted = data.astype(np.float32) - (0.0 if offset is None else spread(offset))
    return shifted * spread(scale)


def _cast(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    dtype = str(arguments["dtype"])
    if dtype in ("fp16", "fp32"):
        return arguments["x"].astype(np.float32)  # the declared type says whether it is rounded
    kinds = {"int32": np.int32, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_}
    if dtype not in kinds:
        raise NotImplementedError(f"cast to {dtype}")
    return arguments["x"].astype(kinds[dtype])


def _real_div(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    if arguments["x"].dtype.kind != "f":
        raise NotImplementedError("division of integers")
    return arguments["x"] / arguments["y"]


def _elu(arguments: Arguments, rounding: Rounding) -> np.ndarray:
    x = arguments["x"]
    return np.where(x > 0, x, arguments.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)))


KERNELS: dict[str, Callable[[Arguments, Rounding], Any]] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "avg_pool": spatial.pool(largest=False),
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda arguments, rounding: np.clip(arguments["x"], arguments["alpha"], arguments["beta"]),
    "concat": _concat,
    "constexpr_affine_dequantize": _constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": _constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": _constexpr_lut_to_dense,
    "conv": spatial.conv,
    "dequantize": _dequantize,
    "elu": _elu,
    "erf": _unary(lambda x: erf(x).astype(np.float32)),
    "exp": _unary(np.exp),
    "expand_dims": lambda arguments, rounding: np.expand_dims(
        arguments["x"], tuple(int(axis) for axis in arguments["axes"])
    ),
    "gather": _gather,
    "gelu": _gelu,
    "identity": _unary(lambda x: x),
    "inverse": lambda arguments, rounding: 1 / rounding(arguments["x"] + arguments.get("epsilon", np.float32(1e-4))),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": spatial.pool(largest=True),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "pad": _pad,
    "quantize": _quantize,
    "real_div": _real_div,
    "reduce_max": _reduction(lambda x, axes, rounding: x.max(axis=axes, keepdims=True)),
    "reduce_mean": _reduction(lambda x, axes, rounding: rounding.mean(x, axes)),
    "reduce_min": _reduction(lambda x, axes, rounding: x.min(axis=axes, keepdims=True)),
    "reduce_sum": _reduction(lambda x, axes, rounding: rounding.sum(x, axes)),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "reshape": _reshape,
    "rsqrt": lambda arguments, rounding: 1 / np.sqrt(rounding(arguments["x"] + arguments.get("epsilon", 1e-12))),
    "sigmoid": _unary(sigmoid),
    "silu": lambda arguments, rounding: arguments["x"] * rounding(sigmoid(arguments["x"])),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": lambda arguments, rounding: np.squeeze(
        arguments["x"], None if arguments.get("axes") is None else tuple(int(axis) for axis in arguments["axes"])
    ),
    "stack": lambda arguments, rounding: np.stack(arguments["values"], axis=int(arguments["axis"])),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "tile": lambda arguments, rounding: np.tile(arguments["x"], [int(count) for count in arguments["reps"]]),
    "transpose": lambda arguments, rounding: np.transpose(arguments["x"], [int(axis) for axis in arguments["perm"]]),
    "upsample_bilinear": spatial.upsample_bilinear,
    "upsample_nearest_neighbor": spatial.upsample_nearest,
}


# The arguments that each kernel knows. coremltools writes all of them, defaults too.
_UNARY = ("x",)
_BINARY = ("x", "y")
_REDUCED = ("x", "axes", "keep_dims")
_POOLED = ("x", "kernel_sizes", "strides", "pad_type", "pad", "ceil_mode")
_STEPS = ("input", "scale", "zero_point", "axis")
_SCALED = ("x", "scale_factor_height", "scale_factor_width")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("abs", "erf", "exp", "identity", "relu", "sigmoid", "silu", "sqrt", "square", "tanh"), _UNARY),
    **dict.fromkeys(("add", "maximum", "minimum", "mul", "real_div", "sub"), _BINARY),
    **dict.fromkeys(("reduce_max", "reduce_mean", "reduce_min", "reduce_sum"), _REDUCED),
    "avg_pool": (*_POOLED, "exclude_padding_from_average"),
    "batch_norm": ("x", "mean", "variance", "gamma", "beta", "epsilon"),
    "cast": ("x", "dtype"),
    "clip": ("x", "alpha", "beta"),
    "concat": ("values", "axis", "interleave"),
    "constexpr_affine_dequantize": ("quantized_data", "zero_point", "scale", "axis"),
    "constexpr_blockwise_shift_scale": ("data", "scale", "offset"),
    "constexpr_lut_to_dense": ("indices", "lut", "shape"),
    "conv": ("x", "weight", "bias", "strides", "pad_type", "pad", "dilations", "groups"),
    "dequantize": _STEPS,
    "elu": ("x", "alpha"),
    "expand_dims": ("x", "axes"),
    "gather": ("x", "indices", "axis", "batch_dims", "validate_indices"),
    "gelu": ("x", "mode"),
    "inverse": ("x", "epsilon"),
    "layer_norm": ("x", "axes", "gamma", "beta", "epsilon"),
    "linear": ("x", "weight", "bias"),
    "matmul": ("x", "y", "transpose_x", "transpose_y"),
    "max_pool": _POOLED,
    "pad": ("x", "pad", "mode", "constant_val"),
    "quantize": (*_STEPS, "output_dtype"),
    "reshape": ("x", "shape"),
    "rsqrt": ("x", "epsilon"),
    "slice_by_index": ("x", "begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask"),
    "slice_by_size": ("x", "begin", "size"),
    "softmax": ("x", "axis"),
    "split": ("x", "num_splits", "split_sizes", "axis"),
    "squeeze": ("x", "axes"),
    "stack": ("values", "axis"),
    "tile": ("x", "reps"),
    "transpose": ("x", "perm"),
    "upsample_bilinear": (*_SCALED, "align_corners", "half_pixel_centers"),
    "upsample_nearest_neighbor": _SCALED,
}


def compute(operator: str, arguments: Arguments, rounding: Rounding) -> Any:
    """What an operator gives: an array, or a tuple of them.

    Args:
        operator: a key of `KERNELS`.
        arguments: by name; float tensors in float32.
        rounding: see `Rounding`.

    Raises:
        NotImplementedError: an argument or a setting that the kernel does not know.
    """
    if unknown := arguments.keys() - set(ARGUMENTS[operator]):
        raise NotImplementedError(f"the argument {', '.join(sorted(unknown))}")
    return KERNELS[operator](arguments, rounding)
