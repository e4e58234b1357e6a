"""Mobile-Attention, softmax attention and linear attention as Keras layers behind one call."""

import abc
import math
import numbers
from typing import Any

import keras

from mobiatt_tf import formulation, ops
from mobiatt_tf.layers.dense import built_dense
from mobiatt_tf.ops import Tensor


class ProjectedAttention(keras.layers.Layer, abc.ABC):
    """Query, key, value and output projections around a token mixing that subclasses define in `mix_tokens`.

    Inputs are sequences of tokens [B, N, D] or feature maps [B, height, width, D], whose N = height * width tokens are
    taken row by row; the output has the rank of the query.

    The four children `query`, `key`, `value` and `out` are `keras.layers.Dense` with bias and kernels [in, out].

    Args:
        num_heads: number of heads; must divide `model_dim`.
        model_dim: width of query, key and value; None takes the width of the input.
        output_dim: width of the output; None takes `model_dim`.
        dropout: rate of the dropout after the output projection.
        kernel_initializer: initializer of the four kernels.

    Raises:
        ValueError: an argument is outside its range, or the input does not fit (see `build`).
    """

    def __init__(
        self,
        num_heads: int,
        model_dim: int | None = None,
        output_dim: int | None = None,
        dropout: float = 0.05,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes: dict[str, Any] = {"num_heads": num_heads, "model_dim": model_dim, "output_dim": output_dim}
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, numbers.Integral) or size < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but {name}={size} was given.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but dropout={dropout} was given.")
        if model_dim is not None:
            _check_heads(num_heads, model_dim)
        self.num_heads = num_heads
        self.model_dim = model_dim
        self.output_dim = output_dim
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.formulation: formulation.Formulation | None = None  # of exports
        self.joint: tuple[Any, Any] | None = None  # kernel and bias of query, key and value as one

    def build(self, query_shape: Any, key_shape: Any = None, value_shape: Any = None) -> None:
        shapes = {
            "query": query_shape,
            "key": key_shape or query_shape,
            "value": value_shape or key_shape or query_shape,
        }
        self._check_shapes(shapes)
        model_dim = self.model_dim or query_shape[-1]
        output_dim = self.output_dim or model_dim
        _check_heads(self.num_heads, model_dim)
        self.query_tokens = _token_count(query_shape)  # None where the length is open
        self.key_tokens = _token_count(shapes["key"])

        def projection(name: str, units: int, shape: Any) -> keras.layers.Dense:
            tokens = (shape[0], _token_count(shape), shape[-1])
            return built_dense(name, units, tokens, self.kernel_initializer, self.dtype_policy)

        self.query = projection("query", model_dim, shapes["query"])
        self.key = projection("key", model_dim, shapes["key"])
        self.value = projection("value", model_dim, shapes["value"])
        self.out = projection("out", output_dim, (*query_shape[:-1], model_dim))
        self.output_dropout = keras.layers.Dropout(self.dropout, name="output_dropout", dtype=self.dtype_policy)

    def call(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, training: bool | None = None
    ) -> Tensor:
        """Attention of `query` over `key` and `value` (each the one before it when left out).

        Returns:
            [B, N, output_dim], or [B, height, width, output_dim] if the query is a feature map.
        """
        output = self.output_dropout(self.attend(query, key, value), training=training)  # [B, N, output_dim]
        if len(query.shape) == 4:
            output = keras.ops.reshape(output, (-1, *query.shape[1:3], output.shape[-1]))  # [B, H, W, output_dim]
        return output

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Everything but dropout, [B, N, output_dim]."""
        return self.out(ops.merge_heads(self.mix_tokens(*self.project(query, key, value))))

    def use_formulation(self, chosen: formulation.Formulation) -> None:
        """Computes the attention of a sequence with itself in that form from now on, where there is one; for exports.

        Projections that round their input or output, or read inputs of different widths, are not joined. Where they
        are, later changes of their weights are not seen.
        """
        self.formulation = chosen
        projections = [self.query, self.key, self.value]
        rounded = any(getattr(projection, "output_quantizer", None) is not None for projection in projections)
        same = len({tuple(projection.kernel.shape) for projection in projections}) == 1
        joined = chosen.joint_projection and same and not rounded
        self.joint = formulation.joint_weights(projections) if joined else None

    def project_jointly(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one sequence [B, N, D], each [B, N, model_dim], in one product or three."""
        if self.joint is None:
            return self.query(x), self.key(x), self.value(x)
        kernel, bias = self.joint
        query, key, value = keras.ops.split(keras.ops.matmul(x, kernel) + bias, 3, axis=-1)
        return query, key, value

    def project(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, split into heads with tokens last: [B, H, d, N] each."""
        key = query if key is None else key
        value = key if value is None else value
        self._check_shapes({"query": query.shape, "key": key.shape, "value": value.shape})
        projected = (
            self.query(ops.flatten_map(query)),
            self.key(ops.flatten_map(key)),
            self.value(ops.flatten_map(value)),
        )
        query_heads, key_heads, value_heads = (ops.split_heads(x, self.num_heads) for x in projected)
        return query_heads, key_heads, value_heads

    @abc.abstractmethod
    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The mixing between the projections, three times [B, H, d, N] to [B, H, d, N]."""

    @abc.abstractmethod
    def mixing_macs(self) -> int:
        """Multiply-adds of the matrix products in `mix_tokens` for one example; the layer must be built."""

    def quantized_children(self) -> dict[str, str | None]:
        """See `mobiatt_tf.quantization.QuantizedChildren`."""
        return dict.fromkeys(("query", "key", "value", "out"))

    def compute_output_shape(self, query_shape: Any, key_shape: Any = None, value_shape: Any = None) -> Any:
        return (*query_shape[:-1], self.output_dim or self.model_dim or query_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "model_dim": self.model_dim,
            "output_dim": self.output_dim,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

    def _check_shapes(self, shapes: dict[str, Any]) -> None:
        for name, shape in shapes.items():
            if len(shape) not in (3, 4):
                raise ValueError(
                    f"{type(self).__name__} takes {name} as [batch, tokens, channels] or as a feature map [batch, "
                    f"height, width, channels], but {name} has shape {tuple(shape)}."
                )
            if len(shape) == 4 and None in shape[1:3]:
                raise ValueError(
                    f"The height and width of a feature map must be known, but {name} has shape {tuple(shape)}."
                )
        batches = {name: shape[0] for name, shape in shapes.items()}
        if any(_differ(batches["query"], batch) for batch in batches.values()):
            raise ValueError(f"Query, key and value must have the same batch size, but have {batches}.")
        tokens = {name: _token_count(shape) for name, shape in shapes.items()}
        if tokens["query"] == 0 or tokens["key"] == 0:
            raise ValueError(f"{type(self).__name__} needs at least one token, but the shapes are {shapes}.")
        if _differ(tokens["key"], tokens["value"]):
            raise ValueError(
                f"Key and value must have the same number of tokens, but key has {tokens['key']} and value "
                f"{tokens['value']}."
            )


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class MobileAttention(ProjectedAttention):
    """Mobile-Attention (Yao et al., ICML 2024): linear attention in which heads compete through information flows.

    Reproduces the authors' module (github.com/thuml/MobileAttention); see `mobiatt_tf.ops` for the equations and
    docs/operator.md for their meaning. Parameters equal those of softmax attention with biases.

    Args:
        num_heads: number of heads; must divide `model_dim`. With one head there is no competition.
        model_dim: width of query, key and value; None takes the width of the input.
        output_dim: width of the output; None takes `model_dim`.
        dropout: rate of the dropout after the output projection (published: 0.05).
        epsilon: added to every term of the flows (published: 1e-6). Flows are computed in float32 under any policy.
        reference_tokens: the number of tokens at which the output equals the published one exactly; at N tokens it
            is scaled by reference_tokens / N, so that a network keeps its scale at other resolutions. None: the
            published behaviour at every N.
        kernel_initializer: initializer of the four kernels.

    Raises:
        ValueError: heads that do not divide, inputs that are not [batch, tokens, channels], or a query and a key of
            different lengths: query n is paired with key n.
    """

    def __init__(
        self,
        num_heads: int,
        model_dim: int | None = None,
        output_dim: int | None = None,
        dropout: float = 0.05,
        epsilon: float = 1e-6,
        reference_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, model_dim, output_dim, dropout, **kwargs)
        check_mobile_arguments(epsilon, reference_tokens)
        self.epsilon = epsilon
        self.reference_tokens = reference_tokens

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.mobile_attention(query, key, value, self.epsilon, self.reference_tokens)

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        tokens = ops.flatten_map(query)
        if self.formulation is None or key is not None or value is not None or tokens.shape[1] is None:
            return super().attend(query, key, value)
        chunks = self.formulation.chunks(tokens.shape[1], self.query.units)

        def project(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
            return self.project_jointly(tokens if len(chunks) == 1 else tokens[:, start:stop])  # [B, n, model_dim]

        arguments = self.num_heads, self.formulation.group_width, self.epsilon, self.reference_tokens
        mixed = formulation.mobile_attention(project, chunks, *arguments)
        outputs = [self.out(x) for x in mixed]  # [B, n, output_dim]
        return outputs[0] if len(outputs) == 1 else keras.ops.concatenate(outputs, axis=1)

    def mixing_macs(self) -> int:
        dims = self.query.units, self.value.units
        return ops.linear_mixing_macs(self.query_tokens, self.key_tokens, self.num_heads, *dims)

    def introspect(self, query: Tensor, key: Tensor | None = None) -> dict[str, Tensor]:
        """What the heads do at each token, for pictures and parity.

        Args:
            query: [B, N, D] or [B, height, width, D].
            key: [B, N, D'] or [B, height, width, D']; None takes the query.

        Returns:
            `incoming`, `outgoing`, `conserved_incoming`, `conserved_outgoing`, `allocation` and `competition` by
            name, each float32 [B, H, N].
        """
        query_heads, key_heads, _ = self.project(query, key)
        return ops.flows_by_name(query_heads, key_heads, self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "reference_tokens": self.reference_tokens}

    def _check_shapes(self, shapes: dict[str, Any]) -> None:
        super()._check_shapes(shapes)
        query_tokens, key_tokens = _token_count(shapes["query"]), _token_count(shapes["key"])
        if _differ(query_tokens, key_tokens):
            raise ValueError(
                "Mobile-Attention pairs query n with key n, so both must have the same number of tokens, but query "
                f"has {query_tokens} and key {key_tokens}. Use SoftmaxAttention for unequal lengths."
            )


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class SoftmaxAttention(ProjectedAttention):
    """Multi-head scaled dot-product attention, the baseline; query and key may differ in length.

    Arguments as in `ProjectedAttention`; dropout stands after the output projection, as in Mobile-Attention.
    """

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.softmax_attention(query, key, value)

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        lengths = [ops.flatten_map(x).shape[1] for x in (query, key, value) if x is not None]
        if self.formulation is None or None in lengths:
            return super().attend(query, key, value)
        if key is None and value is None:
            queries, keys, values = self.project_jointly(ops.flatten_map(query))
        else:
            key = query if key is None else key
            queries = self.query(ops.flatten_map(query))
            keys = self.key(ops.flatten_map(key))
            values = self.value(ops.flatten_map(key if value is None else value))
        return self.out(formulation.softmax_attention(queries, keys, values, self.num_heads))

    def mixing_macs(self) -> int:
        return ops.softmax_mixing_macs(self.query_tokens, self.key_tokens, self.query.units, self.value.units)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class LinearAttention(ProjectedAttention):
    """Linear attention with the feature map elu + 1 (Katharopoulos et al., ICML 2020), for ablations.

    Arguments as in `ProjectedAttention`; query and key may differ in length.
    """

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.linear_attention(query, key, value)

    def mixing_macs(self) -> int:
        dims = self.query.units, self.value.units
        return ops.linear_mixing_macs(self.query_tokens, self.key_tokens, self.num_heads, *dims)


ATTENTIONS: dict[str, type[ProjectedAttention]] = {
    "mobile": MobileAttention,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
}


def check_mobile_arguments(epsilon: float, reference_tokens: int | None) -> None:
    """Raises ValueError where an argument of Mobile-Attention is outside its range."""
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, but epsilon={epsilon} was given.")
    if reference_tokens is not None and reference_tokens < 1:
        raise ValueError(f"reference_tokens must be None or at least 1, but {reference_tokens} was given.")


def _check_heads(num_heads: int, model_dim: int) -> None:
    if model_dim % num_heads:
        divisors = [heads for heads in range(1, model_dim + 1) if model_dim % heads == 0]
        raise ValueError(
            f"num_heads must divide model_dim, but num_heads={num_heads} and model_dim={model_dim} were given. "
            f"Allowed for {model_dim}: {', '.join(map(str, divisors))}."
        )


def _token_count(shape: Any) -> int | None:
    """N of [B, N, D] or [B, height, width, D]; None where it is open."""
    sides = shape[1:-1]
    return None if None in sides else math.prod(sides)


def _differ(first: int | None, second: int | None) -> bool:
    return first is not None and second is not None and first != second
