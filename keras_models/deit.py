"""DeiT with Mobile-Attention, and the softmax host it is compared with.

Host: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021
(github.com/facebookresearch/deit, models.py): 16 x 16 patches, a class token, learned position embeddings, pre-norm
blocks with LayerNorm epsilon 1e-6, exact GELU, truncated normal initialisation of standard deviation 0.02.

What Mobile-Attention replaces: the softmax self-attention of every block, on all tokens including the class and
distillation tokens. Everything else stays, and so does the number of parameters.
"""

from dataclasses import dataclass, replace
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
from mobiatt_tf.layers import MLP, ClassToken, PatchEmbedding, PositionEmbedding, SelectToken
from mobiatt_tf.models import classifier, dtype_policy


@dataclass(frozen=True)
class Variant:
    """One row of the table of variants."""

    embed_dim: int
    depth: int
    num_heads: int  # of the softmax host
    patch_size: int = 16
    mlp_ratio: int = 4
    image_size: int = 224


VARIANTS: dict[str, Variant] = {
    "tiny": Variant(embed_dim=192, depth=12, num_heads=3),
    "small": Variant(embed_dim=384, depth=12, num_heads=6),
    "base": Variant(embed_dim=768, depth=12, num_heads=12),
    # Not published: small enough to train in minutes on two cores, on 28 x 28 images (16 patches and the class token).
    "quickstart": Variant(embed_dim=64, depth=4, num_heads=4, patch_size=7, mlp_ratio=2, image_size=28),
}

_LAYER_NORM_EPSILON = 1e-6
_INITIAL_STDDEV = 0.02


def DeiTMobiAtt(
    variant: str = "tiny",
    image_size: ImageSize | None = None,
    num_classes: int = 1000,
    num_heads: int | None = None,
    head_dim: int | None = None,
    attention: Attention = "mobile",
    distilled: bool = False,
    drop_path: float = 0.1,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    training_size: ImageSize | None = None,
    patch_size: int | None = None,
    features_only: bool = False,
    batch_size: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> keras.Model:
    """DeiT as a functional Keras model from normalised images to logits.

    Args:
        variant: "tiny", "small", "base", or "quickstart" (28 x 28 images, for trials; not published).
        image_size: side in pixels, or (height, width); multiples of the patch size. None takes the variant's
            (224; 28 for "quickstart").
        num_classes: number of logits; 0 ends at the normalised class token (with `distilled`, the pair's mean).
        num_heads: attention heads. None takes embed_dim / 8 for Mobile-Attention and the host's count otherwise.
        head_dim: channels of a head instead of their number.
        attention: "mobile", "softmax" (the published DeiT) or "linear" (elu + 1, for ablations); or one of them for
            each block.
        distilled: add the distillation token and its head. Training calls return (class, distillation) logits,
            other calls their mean.
        drop_path: stochastic depth rate of the last block; rises linearly from 0 (published: 0.1).
        dropout: rate in the MLPs and after the position embedding (published: 0).
        attention_dropout: rate after the attention's output projection. None: 0.05 for Mobile-Attention (published
            for the operator), 0 otherwise (published for DeiT).
        training_size: the image size at which the weights were or will be trained; None: `image_size`. It sets
            `reference_tokens` of every attention (see `mobiatt_tf.MobileAttention`), so that a model used at another
            size keeps the scale it was trained at. See also `keras_models.resize`.
        patch_size: side of a patch in pixels; None takes the variant's (16; 7 for "quickstart").
        features_only: return a dict of tokens [B, N, D] by name instead: "embedding", "block0", ..., "norm".
        batch_size: fixed batch size of the input; None leaves it open. Exports need 1.
        dtype: dtype policy such as "float32" or "mixed_bfloat16"; None takes Keras' global policy. Logits are float32.
        name: name of the model.

    Returns:
        A `keras.Model` from float [B, height, width, 3] (ImageNet mean and deviation, see `mobiatt_tf.data`) to
        float32 [B, num_classes].

    Raises:
        ValueError: an unknown variant or attention, sides that are no multiples of the patch size, or a number of
            heads that does not divide the width.
    """
    if variant not in VARIANTS:
        raise ValueError(f"There is no DeiT variant {variant!r}. Choose one of {', '.join(VARIANTS)}.")
    row = VARIANTS[variant]
    if patch_size is not None:
        row = replace(row, patch_size=patch_size)
    height, width = image_sides(image_size if image_size is not None else row.image_size, row.patch_size)
    trained = image_sides(training_size or (height, width), row.patch_size, "training_size")
    kinds = attention_kinds(attention, row.depth, "blocks")
    prefix = 2 if distilled else 1
    reference_tokens = prefix + (trained[0] // row.patch_size) * (trained[1] // row.patch_size)
    features: dict[str, Any] = {}

    with dtype_policy(dtype):
        images = keras.Input((height, width, 3), batch_size=batch_size, name="images")
        x = PatchEmbedding(row.patch_size, row.embed_dim, _initializer(), name="patch_embedding")(images)  # [B, hw, D]
        x = ClassToken(prefix, _initializer(), name="class_token")(x)  # [B, prefix + hw, D]
        grid = (height // row.patch_size, width // row.patch_size)
        x = PositionEmbedding(grid, prefix, _initializer(), name="position_embedding")(x)
        x = features["embedding"] = keras.layers.Dropout(dropout, name="embedding_dropout")(x)

        for index, drop_rate in enumerate(drop_path_rates(drop_path, row.depth)):
            default_heads = row.embed_dim // MOBILE_HEAD_DIM if kinds[index] == "mobile" else row.num_heads
            mixing = attention_layer(
                kinds[index],
                head_count(row.embed_dim, num_heads, head_dim, default_heads),
                dropout=attention_drop_rate(kinds[index], attention_dropout, dropout),
                reference_tokens=reference_tokens,
                kernel_initializer=_initializer(),
                name=f"block{index}_attention",
            )
            mlp = MLP(row.embed_dim * row.mlp_ratio, dropout, _initializer(), name=f"block{index}_mlp")
            x = features[f"block{index}"] = _block(x, mixing, mlp, drop_rate, f"block{index}")

        x = features["norm"] = _layer_norm("norm")(x)
        if features_only:
            return keras.Model(images, features, name=name or f"deit_{variant}_features")
        heads = ("head", "head_distillation")[:prefix]
        outputs = [
            logits(SelectToken(index, name=f"{head}_token")(x), head, num_classes, _initializer())  # [B, num_classes]
            for index, head in enumerate(heads)
        ]
    return classifier(images, outputs, name or f"deit_{variant}_{attention_label(kinds)}")


def _block(x: Any, attention: Any, mlp: Any, drop_path: float, name: str) -> Any:
    """Pre-norm transformer block, [B, N, D] to [B, N, D]."""
    x = residual(x, attention(_layer_norm(f"{name}_norm1")(x)), drop_path, name, 1)
    return residual(x, mlp(_layer_norm(f"{name}_norm2")(x)), drop_path, name, 2)


def _layer_norm(name: str) -> keras.layers.LayerNormalization:
    return keras.layers.LayerNormalization(epsilon=_LAYER_NORM_EPSILON, name=name)


def _initializer() -> keras.initializers.Initializer:
    return keras.initializers.TruncatedNormal(stddev=_INITIAL_STDDEV)
