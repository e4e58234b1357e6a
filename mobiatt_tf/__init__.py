"""Mobile-Attention for Keras: the operator, and how it is trained and quantized."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobiatt_tf.layers import LinearAttention, MobileAttention, SoftmaxAttention

__all__ = ["LinearAttention", "MobileAttention", "SoftmaxAttention", "__version__"]

__version__ = "0.8.0"


def __getattr__(name: str) -> Any:
    """Loads Keras on the first use of a layer: `mobiatt_tf.cli` and the TFLite tools start at once without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mobiatt_tf import layers

    return getattr(layers, name)
