"""Thin Keras layers on `mobiatt_tf.ops`."""

from mobiatt_tf.layers.attention import (
    ATTENTIONS,
    LinearAttention,
    MobileAttention,
    ProjectedAttention,
    SoftmaxAttention,
)
from mobiatt_tf.layers.conv import BatchNorm, ConvBN, StridedDepthwiseResidual
from mobiatt_tf.layers.conv_attention import (
    BiasedConvAttention,
    ConvAttention,
    DownsamplingConvAttention,
    MobileConvAttention,
)
from mobiatt_tf.layers.drop_path import DropPath
from mobiatt_tf.layers.embedding import (
    ClassToken,
    GridTable,
    OverlapPatchEmbedding,
    PatchEmbedding,
    PositionEmbedding,
    SelectToken,
    grid_tables,
    resize_position_embedding,
)
from mobiatt_tf.layers.layer_scale import LayerScale
from mobiatt_tf.layers.mlp import MLP, DepthwiseMLP
from mobiatt_tf.layers.norm import RootMeanSquareNorm
from mobiatt_tf.layers.reduction import SpatialReduction
from mobiatt_tf.layers.token_map import TokensToMap

__all__ = [
    "ATTENTIONS",
    "MLP",
    "BatchNorm",
    "BiasedConvAttention",
    "ClassToken",
    "ConvAttention",
    "ConvBN",
    "DepthwiseMLP",
    "DownsamplingConvAttention",
    "DropPath",
    "GridTable",
    "LayerScale",
    "LinearAttention",
    "MobileAttention",
    "MobileConvAttention",
    "OverlapPatchEmbedding",
    "PatchEmbedding",
    "PositionEmbedding",
    "ProjectedAttention",
    "RootMeanSquareNorm",
    "SelectToken",
    "SoftmaxAttention",
    "SpatialReduction",
    "StridedDepthwiseResidual",
    "TokensToMap",
    "grid_tables",
    "resize_position_embedding",
]
