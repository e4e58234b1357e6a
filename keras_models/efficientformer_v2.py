"""EfficientFormerV2 with Mobile-Attention, and the softmax host it is compared with.

Host: Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", ICCV 2023
(github.com/snap-research/EfficientFormer, models/efficientformer_v2.py): convolutions with batch norm throughout, four
stages, attention in the last blocks of stages 3 (at half its resolution) and 4, and between the two.

What Mobile-Attention replaces: logits, position biases, talking heads and softmax of every attention block, whose
convolutions all stay; the attention between stages 3 and 4 has four keys for a query and stays as published, and no
dropout is added.
"""

from dataclasses import dataclass
from typing import Any

import keras

from keras_models.common import (
    MOBILE_HEAD_DIM,
    Attention,
    ImageSize,
    attention_kinds,
    attention_label,
    drop_path_rates,
    head_count,
    image_sides,
    logits,
    residual,
)
from mobiatt_tf import ops
from mobiatt_tf.layers import (
    BatchNorm,
    BiasedConvAttention,
    ConvAttention,
    ConvBN,
    DownsamplingConvAttention,
    LayerScale,
    MobileConvAttention,
)
from mobiatt_tf.models import classifier, dtype_policy

_Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class Variant:
    """One row of the table of variants; the tuples have one entry for each stage."""

    embed_dims: _Four
    depths: _Four
    attention_blocks: int  # at the end of stages 3 and 4 each
    drop_path: float
    expansions: tuple[tuple[int, ...], tuple[int, ...]]  # of the MLPs of stages 3 and 4; 4 in stages 1 and 2
    stem_strides: tuple[int, int] = (2, 2)
    image_size: int = 224
    key_dim: int = 256  # of an attention block, over all heads: 8 heads of 32
    value_dim: int = 1024  # 8 heads of 128


VARIANTS: dict[str, Variant] = {
    "s0": Variant((32, 48, 96, 176), (2, 2, 6, 4), 2, 0.0, ((4, 3, 3, 3, 4, 4), (4, 3, 3, 4))),
    "s1": Variant((32, 48, 120, 224), (3, 3, 9, 6), 2, 0.0, ((4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4))),
    "s2": Variant(
        (32, 64, 144, 288), (4, 4, 12, 8), 4, 0.02, ((4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4))
    ),
    "l": Variant(
        (40, 80, 192, 384), (5, 5, 15, 10), 6, 0.1,
        ((4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 4, 3, 3, 3, 3, 4, 4, 4)),
    ),
    # Not published: small enough to train in minutes on two cores, on 32 x 32 images (attention over 4 tokens).
    "quickstart": Variant(
        (16, 24, 40, 64), (1, 1, 2, 2), 1, 0.0, ((3, 3), (3, 3)), stem_strides=(2, 1), image_size=32, key_dim=64,
        value_dim=128,
    ),
}  # fmt: skip

_HOST_HEADS = 8


def EfficientFormerV2MobiAtt(
    variant: str = "s0",
    image_size: ImageSize | None = None,
    num_classes: int = 1000,
    num_heads: int | None = None,
    head_dim: int | None = None,
    attention: Attention = "mobile",
    distilled: bool = False,
    drop_path: float | None = None,
    training_size: ImageSize | None = None,
    synchronized_batch_norm: bool = False,
    freeze_batch_norm: bool = False,
    features_only: bool = False,
    batch_size: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> keras.Model:
    """EfficientFormerV2 as a functional Keras model from normalised images to logits.

    Args:
        variant: "s0", "s1", "s2", "l", or "quickstart" (32 x 32 images, strides 2 to 16, for trials; not published).
        image_size: side in pixels, or (height, width); multiples of the last stage's stride (32). None takes the
            variant's (224; 32 for "quickstart").
        num_classes: number of logits; 0 ends at the mean of the normalised last stage.
        num_heads: heads of the attention blocks. None takes one for 8 channels of the keys (32) for Mobile-Attention
            and the host's 8 otherwise. The attention between stages 3 and 4 keeps its 8.
        head_dim: channels of the keys of a head instead of their number.
        attention: "mobile" or "softmax" (the published EfficientFormerV2); or one of them for each of the two stages
            that have attention, the third and the fourth.
        distilled: add the head that learns from a teacher; the published weights have it. Training calls return
            (class, distillation) logits, other calls their mean.
        drop_path: stochastic depth rate of the last block; rises linearly from 0. None takes the published rate.
        training_size: the image size at which the weights were or will be trained; None: `image_size`. It sets
            `reference_tokens` of every Mobile-Attention, so that a model used at another size keeps the scale it was
            trained at. See also `keras_models.resize`.
        synchronized_batch_norm: batch statistics over all devices of a strategy.
        freeze_batch_norm: batch norm keeps its statistics, scales and offsets in training: for small batches on trained
            weights. The one behind the last stage, which only a classifier has, does not.
        features_only: return a dict of the stages' maps instead, "stage1" [B, H/4, W/4, D1] to "stage4"
            [B, H/32, W/32, D4].
        batch_size: fixed batch size of the input; None leaves it open. Exports need 1.
        dtype: dtype policy such as "float32" or "mixed_bfloat16"; None takes Keras' global policy. Logits are float32.
        name: name of the model.

    Returns:
        A `keras.Model` from float [B, height, width, 3] (ImageNet mean and deviation, see `mobiatt_tf.data`) to
        float32 [B, num_classes].

    Raises:
        ValueError: an unknown variant or attention, sides that are no multiples of the stride, or heads that do not
            divide the widths of keys and values.
    """
    if variant not in VARIANTS:
        raise ValueError(f"There is no EfficientFormerV2 variant {variant!r}. Choose one of {', '.join(VARIANTS)}.")
    kinds = attention_kinds(attention, 2, "stages with attention", ("mobile", "softmax"))
    row = VARIANTS[variant]
    stem_stride = row.stem_strides[0] * row.stem_strides[1]
    strides = [stem_stride * 2**stage for stage in range(4)]  # of each stage, in pixels
    height, width = image_sides(image_size if image_size is not None else row.image_size, strides[-1])
    trained = image_sides(training_size or (height, width), strides[-1], "training_size")
    # Stage 3 attends at half its resolution, stage 4 at its own: the same number of tokens.
    reference_tokens = (trained[0] // strides[-1]) * (trained[1] // strides[-1])
    rates = drop_path_rates(row.drop_path if drop_path is None else drop_path, sum(row.depths))
    norm: dict[str, Any] = {"synchronized": synchronized_batch_norm, "frozen_norm": freeze_batch_norm}
    features: dict[str, Any] = {}

    def attention_block(kind: str, strides: int, name: str) -> ConvAttention:
        widths: dict[str, Any] = {"key_dim": row.key_dim, "value_dim": row.value_dim, "strides": strides, **norm}
        default_heads = row.key_dim // MOBILE_HEAD_DIM if kind == "mobile" else _HOST_HEADS
        heads = head_count(row.key_dim, num_heads, head_dim, default_heads)
        if kind == "mobile":
            return MobileConvAttention(heads, reference_tokens=reference_tokens, name=name, **widths)
        return BiasedConvAttention(heads, name=name, **widths)

    with dtype_policy(dtype):
        images = x = keras.Input((height, width, 3), batch_size=batch_size, name="images")
        for index, filters in enumerate((row.embed_dims[0] // 2, row.embed_dims[0])):
            stem = ConvBN(filters, 3, row.stem_strides[index], name=f"stem_conv{index + 1}", **norm)
            x = _gelu(f"stem_gelu{index + 1}")(stem(x))  # [B, H / 2, W / 2, D1 / 2], then [B, H / 4, W / 4, D1]
        for index, dim in enumerate(row.embed_dims):
            stage = f"stage{index + 1}"
            if index > 0:
                x = _downsample(x, dim, index == 3, norm, stage)  # [B, H / stride, W / stride, D]
            expansions = row.expansions[index - 2] if index >= 2 else (4,) * row.depths[index]
            for block in range(row.depths[index]):
                name_of_block = f"{stage}_block{block}"
                rate = rates[sum(row.depths[:index]) + block]
                if index >= 2 and block >= row.depths[index] - row.attention_blocks:
                    mixing = attention_block(kinds[index - 2], 2 if index == 2 else 1, f"{name_of_block}_attention")
                    x = residual(x, LayerScale(name=f"{name_of_block}_scale1")(mixing(x)), rate, name_of_block, 1)
                branch = _mlp(x, dim, dim * expansions[block], norm, f"{name_of_block}_mlp")
                x = residual(x, LayerScale(name=f"{name_of_block}_scale2")(branch), rate, name_of_block, 2)
            features[stage] = x
        name = name or f"efficientformer_v2_{variant}_{attention_label(kinds)}"
        if features_only:
            return keras.Model(images, features, name=f"{name}_features")
        final = BatchNorm(name="norm", synchronized=synchronized_batch_norm)
        pooled = keras.layers.GlobalAveragePooling2D(name="pool")(final(x))  # [B, D]
        heads = ("head", "head_distillation")[: 2 if distilled else 1]
        outputs = [logits(pooled, head, num_classes, _initializer()) for head in heads]
    return classifier(images, outputs, name)


def _downsample(x: Any, dim: int, with_attention: bool, norm: dict[str, Any], stage: str) -> Any:
    """[B, H, W, C] to [B, H / 2, W / 2, dim]: a strided convolution, before stage 4 with attention added."""
    coarse = ConvBN(dim, 3, 2, name=f"{stage}_downsample_conv", **norm)(x)
    if not with_attention:
        return coarse
    attention = DownsamplingConvAttention(dim, name=f"{stage}_downsample_attention", **norm)
    return keras.layers.Add(name=f"{stage}_downsample_add")([attention(x), coarse])


def _mlp(x: Any, dim: int, hidden_dim: int, norm: dict[str, Any], name: str) -> Any:
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions with batch norm, GELU after the first two; [B, H, W, dim]."""
    hidden = ConvBN(hidden_dim, kernel_initializer=_initializer(), name=f"{name}_fc1", **norm)(x)
    hidden = _gelu(f"{name}_gelu1")(hidden)  # [B, H, W, hidden_dim]
    hidden = _gelu(f"{name}_gelu2")(ConvBN(None, 3, name=f"{name}_mid", **norm)(hidden))
    return ConvBN(dim, kernel_initializer=_initializer(), name=f"{name}_fc2", **norm)(hidden)


def _gelu(name: str) -> keras.layers.Layer:
    return keras.layers.Activation(ops.gelu, name=name)


def _initializer() -> keras.initializers.Initializer:
    return keras.initializers.TruncatedNormal(stddev=0.02)
