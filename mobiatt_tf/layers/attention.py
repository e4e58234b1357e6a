"""Mobile-Attention, softmax attention and linear attention as Keras layers behind one call."""

import abc
import numbers
from typing import Any

import keras

from mobiatt_tf import ops
from mobiatt_tf.layers.dense import built_dense
from mobiatt_tf.ops import Tensor


class ProjectedAttention(keras.layers.Layer, abc.ABC):
    """Query, key, value and output projections around a token mixing that subclasses define in `mix_tokens`.

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

        def projection(name: str, units: int, shape: Any) -> keras.layers.Dense:
            return built_dense(name, units, shape, self.kernel_initializer, self.dtype_policy)

        self.query = projection("query", model_dim, shapes["query"])
        self.key = projection("key", model_dim, shapes["key"])
        self.value = projection("value", model_dim, shapes["value"])
        self.out = projection("out", output_dim, (*query_shape[:-1], model_dim))
        self.output_dropout = keras.layers.Dropout(self.dropout, name="output_dropout", dtype=self.dtype_policy)

    def call(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, training: bool | None = None
    ) -> Tensor:
        """Attention of `query` [B, N, D] over `key` and `value` (each the one before it when left out).

        Returns:
            [B, N, output_dim].
        """
        mixed = self.mix_tokens(*self.project(query, key, value))
        return self.output_dropout(self.out(ops.merge_heads(mixed)), training=training)

    def project(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, split into heads with tokens last: [B, H, d, N] each."""
        key = query if key is None else key
        value = key if value is None else value
        self._check_shapes({"query": query.shape, "key": key.shape, "value": value.shape})
        return (
            ops.split_heads(self.query(query), self.num_heads),
            ops.split_heads(self.key(key), self.num_heads),
            ops.split_heads(self.value(value), self.num_heads),
        )

    @abc.abstractmethod
    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The mixing between the projections, three times [B, H, d, N] to [B, H, d, N]."""

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
            if len(shape) != 3:
                raise ValueError(
                    f"{type(self).__name__} takes {name} of rank 3, [batch, tokens, channels], but {name} has shape "
                    f"{tuple(shape)}. Reshape feature maps to [batch, height * width, channels] first."
                )
        batches = {name: shape[0] for name, shape in shapes.items()}
        if any(_differ(batches["query"], batch) for batch in batches.values()):
            raise ValueError(f"Query, key and value must have the same batch size, but have {batches}.")
        if shapes["query"][1] == 0 or shapes["key"][1] == 0:
            raise ValueError(f"{type(self).__name__} needs at least one token, but the shapes are {shapes}.")
        if _differ(shapes["key"][1], shapes["value"][1]):
            raise ValueError(
                f"Key and value must have the same number of tokens, but key has {shapes['key'][1]} and value "
                f"{shapes['value'][1]}."
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
        if epsilon < 0:
            raise ValueError(f"epsilon must not be negative, but epsilon={epsilon} was given.")
        if reference_tokens is not None and reference_tokens < 1:
            raise ValueError(f"reference_tokens must be None or at least 1, but {reference_tokens} was given.")
        self.epsilon = epsilon
        self.reference_tokens = reference_tokens

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.mobile_attention(query, key, value, self.epsilon, self.reference_tokens)

    def introspect(self, query: Tensor, key: Tensor | None = None) -> dict[str, Tensor]:
        """What the heads do at each token, for pictures and parity.

        Args:
            query: [B, N, D].
            key: [B, N, D']; None takes the query.

        Returns:
            `incoming`, `outgoing`, `conserved_incoming`, `conserved_outgoing`, `allocation` and `competition` by
            name, each float32 [B, H, N].
        """
        query_heads, key_heads, _ = self.project(query, key)
        flow = ops.flows(keras.ops.sigmoid(query_heads), keras.ops.sigmoid(key_heads), self.epsilon)
        by_name = {
            **flow._asdict(),
            "allocation": ops.allocation(flow.conserved_incoming),
            "competition": ops.competition(flow.conserved_outgoing),
        }
        return {name: keras.ops.squeeze(tensor, axis=2) for name, tensor in by_name.items()}  # [B, H, N]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon, "reference_tokens": self.reference_tokens}

    def _check_shapes(self, shapes: dict[str, Any]) -> None:
        super()._check_shapes(shapes)
        if _differ(shapes["query"][1], shapes["key"][1]):
            raise ValueError(
                "Mobile-Attention pairs query n with key n, so both must have the same number of tokens, but query "
                f"has {shapes['query'][1]} and key {shapes['key'][1]}. Use SoftmaxAttention for unequal lengths."
            )


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class SoftmaxAttention(ProjectedAttention):
    """Multi-head scaled dot-product attention, the baseline; query and key may differ in length.

    Arguments as in `ProjectedAttention`; dropout stands after the output projection, as in Mobile-Attention.
    """

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.softmax_attention(query, key, value)


@keras.saving.register_keras_serializable(package="mobiatt_tf")
class LinearAttention(ProjectedAttention):
    """Linear attention with the feature map elu + 1 (Katharopoulos et al., ICML 2020), for ablations.

    Arguments as in `ProjectedAttention`; query and key may differ in length.
    """

    def mix_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.linear_attention(query, key, value)


ATTENTIONS: dict[str, type[ProjectedAttention]] = {
    "mobile": MobileAttention,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
}


def _check_heads(num_heads: int, model_dim: int) -> None:
    if model_dim % num_heads:
        divisors = [heads for heads in range(1, model_dim + 1) if model_dim % heads == 0]
        raise ValueError(
            f"num_heads must divide model_dim, but num_heads={num_heads} and model_dim={model_dim} were given. "
            f"Allowed for {model_dim}: {', '.join(map(str, divisors))}."
        )


def _differ(first: int | None, second: int | None) -> bool:
    return first is not None and second is not None and first != second
