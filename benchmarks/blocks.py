"""Attention blocks as .tflite files, for the benchmarks that compare them."""

import keras
from keras import ops

from mobiatt_tf.formulation import Formulation
from mobiatt_tf.layers import LinearAttention, MobileAttention, SoftmaxAttention
from mobiatt_tf.ops import Tensor
from tflite import convert

FLOOR = "floor"  # the four projections alone: no attention block can do with less
PEAK = "peak"  # dense layers of the size that this runtime multiplies fastest: the rate that nothing here exceeds
PEAK_SIZES = {"dynamic": (128, 512)}  # tokens and width, found by trial on x86 with AVX512 and AMX
_PEAK_SIZE = (196, 256)
_LAYERS = 4


class TrainingForm(MobileAttention):
    """Mobile-Attention exported as it is trained: `tflite.convert` writes no subclass in another form."""


class NaivePort(TrainingForm):
    """Mobile-Attention exported as the published PyTorch module is written: [B, H, N, d], every step as it stands."""

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            split = ops.reshape(x, (-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads))
            return ops.transpose(split, (0, 2, 1, 3))  # [B, H, N, d]

        def flow(own: Tensor, others: Tensor) -> Tensor:
            total = ops.sum(others, axis=1, keepdims=True) + self.epsilon  # [B, 1, N, d]
            return ops.sum((own + self.epsilon) * total, axis=-1)  # [B, H, N]

        def for_channels(x: Tensor) -> Tensor:
            return ops.expand_dims(x, -1)  # [B, H, N, 1]

        q, k, v = (heads(projection(query)) for projection in (self.query, self.key, self.value))
        q, k = ops.sigmoid(q), ops.sigmoid(k)
        incoming, outgoing = 1.0 / flow(q, k), 1.0 / flow(k, q)
        conserved_incoming = flow(q, k * for_channels(outgoing))
        conserved_outgoing = ops.clip(flow(k, q * for_channels(incoming)), -1.0, 1.0)
        allocation = ops.sigmoid(conserved_incoming)
        competition = ops.softmax(conserved_outgoing, axis=-1) * float(query.shape[1])
        context = ops.matmul(ops.transpose(k, (0, 1, 3, 2)), v * for_channels(competition))  # [B, H, d, d]
        mixed = ops.matmul(q * for_channels(incoming), context) * for_channels(allocation)  # [B, H, N, d]
        joined = ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, *query.shape[1:]))  # [B, N, D]
        return self.out(joined)


KINDS = {
    "mobile": MobileAttention,
    "training_form": TrainingForm,
    "naive": NaivePort,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
}


def graph(name: str, tokens: int, model_dim: int, format: str, formulation: Formulation | None = None) -> bytes:
    """One block as a .tflite file, float32 [1, tokens, model_dim] to the same; weights are random.

    Args:
        name: `FLOOR`, `PEAK`, or a key of `KINDS` and the channels of a head, as in "mobile_d8".
        tokens, model_dim: sizes of the input.
        format: of `tflite.convert.FORMATS`.
        formulation: of Mobile-Attention; None takes the default for x86, where the benchmarks run.

    Raises:
        ValueError: an unknown name, or heads that do not divide the width.
    """
    if name == PEAK:
        tokens, model_dim = PEAK_SIZES.get(format, _PEAK_SIZE)
    inputs = keras.Input((tokens, model_dim), batch_size=1)
    if name in (FLOOR, PEAK):
        outputs = inputs
        for layer in range(_LAYERS):
            outputs = keras.layers.Dense(model_dim, name=f"dense{layer}")(outputs)
    else:
        kind, _, head_dim = name.rpartition("_d")
        if kind not in KINDS or not head_dim.isdecimal() or model_dim % int(head_dim):
            raise ValueError(
                f"There is no block {name!r} of width {model_dim}. Choose {FLOOR}, {PEAK}, or one of "
                f"{', '.join(KINDS)} with the channels of a head, which divide the width, as in mobile_d8."
            )
        outputs = KINDS[kind](model_dim // int(head_dim), name="attention")(inputs)
    chosen = formulation or convert.formulation_for(format, "x86")
    return convert.convert(keras.Model(inputs, outputs), format, chosen)


def multiply_adds(name: str, tokens: int, model_dim: int, format: str) -> int:
    """Of the projections and the token mixing; what Mobile-Attention computes elementwise is not counted."""
    if name == PEAK:
        tokens, model_dim = PEAK_SIZES.get(format, _PEAK_SIZE)
    projections = _LAYERS * tokens * model_dim**2
    if name in (FLOOR, PEAK):
        return projections
    kind, _, head_dim = name.rpartition("_d")
    if kind == "softmax":
        return projections + 2 * tokens**2 * model_dim
    return projections + 2 * tokens * model_dim * int(head_dim)
