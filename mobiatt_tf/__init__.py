"""Mobile-Attention for Keras: the operator, and how it is trained and quantized."""

from mobiatt_tf.layers import LinearAttention, MobileAttention, SoftmaxAttention

__all__ = ["LinearAttention", "MobileAttention", "SoftmaxAttention", "__version__"]

__version__ = "0.1.0"
