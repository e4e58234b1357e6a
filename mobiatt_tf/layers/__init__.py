"""Thin Keras layers on `mobiatt_tf.ops`."""

from mobiatt_tf.layers.attention import (
    ATTENTIONS,
    LinearAttention,
    MobileAttention,
    ProjectedAttention,
    SoftmaxAttention,
)
from mobiatt_tf.layers.drop_path import DropPath
from mobiatt_tf.layers.embedding import (
    ClassToken,
    PatchEmbedding,
    PositionEmbedding,
    SelectToken,
    resize_position_embedding,
)
from mobiatt_tf.layers.mlp import MLP

__all__ = [
    "ATTENTIONS",
    "MLP",
    "ClassToken",
    "DropPath",
    "LinearAttention",
    "MobileAttention",
    "PatchEmbedding",
    "PositionEmbedding",
    "ProjectedAttention",
    "SelectToken",
    "SoftmaxAttention",
    "resize_position_embedding",
]
