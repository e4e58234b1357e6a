"""The NumPy kernels against coremltools' own constant folding, and against TensorFlow where it folds nothing."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from coreml import kernels
from coreml.kernels import KERNELS
from coreml.rounding import Rounding
from coreml.tools import coremltools
from tests.coreml.programs import fold

GENERATOR = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype("float32")


MAP = noise(1, 4, 5, 6)
POSITIVE = np.abs(MAP) + np.float32(0.1)
# For every operator that coremltools folds: arguments, and the least iOS where it is not 15.
FOLDED: dict[str, list[dict[str, Any]]] = {
    "abs": [{"x": MAP}],
    "add": [{"x": MAP, "y": noise(4, 1, 1)}],
    "cast": [
        {"x": MAP * 10, "dtype": "int32"},
        {"x": MAP, "dtype": "fp32"},
        {"x": np.array([0, 1, -3], "int32"), "dtype": "bool"},
    ],
    "clip": [{"x": MAP, "alpha": np.float32(-0.5), "beta": np.float32(0.25)}],
    "concat": [{"values": (MAP, noise(1, 2, 5, 6)), "axis": 1}, {"values": (MAP, MAP), "axis": -1}],
    "elu": [{"x": MAP, "alpha": np.float32(0.7)}],
    "erf": [{"x": MAP}],
    "exp": [{"x": MAP}],
    "expand_dims": [{"x": MAP, "axes": [0]}, {"x": noise(3, 2), "axes": [0, -1]}],
    "gather": [{"x": MAP, "indices": np.array([2, 0, 2], "int32"), "axis": 2}],
    "gelu": [{"x": MAP * 2, "mode": mode} for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")],
    "identity": [{"x": MAP}],
    "inverse": [{"x": POSITIVE}, {"x": POSITIVE, "epsilon": np.float32(1e-6)}],
    "layer_norm": [
        {"x": MAP, "axes": [1], "gamma": noise(4), "beta": noise(4), "epsilon": np.float32(1e-6)},
        {"x": MAP, "axes": [-1], "gamma": noise(6), "beta": noise(6), "epsilon": np.float32(1e-2)},
        {"x": MAP, "axes": [1]},
    ],
    "linear": [{"x": noise(3, 7), "weight": noise(5, 7), "bias": noise(5)}],
    "matmul": [
        {"x": noise(2, 3, 4), "y": noise(2, 4, 5)},
        {"x": noise(2, 4, 3), "y": noise(2, 4, 5), "transpose_x": True},
        {"x": noise(1, 2, 3, 4), "y": noise(1, 2, 5, 4), "transpose_y": True},
    ],
    "maximum": [{"x": MAP, "y": noise(1, 1, 5, 6)}],
    "minimum": [{"x": MAP, "y": np.float32(0.1)}],
    "mul": [{"x": MAP, "y": noise(1, 4, 1, 1)}],
    "pad": [
        {"x": MAP, "pad": [1, 2, 0, 3], "mode": "constant", "constant_val": np.float32(0)},
        {"x": MAP, "pad": [0, 0, 0, 0, 1, 1, 2, 2], "mode": "constant", "constant_val": np.float32(1.5)},
    ],
    "quantize": [
        {"input": MAP, "scale": np.float32(0.02), "zero_point": np.int8(-7), "output_dtype": "int8"},
        {"input": POSITIVE, "scale": np.float32(0.01), "zero_point": np.uint8(3), "output_dtype": "uint8"},
        {
            "input": MAP,
            "scale": np.array([0.1, 0.02, 0.03, 0.01], "float32"),
            "zero_point": np.array([0, 3, -2, 9], "int8"),
            "output_dtype": "int8",
            "axis": 1,
        },
    ],
    "real_div": [{"x": MAP, "y": POSITIVE}],
    "reduce_max": [{"x": MAP, "axes": [1], "keep_dims": True}],
    "reduce_mean": [{"x": MAP, "axes": [2, 3], "keep_dims": True}, {"x": MAP, "axes": [-1], "keep_dims": False}],
    "reduce_min": [{"x": MAP, "axes": [2], "keep_dims": False}],
    "reduce_sum": [{"x": MAP, "axes": [1], "keep_dims": True}, {"x": MAP, "axes": [0, 2], "keep_dims": False}],
    "relu": [{"x": MAP}],
    "reshape": [{"x": MAP, "shape": [1, 4, 1, 30]}, {"x": MAP, "shape": [2, -1]}],
    "rsqrt": [{"x": POSITIVE}, {"x": POSITIVE, "epsilon": np.float32(1e-3)}],
    "sigmoid": [{"x": MAP * 30}],
    "slice_by_index": [
        {"x": MAP, "begin": [0, 0, 0, 2], "end": [1, 4, 5, 3]},
        {"x": MAP, "begin": [0, 0, 1, 0], "end": [1, 4, 5, 6], "stride": [1, 1, 2, 3]},
        {
            "x": MAP,
            "begin": [0, 1, 0, 0],
            "end": [0, 2, 0, 0],
            "begin_mask": [True, False, True, True],
            "end_mask": [True, False, True, True],
            "squeeze_mask": [False, True, False, False],
        },
    ],
    "slice_by_size": [
        {"x": MAP, "begin": [0, 1, 0, 2], "size": [1, 2, -1, 3]},
        {"x": MAP, "begin": [0, -2, 0, -3], "size": [1, 2, 5, 2]},
    ],
    "softmax": [{"x": MAP * 5, "axis": -1}, {"x": MAP, "axis": 1}],
    "split": [{"x": MAP, "num_splits": 2, "axis": 1}, {"x": MAP, "split_sizes": [1, 5], "axis": 3}],
    "sqrt": [{"x": POSITIVE}],
    "square": [{"x": MAP}],
    "squeeze": [{"x": MAP, "axes": [0]}],
    "stack": [{"values": (MAP, MAP * 2), "axis": 1}],
    "sub": [{"x": MAP, "y": noise(6)}],
    "tanh": [{"x": MAP}],
    "tile": [{"x": MAP, "reps": [1, 2, 1, 3]}],
    "transpose": [{"x": MAP, "perm": [0, 2, 3, 1]}],
}
LEAST_IOS = {"quantize": 17}
# Checked against TensorFlow or a definition below.
UNFOLDED = {
    "avg_pool",
    "batch_norm",
    "constexpr_affine_dequantize",
    "constexpr_blockwise_shift_scale",
    "constexpr_lut_to_dense",
    "conv",
    "dequantize",
    "max_pool",
    "silu",
    "upsample_bilinear",
    "upsample_nearest_neighbor",
}


def compute(operator: str, rounding: Rounding | None = None, **arguments: Any) -> Any:
    return kernels.compute(operator, arguments, rounding or Rounding())


def test_every_operator_is_checked_and_all_that_coremltools_folds_against_it() -> None:
    coremltools()
    from coremltools.converters.mil.mil import Operation
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    versions = {operator: SSAOpRegistry.core_ops[operator].values() for operator in KERNELS}
    folded = {
        operator
        for operator, found in versions.items()
        if any(version.value_inference is not Operation.value_inference for version in found)
    }
    assert folded == set(FOLDED)
    assert set(KERNELS) - folded == UNFOLDED


@pytest.mark.parametrize(
    ("operator", "index"), [(operator, index) for operator in FOLDED for index in range(len(FOLDED[operator]))]
)
def test_kernel_equals_constant_folding(operator: str, index: int) -> None:
    arguments = FOLDED[operator][index]
    expected = fold(operator, LEAST_IOS.get(operator, 15), **arguments)
    actual = compute(operator, **arguments)
    assert expected is not None
    if isinstance(expected, tuple):
        assert len(expected) == len(actual)
    else:
        expected, actual = (expected,), (actual,)
    for wanted, found in zip(expected, actual, strict=True):
        assert np.shape(wanted) == np.shape(found)
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "groups"),
    [
        (1, 1, "valid", 1),
        (3, 1, "same", 1),
        (3, 2, "same", 1),
        (5, 2, 2, 1),
        (3, 1, "same", 4),
        (3, 2, 1, 4),
        (4, 4, "valid", 1),
    ],
)
def test_convolution_equals_tensorflow(kernel: int, strides: int, padding: Any, groups: int) -> None:
    x, outputs = noise(1, 4, 8, 12), 8
    weight, bias = noise(outputs, 4 // groups, kernel, kernel), noise(outputs)
    pad = {"pad_type": padding} if isinstance(padding, str) else {"pad_type": "custom", "pad": [padding] * 4}
    actual = compute("conv", x=x, weight=weight, bias=bias, strides=[strides] * 2, groups=groups, **pad)
    images = x.transpose(0, 2, 3, 1)
    if not isinstance(padding, str):
        images, padding = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0))), "valid"
    parts = [
        tf.nn.conv2d(part, kernels.transpose(2, 3, 1, 0), strides, padding.upper())
        for part, kernels in zip(np.split(images, groups, axis=-1), np.split(weight, groups), strict=True)
    ]
    expected = tf.concat(parts, axis=-1) + bias
    np.testing.assert_allclose(actual.transpose(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "strides", "padding"), [(2, 2, "valid"), (3, 2, "same"), (3, 1, "same")])
def test_pooling_equals_tensorflow(window: int, strides: int, padding: str) -> None:
    x = noise(1, 3, 8, 10)
    arguments = {"kernel_sizes": [window] * 2, "strides": [strides] * 2, "pad_type": padding}
    images = x.transpose(0, 2, 3, 1)
    average = compute("avg_pool", x=x, exclude_padding_from_average=True, **arguments)
    expected = tf.nn.avg_pool2d(images, window, strides, padding.upper())
    if (window, strides) != (3, 2):  # MIL pads an odd total at the start, TensorFlow at the end
        np.testing.assert_allclose(average.transpose(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
        largest = compute("max_pool", x=x, **arguments).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(largest, tf.nn.max_pool2d(images, window, strides, padding.upper()))
    if padding == "valid":
        np.testing.assert_allclose(compute("avg_pool", x=x, **arguments), average, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "centres"),
    [
        ({"align_corners": False}, True),
        ({"align_corners": True}, False),
        ({"align_corners": False, "half_pixel_centers": True}, True),
        ({"align_corners": False, "half_pixel_centers": False}, False),
        ({}, False),
    ],
)
def test_bilinear_upsampling_equals_tensorflow(given: dict[str, bool], centres: bool) -> None:
    x = noise(1, 3, 4, 5)
    factors = {"scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)}
    actual = compute("upsample_bilinear", x=x, **factors, **given)
    corners = given.get("align_corners", True)  # MIL's default
    expected = tf.raw_ops.ResizeBilinear(
        images=x.transpose(0, 2, 3, 1), size=(8, 15), align_corners=corners, half_pixel_centers=centres
    )
    np.testing.assert_allclose(actual.transpose(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)


def test_nearest_upsampling_equals_tensorflow() -> None:
    x = noise(1, 3, 4, 5)
    actual = compute("upsample_nearest_neighbor", x=x, scale_factor_height=2, scale_factor_width=3)
    expected = tf.image.resize(x.transpose(0, 2, 3, 1), (8, 15), method="nearest")
    np.testing.assert_array_equal(actual.transpose(0, 2, 3, 1), expected)


def test_batch_norm_and_silu_equal_tensorflow() -> None:
    mean, variance, gamma, beta = noise(4), np.abs(noise(4)), noise(4), noise(4)
    actual = compute("batch_norm", x=MAP, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3)
    expected = tf.nn.batch_normalization(MAP.transpose(0, 2, 3, 1), mean, variance, beta, gamma, 1e-3)
    np.testing.assert_allclose(actual.transpose(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compute("silu", x=MAP), tf.nn.silu(MAP), rtol=1e-5, atol=1e-7)


def materialized(operator: str, ios: int, **arguments: Any) -> np.ndarray:
    """What coremltools makes of compressed weights."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function

    from coreml.tools import target

    with Function({}, opset_version=target(ios)):
        return getattr(Builder, operator)(**arguments).op.materialized_val_inference()


def test_compressed_weights_are_what_coremltools_makes_of_them() -> None:
    coremltools()
    codes = GENERATOR.integers(-127, 128, (6, 4, 1, 1)).astype(np.int8)
    affine = {"quantized_data": codes, "zero_point": np.int8(0), "scale": np.abs(noise(6)), "axis": np.int32(0)}
    expected = materialized("constexpr_affine_dequantize", 16, **affine)
    np.testing.assert_allclose(compute("constexpr_affine_dequantize", **affine), expected, rtol=1e-6)

    for bits in (2, 4, 6, 8):
        indices = GENERATOR.integers(0, 2**bits, 15)
        packed = np.packbits((indices[:, None] >> np.arange(bits)) & 1, bitorder="little")
        palette = {"indices": packed, "lut": noise(2**bits), "shape": np.array([5, 3], np.uint32)}
        expected = materialized("constexpr_lut_to_dense", 16, **palette)
        np.testing.assert_array_equal(compute("constexpr_lut_to_dense", **palette), expected)
        np.testing.assert_array_equal(expected, palette["lut"][indices].reshape(5, 3))

    newer = {"indices": GENERATOR.integers(0, 256, (6, 4)).astype(np.uint8), "lut": noise(1, 1, 256, 1)}
    expected = materialized("constexpr_lut_to_dense", 18, **newer)
    np.testing.assert_array_equal(compute("constexpr_lut_to_dense", **newer), expected)

    blocks = {"data": codes[..., 0, 0], "scale": np.abs(noise(6, 2)), "offset": codes[:, :2, 0, 0]}
    expected = materialized("constexpr_blockwise_shift_scale", 18, **blocks)
    np.testing.assert_allclose(compute("constexpr_blockwise_shift_scale", **blocks), expected, rtol=1e-6)

    steps = {"scale": np.float32(0.03), "zero_point": np.int8(-5)}
    np.testing.assert_allclose(
        compute("dequantize", input=codes, **steps), (codes.astype("float32") + 5) * np.float32(0.03), rtol=1e-6
    )


def test_pure_float16_overflows_where_float16_does() -> None:
    """The square of 300 is more than 65504: LayerNorm's sum overflows, although its result would be small."""
    x = np.where(np.arange(8) % 2, 300.0, -300.0).astype("float32").reshape(1, 8, 1, 1)
    exact = compute("layer_norm", x=x, axes=[1])
    rounding = Rounding(float16=True)
    assert np.abs(exact).max() == pytest.approx(1.0, abs=1e-3)
    with np.errstate(all="ignore"):
        assert not np.abs(compute("layer_norm", rounding, x=x, axes=[1])).max() > 0.5
    assert rounding.largest == np.inf


def test_pure_float16_rounds_long_sums_and_typed_ones_do_not() -> None:
    x = np.float16(GENERATOR.uniform(0, 1, (1, 4096))).astype("float32")
    exact = float(x.sum(dtype="float64"))
    assert compute("reduce_sum", x=x, axes=[1]) == pytest.approx(exact, rel=1e-6)
    for strict in (
        compute("reduce_sum", Rounding(float16=True), x=x, axes=[1])[0],
        Rounding(float16=True).matmul(x, np.ones((4096, 1), np.float32))[0, 0],
    ):
        assert strict == np.float16(strict)
        assert 1e-5 < abs(strict - exact) / exact < 1e-2


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("conv", {"x": MAP, "weight": noise(2, 4, 3, 3), "dilations": [2, 2]}),
        ("pad", {"x": MAP, "pad": [1, 1], "mode": "reflect"}),
        ("cast", {"x": MAP, "dtype": "int64"}),
        ("upsample_nearest_neighbor", {"x": MAP, "scale_factor_height": 1.5, "scale_factor_width": 2}),
        ("relu", {"x": MAP, "alpha": 0.1}),
        ("reshape", {"x": MAP, "shape": [0, 4, 30]}),
        ("real_div", {"x": np.arange(3), "y": np.array(2)}),
        (
            "slice_by_index",
            {
                "x": MAP,
                "begin": [0, 1, 0, 0],
                "end": [1, 2, 5, 6],
                "begin_mask": [False, True, False, False],
                "squeeze_mask": [False, True, False, False],
            },
        ),
        (
            "upsample_bilinear",
            {
                "x": MAP,
                "scale_factor_height": 2,
                "scale_factor_width": 2,
                "align_corners": True,
                "half_pixel_centers": True,
            },
        ),
        ("constexpr_lut_to_dense", {"indices": np.zeros((2, 2), np.uint8), "lut": noise(2, 1, 256, 1)}),
    ],
)
def test_uses_that_are_not_known_are_refused(operator: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError):
        compute(operator, **arguments)
