"""What the lowering of layers writes into: a thin layer over coremltools' builder of MIL programs.

Layout. Apple asks for (B, C, 1, S) on the Neural Engine ("Deploying Transformers on the Apple Neural Engine", 2022,
principle 1; github.com/apple/ml-ane-transformers), with linear layers as 1 x 1 convolutions. A Keras feature map
[B, H, W, C] is [1, C, H, W] here, tokens [B, N, C] are [1, C, 1, N], a vector [B, C] is [1, C, 1, 1]. Heads are
[1, heads, d, N]: a reshape of the channels, never a transpose.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from mobiatt_tf import layers
from mobiatt_tf.errors import UserError
from mobiatt_tf.quantization.fake_quant import FakeQuantize

FLOAT16_MAX = float(np.finfo(np.float16).max)  # 65504
FLOAT16_TINY = 2.0**-24  # the smallest positive number of float16


class Correction(NamedTuple):
    """The Keras tensor is variable * factor + offset, both float64 [C]."""

    factor: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Value:
    """A variable of the program that stands for a tensor of the Keras model.

    Attributes:
        var: the variable; it holds the Keras tensor times 2^-exponent.
        exponent: see `streams`.
        correction: what the image still lacks of its normalisation; only convolutions take it in.
        places: how many places of the Keras tensor [B, N * places, C] lie side by side in the channels: the variable is
            [1, places * C, 1, N]. A detector's anchors are such places until the end of the model.
    """

    var: Any
    exponent: int = 0
    correction: "Correction | None" = None
    places: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, C, H, W]."""
        return tuple(self.var.shape)


class Affine(NamedTuple):
    """int8 steps: value = (code - zero_point) * scale."""

    scale: float
    zero_point: int


class Graph:
    """A MIL program under construction; use it inside the `with` block of a function.

    Args:
        builder: coremltools' `Builder`.
        float16: whether tensors and weights are float16.
    """

    def __init__(self, builder: Any, float16: bool) -> None:
        self.builder = builder
        self.float16 = float16
        self.dtype: Any = np.float16 if float16 else np.float32
        self.exponent = 0  # that the layer being lowered must give its output
        self.name = ""  # of the layer being lowered, as it is in the program
        self.shape: tuple[int, ...] = ()  # that Keras gives its output, [B, ..., C]
        self._rounded: dict[tuple[str, float, int], Value] = {}  # by variable and steps

    def const(self, values: Any, name: str) -> np.ndarray:
        """An array in the precision of the program.

        Raises:
            UserError: a weight that float16 cannot hold; `name` says which.
        """
        array = np.asarray(values, "float64")
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds NaN or infinity. Take a checkpoint from before the training broke down.")
        if self.float16 and np.abs(array).max(initial=0.0) > FLOAT16_MAX:
            raise UserError(
                f"{name} reaches {np.abs(array).max():.0f}, which float16 cannot hold. Export with --precision=float32."
            )
        return array.astype(self.dtype)

    def conv(
        self, x: Value, kernel: np.ndarray, bias: np.ndarray | None, name: str, exponent: int = 0, **options: Any
    ) -> Value:
        """A convolution.

        Args:
            x: [1, C, H, W].
            kernel: float [out, C / groups, height, width], as the Keras model has it.
            bias: float [out], or None.
            name: of the result.
            exponent: of the result.
            options: `strides` (1), `padding` ("valid", "same", a width on all four sides, or the widths above, below,
                left and right), `groups` (1), `int8` (False: whether the kernel is on a grid of 127 steps for each
                output channel and stored so).
        """
        correction = x.correction
        if correction is not None:
            if options.get("groups", 1) > 1 or options.get("int8"):
                x = self.corrected(x)
            else:  # [out, C, height, width]
                shift = np.einsum("ochw,c->o", kernel, correction.offset)
                bias = shift if bias is None else bias + shift
                kernel = kernel * correction.factor[None, :, None, None]
        strides, padding = options.get("strides", 1), options.get("padding", "valid")
        widths = [padding] * 4 if isinstance(padding, int) else padding
        pad = {"pad_type": padding} if isinstance(padding, str) else {"pad_type": "custom", "pad": list(widths)}
        factor = 2.0 ** (x.exponent - exponent)
        if options.get("int8"):
            weight = self._int8_weight(kernel, factor, f"{name}_kernel")
        else:
            weight = self.const(kernel * factor, f"the kernel of {name}")
        arguments = {"bias": self.const(bias * 2.0**-exponent, f"the bias of {name}")} if bias is not None else {}
        var = self.builder.conv(
            x=x.var,
            weight=weight,
            strides=[strides, strides],
            groups=options.get("groups", 1),
            name=name,
            **pad,
            **arguments,
        )
        return Value(var, exponent)

    def _int8_weight(self, kernel: np.ndarray, factor: float, name: str) -> Any:
        flat = np.abs(kernel.reshape(len(kernel), -1)).max(axis=1)  # [out]
        scale = np.maximum(flat, 1e-12) / 127
        codes = np.clip(np.round(kernel / scale.reshape(-1, 1, 1, 1)), -127, 127).astype(np.int8)
        return self.builder.constexpr_affine_dequantize(
            quantized_data=codes,
            zero_point=np.int8(0),
            scale=self.const(scale * factor, f"the scale of {name}"),
            axis=np.int32(0),
            name=name,
        )

    def layer_norm(self, x: Value, layer: keras.layers.LayerNormalization, name: str, exponent: int = 0) -> Value:
        """LayerNorm over the channels of [1, C, H, W]; the exponent of its input goes into epsilon.

        In float16 epsilon cannot be smaller than 2^-24, else 0 is divided by 0: DeiT's 1e-6 is held up to k = 2. Above,
        tokens of very small variance come out smaller, which the verification measures.

        Keras writes it as a dozen primitive operators. coremltools 9 does not recognise them, and in float16 their
        square overflows, silently: the model then gives the same logits for every image.

        Raises:
            ValueError: a LayerNormalization that is not over the last axis.
        """
        if layer.axis not in (-1, [-1], (-1,)) or getattr(layer, "rms_scaling", False):
            raise ValueError(f"{layer.path} does not normalize over the last axis alone, which cannot be exported.")
        channels = x.shape[1]
        gamma = numpy(layer.gamma) if layer.scale else np.ones(channels)
        beta = numpy(layer.beta) if layer.center else np.zeros(channels)
        epsilon = layer.epsilon * 4.0**-x.exponent
        var = self.builder.layer_norm(
            x=x.var,
            axes=[1],
            gamma=self.const(gamma * 2.0**-exponent, layer.path),
            beta=self.const(beta * 2.0**-exponent, layer.path),
            epsilon=self.dtype(max(epsilon, FLOAT16_TINY) if self.float16 else epsilon),
            name=name,
        )
        return Value(var, exponent)

    def root_mean_square(self, x: Value, layer: layers.RootMeanSquareNorm, name: str) -> Value:
        """x / sqrt(mean(x^2) + epsilon) over the channels of [1, C, H, W], as the first half of LayerNorm([x, -x]).

        The pair has mean 0 and the variance mean(x^2). Core ML's LayerNorm bears float16; squares of our own do not.
        """
        negative = self.builder.mul(x=x.var, y=self.dtype(-1), name=f"{name}_negative")
        pair = self.builder.concat(values=[x.var, negative], axis=1, name=f"{name}_pair")  # [1, 2C, H, W]
        channels = 2 * x.shape[1]
        epsilon = layer.epsilon * 4.0**-x.exponent
        normed = self.builder.layer_norm(
            x=pair,
            axes=[1],
            gamma=self.const(np.ones(channels), layer.path),
            beta=self.const(np.zeros(channels), layer.path),
            epsilon=self.dtype(max(epsilon, FLOAT16_TINY) if self.float16 else epsilon),
            name=f"{name}_both",
        )
        end = [1, x.shape[1], *x.shape[2:]]
        return Value(self.builder.slice_by_index(x=normed, begin=[0, 0, 0, 0], end=end, name=name))  # [1, C, H, W]

    def quantized(self, x: Value, quantizer: FakeQuantize | None, name: str) -> Value:
        """Rounds to int8 and back, as a trained `FakeQuantize` does; the value itself without one."""
        if quantizer is None:
            return x
        x = self.corrected(x)
        steps = affine(quantizer)
        scale = self.const(steps.scale * 2.0**-x.exponent, f"the range of {quantizer.path}")
        zero_point = np.int8(steps.zero_point)
        key = (x.var.name, float(scale), int(zero_point))
        if key in self._rounded:  # query, key and value read one tensor, each with a range of its own that is equal
            return self._rounded[key]
        codes = self.builder.quantize(
            input=x.var, scale=scale, zero_point=zero_point, output_dtype="int8", name=f"{name}_int8"
        )
        floats = self.builder.dequantize(input=codes, scale=scale, zero_point=zero_point, name=name)
        self._rounded[key] = Value(floats, x.exponent)
        return self._rounded[key]

    def corrected(self, x: Value) -> Value:
        """The value with its correction done, for what is no convolution."""
        if x.correction is None:
            return x
        factor, offset = (self.const(part[None, :, None, None], "the image") for part in x.correction)
        scaled = self.builder.mul(x=x.var, y=factor, name=f"{x.var.name}_scaled")
        return Value(self.builder.add(x=scaled, y=offset, name=f"{x.var.name}_normalized"), x.exponent)

    def reshape(self, x: Value, shape: tuple[int, ...], name: str) -> Value:
        """The same numbers in another shape."""
        if x.shape == shape:
            return x
        return Value(self.builder.reshape(x=x.var, shape=list(shape), name=name), x.exponent)


def affine(quantizer: FakeQuantize) -> Affine:
    """The int8 steps of a fake quantization, nudged as TensorFlow does.

    Source: Nudge in tensorflow/core/kernels/fake_quant_ops_functor.h.

    Raises:
        ValueError: its range was never set.
    """
    low, high = quantizer.range
    if not low < high:
        raise ValueError(f"{quantizer.path} is not calibrated: call mobiatt_tf.quantization.calibrate first.")
    scale = (high - low) / 255
    return Affine(scale, int(np.clip(np.round(-low / scale), 0, 255)) - 128)


def numpy(variable: Any) -> np.ndarray:
    """A Keras variable or tensor as float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable), "float64")
