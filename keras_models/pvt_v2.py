"""PVTv2 with Mobile-Attention, and the softmax host it is compared with.

Host: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", CVMJ 2022 (github.com/whai362/PVT,
classification/pvt_v2.py): four stages with overlapping patch embeddings, attention whose keys and values come from a
spatially reduced map, an MLP with a depthwise convolution; no class token and no position embedding.

What Mobile-Attention replaces: the softmax self-attention of every block together with its spatial reduction. It pairs
query n with key n, so it takes all tokens as keys, and its cost is linear in them. Everything else stays.
"""

from dataclasses import dataclass
from typing import Any

import keras

from keras_models.common import (
    MOBILE_HEAD_DIM,
    Attention,
    ImageSize,
    attention_drop_rate,
    attention_kinds,
    attention_label,
    attention_layer,
    drop_path_rates,
    head_count,
    image_sides,
    logits,
    residual,
)
from mobiatt_tf.layers import DepthwiseMLP, OverlapPatchEmbedding, SpatialReduction
from mobiatt_tf.models import dtype_policy

_Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class Variant:
    """One row of the table of variants; the tuples have one entry for each stage."""

    embed_dims: _Four
    depths: _Four
    drop_path: float
    mlp_ratios: _Four = (8, 8, 4, 4)
    num_heads: _Four = (1, 2, 5, 8)  # of the softmax host
    reductions: _Four = (8, 4, 2, 1)  # side of the softmax host's spatial reduction
    pool_size: int | None = None  # "linear": pools keys and values to this side instead, and adds a ReLU to the MLP
    stem: tuple[int, int] = (7, 4)  # window and stride of the first patch embedding
    image_size: int = 224


_WIDE: _Four = (64, 128, 320, 512)

VARIANTS: dict[str, Variant] = {
    "b0": Variant((32, 64, 160, 256), (2, 2, 2, 2), drop_path=0.1),
    "b1": Variant(_WIDE, (2, 2, 2, 2), drop_path=0.1),
    "b2": Variant(_WIDE, (3, 4, 6, 3), drop_path=0.1),
    "b2_li": Variant(_WIDE, (3, 4, 6, 3), drop_path=0.1, pool_size=7),
    "b3": Variant(_WIDE, (3, 4, 18, 3), drop_path=0.3),
    "b4": Variant(_WIDE, (3, 8, 27, 3), drop_path=0.3),
    "b5": Variant(_WIDE, (3, 6, 40, 3), drop_path=0.3, mlp_ratios=(4, 4, 4, 4)),
    # Not published: small enough to train in minutes on two cores, on 32 x 32 images (256, 64, 16 and 4 tokens).
    "quickstart": Variant(
        (16, 32, 48, 64), (1, 1, 1, 1), drop_path=0.0, mlp_ratios=(4, 4, 2, 2), num_heads=(1, 2, 3, 4), stem=(3, 2),
        image_size=32,
    ),
}  # fmt: skip

_LAYER_NORM_EPSILON = 1e-6  # of blocks and stage ends; patch embeddings and reductions have 1e-5


def PVTv2MobiAtt(
    variant: str = "b0",
    image_size: ImageSize | None = None,
    num_classes: int = 1000,
    num_heads: int | tuple[int, ...] | None = None,
    head_dim: int | None = None,
    attention: Attention = "mobile",
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    training_size: ImageSize | None = None,
    features_only: bool = False,
    batch_size: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> keras.Model:
    """PVTv2 as a functional Keras model from normalised images to logits.

    Args:
        variant: "b0" to "b5", "b2_li" (softmax only), or "quickstart" (32 x 32 images, strides 2 to 16, for trials; not
            published).
        image_size: side in pixels, or (height, width); multiples of the last stage's stride (32). None takes the
            variant's (224; 32 for "quickstart").
        num_classes: number of logits; 0 ends at the mean of the last stage's tokens.
        num_heads: attention heads, one number for all stages or one for each. None takes width / 8 for
            Mobile-Attention and the host's counts otherwise.
        head_dim: channels of a head instead of their number.
        attention: "mobile", "softmax" (the published PVTv2) or "linear" (elu + 1 on all tokens, for ablations); or one
            of them for each stage. At 224 pixels the last stage has 49 tokens, where softmax is faster on processors:
            ("mobile", "mobile", "mobile", "softmax") keeps it there (docs/performance.md).
        drop_path: stochastic depth rate of the last block; rises linearly from 0. None takes the published rate.
        dropout: rate in the MLPs (published: 0).
        attention_dropout: rate after the attention's output projection. None: 0.05 for Mobile-Attention (published
            for the operator), `dropout` otherwise.
        training_size: the image size at which the weights were or will be trained; None: `image_size`. It sets
            `reference_tokens` of every attention (see `mobiatt_tf.MobileAttention`), so that a model used at another
            size keeps the scale it was trained at. See also `keras_models.resize`.
        features_only: return a dict of the stages' normalised maps instead, "stage1" [B, H/4, W/4, D1] to "stage4"
            [B, H/32, W/32, D4].
        batch_size: fixed batch size of the input; None leaves it open. Exports need 1.
        dtype: dtype policy such as "float32" or "mixed_bfloat16"; None takes Keras' global policy. Logits are float32.
        name: name of the model.

    Returns:
        A `keras.Model` from float [B, height, width, 3] (ImageNet mean and deviation, see `mobiatt_tf.data`) to
        float32 [B, num_classes].

    Raises:
        ValueError: an unknown variant or attention, "b2_li" without softmax, sides that are no multiples of the stride,
            or a number of heads that does not divide a stage's width.
    """
    if variant not in VARIANTS:
        raise ValueError(f"There is no PVTv2 variant {variant!r}. Choose one of {', '.join(VARIANTS)}.")
    row = VARIANTS[variant]
    kinds = attention_kinds(attention, 4, "stages")
    if row.pool_size and set(kinds) != {"softmax"}:
        raise ValueError(
            f"{variant} differs from its sibling in the softmax attention only: give attention='softmax' with it, or "
            f"another variant with attention={attention!r}."
        )
    strides = [row.stem[1] * 2**stage for stage in range(4)]  # of each stage, in pixels
    height, width = image_sides(image_size if image_size is not None else row.image_size, strides[-1])
    trained = image_sides(training_size or (height, width), strides[-1], "training_size")
    rates = drop_path_rates(row.drop_path if drop_path is None else drop_path, sum(row.depths))
    heads = _heads_of_stages(row, kinds, num_heads, head_dim)
    features: dict[str, Any] = {}

    with dtype_policy(dtype):
        images = x = keras.Input((height, width, 3), batch_size=batch_size, name="images")
        for index, dim in enumerate(row.embed_dims):
            stage = f"stage{index + 1}"
            window, step = row.stem if index == 0 else (3, 2)
            embedding = OverlapPatchEmbedding(
                window, step, dim, _conv_initializer(window, dim), name=f"{stage}_patch_embedding"
            )
            x = embedding(x)  # [B, H / stride, W / stride, D]
            reference_tokens = (trained[0] // strides[index]) * (trained[1] // strides[index])
            for block in range(row.depths[index]):
                mixing = attention_layer(
                    kinds[index],
                    heads[index],
                    dropout=attention_drop_rate(kinds[index], attention_dropout, dropout),
                    reference_tokens=reference_tokens,
                    kernel_initializer=_initializer(),
                    name=f"{stage}_block{block}_attention",
                )
                softmax = kinds[index] == "softmax"
                reduction = _reduction(row, index, dim, f"{stage}_block{block}") if softmax else None
                mlp = DepthwiseMLP(
                    dim * row.mlp_ratios[index],
                    relu=row.pool_size is not None,
                    dropout=dropout,
                    kernel_initializer=_initializer(),
                    depthwise_initializer=_conv_initializer(3, 1),
                    name=f"{stage}_block{block}_mlp",
                )
                x = _block(x, mixing, reduction, mlp, rates[sum(row.depths[:index]) + block], f"{stage}_block{block}")
            x = features[stage] = _layer_norm(f"{stage}_norm")(x)
        name = name or f"pvt_v2_{variant}_{attention_label(kinds)}"
        if features_only:
            return keras.Model(images, features, name=f"{name}_features")
        pooled = keras.layers.GlobalAveragePooling2D(name="pool")(x)  # [B, D]
        return keras.Model(images, logits(pooled, "head", num_classes, _initializer()), name=name)


def _block(x: Any, attention: Any, reduction: Any, mlp: Any, drop_path: float, name: str) -> Any:
    """Pre-norm block on a feature map, [B, H, W, D] to [B, H, W, D]; `reduction` shortens keys and values."""
    normed = _layer_norm(f"{name}_norm1")(x)
    mixed = attention(normed) if reduction is None else attention(normed, reduction(normed))
    x = residual(x, mixed, drop_path, name, 1)
    return residual(x, mlp(_layer_norm(f"{name}_norm2")(x)), drop_path, name, 2)


def _reduction(row: Variant, stage: int, dim: int, name: str) -> SpatialReduction | None:
    """The softmax host's reduction of a block's keys and values; None where it has none."""
    if row.pool_size is None and row.reductions[stage] == 1:
        return None
    ratio = None if row.pool_size else row.reductions[stage]
    return SpatialReduction(ratio, row.pool_size, _conv_initializer(ratio or 1, dim), name=f"{name}_reduction")


def _heads_of_stages(
    row: Variant, kinds: tuple[str, ...], num_heads: int | tuple[int, ...] | None, head_dim: int | None
) -> list[int]:
    """The number of heads of each stage."""
    counts = num_heads if isinstance(num_heads, tuple | list) else [num_heads] * 4
    if len(counts) != 4:
        raise ValueError(f"num_heads must be one number, or one for each of the four stages, but is {num_heads}.")
    defaults = [
        dim // MOBILE_HEAD_DIM if kind == "mobile" else host
        for dim, kind, host in zip(row.embed_dims, kinds, row.num_heads, strict=True)
    ]
    return [head_count(*stage) for stage in zip(row.embed_dims, counts, [head_dim] * 4, defaults, strict=True)]


def _layer_norm(name: str) -> keras.layers.LayerNormalization:
    return keras.layers.LayerNormalization(epsilon=_LAYER_NORM_EPSILON, name=name)


def _initializer() -> keras.initializers.Initializer:
    """Of linear layers, as published."""
    return keras.initializers.TruncatedNormal(stddev=0.02)


def _conv_initializer(kernel_size: int, filters: int) -> keras.initializers.Initializer:
    """Of convolutions, as published: normal with variance 2 / fan-out, where a depthwise kernel counts one filter."""
    return keras.initializers.RandomNormal(stddev=(2.0 / (kernel_size**2 * filters)) ** 0.5)
