"""Which PyTorch tensor belongs to which Keras weight: the names of timm and of the official repositories, as tables.

timm's names are the reference (timm/models/vision_transformer.py, deit.py, pvt_v2.py, efficientformer_v2.py). The
official checkpoints of DeiT have the same; those of PVTv2 and EfficientFormerV2 are renamed first.
"""

import re
from dataclasses import dataclass

import keras

from mobiatt_tf.models import DENSE_PREFIXES

# A row: the path of a Keras layer -> the prefix of its PyTorch tensors, and, where a fused projection is meant, which
# of how many equal parts of its rows. `{s}` is the stage counted from 0.
_Row = tuple[str, str, tuple[int, int] | None]

_DEIT: tuple[_Row, ...] = (
    (r"patch_embedding/projection", "patch_embed.proj", None),
    (r"block(\d+)_norm(\d)", r"blocks.\1.norm\2", None),
    (r"block(\d+)_attention/query", r"blocks.\1.attn.qkv", (0, 3)),
    (r"block(\d+)_attention/key", r"blocks.\1.attn.qkv", (1, 3)),
    (r"block(\d+)_attention/value", r"blocks.\1.attn.qkv", (2, 3)),
    (r"block(\d+)_attention/out", r"blocks.\1.attn.proj", None),
    (r"block(\d+)_mlp/fc(\d)", r"blocks.\1.mlp.fc\2", None),
)
_PVT_V2: tuple[_Row, ...] = (
    (r"stage1_patch_embedding/projection", "patch_embed.proj", None),
    (r"stage1_patch_embedding/norm", "patch_embed.norm", None),
    (r"stage(\d)_patch_embedding/projection", "stages.{s}.downsample.proj", None),
    (r"stage(\d)_patch_embedding/norm", "stages.{s}.downsample.norm", None),
    (r"stage(\d)_block(\d+)_norm(\d)", r"stages.{s}.blocks.\2.norm\3", None),
    (r"stage(\d)_block(\d+)_attention/query", r"stages.{s}.blocks.\2.attn.q", None),
    (r"stage(\d)_block(\d+)_attention/key", r"stages.{s}.blocks.\2.attn.kv", (0, 2)),
    (r"stage(\d)_block(\d+)_attention/value", r"stages.{s}.blocks.\2.attn.kv", (1, 2)),
    (r"stage(\d)_block(\d+)_attention/out", r"stages.{s}.blocks.\2.attn.proj", None),
    (r"stage(\d)_block(\d+)_reduction/reduction", r"stages.{s}.blocks.\2.attn.sr", None),
    (r"stage(\d)_block(\d+)_reduction/norm", r"stages.{s}.blocks.\2.attn.norm", None),
    (r"stage(\d)_block(\d+)_mlp/(fc1|dwconv|fc2)", r"stages.{s}.blocks.\2.mlp.\3", None),
    (r"stage(\d)_norm", "stages.{s}.norm", None),
)
_EFFICIENTFORMER_V2: tuple[_Row, ...] = (
    (r"stem_conv(\d)/(conv|bn)", r"stem.conv\1.\2", None),
    (r"stage(\d)_downsample_conv/(conv|bn)", r"stages.{s}.downsample.conv.\2", None),
    (r"stage(\d)_downsample_attention/query_local", "stages.{s}.downsample.attn.q.local", None),
    (r"stage(\d)_downsample_attention/query/(conv|bn)", r"stages.{s}.downsample.attn.q.proj.\2", None),
    (r"stage(\d)_downsample_attention/key/(conv|bn)", r"stages.{s}.downsample.attn.k.\2", None),
    (r"stage(\d)_downsample_attention/value/(conv|bn)", r"stages.{s}.downsample.attn.v.\2", None),
    (r"stage(\d)_downsample_attention/value_local/(conv|bn)", r"stages.{s}.downsample.attn.v_local.\2", None),
    (r"stage(\d)_downsample_attention/out/(conv|bn)", r"stages.{s}.downsample.attn.proj.\2", None),
    (r"stage(\d)_downsample_attention", "stages.{s}.downsample.attn", None),
    (r"stage(\d)_block(\d+)_attention/query/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.q.\3", None),
    (r"stage(\d)_block(\d+)_attention/key/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.k.\3", None),
    (r"stage(\d)_block(\d+)_attention/value/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.v.\3", None),
    (r"stage(\d)_block(\d+)_attention/value_local/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.v_local.\3", None),
    (r"stage(\d)_block(\d+)_attention/out/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.proj.\3", None),
    (r"stage(\d)_block(\d+)_attention/(stride_conv)/(conv|bn)", r"stages.{s}.blocks.\2.token_mixer.\3.\4", None),
    (r"stage(\d)_block(\d+)_attention", r"stages.{s}.blocks.\2.token_mixer", None),
    (r"stage(\d)_block(\d+)_scale(\d)", r"stages.{s}.blocks.\2.ls\3", None),
    (r"stage(\d)_block(\d+)_mlp_(fc1|mid|fc2)/(conv|bn)", r"stages.{s}.blocks.\2.mlp.\3.\4", None),
)
_SHARED: tuple[_Row, ...] = (
    (r"norm", "norm", None),
    (r"head", "head", None),
    (r"head_distillation", "head_dist", None),
)
# A layer that only models of the family have.
_FAMILIES = {"class_token": _DEIT, "stage1_patch_embedding": _PVT_V2, "stem_conv1": _EFFICIENTFORMER_V2}
_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "scale": "gamma",
    "attention_bias": "attention_biases",
    "talking_head1_kernel": "talking_head1.weight",
    "talking_head1_bias": "talking_head1.bias",
    "talking_head2_kernel": "talking_head2.weight",
    "talking_head2_bias": "talking_head2.bias",
}

# Official names -> timm's, applied in order.
_OFFICIAL_PVT_V2 = (
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed([234])\.", "stages.{s}.downsample."),
    (r"^block([1234])\.", "stages.{s}.blocks."),
    (r"^norm([1234])\.", "stages.{s}.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
_OFFICIAL_EFFICIENTFORMER_V2 = (
    (r"^dist_head\.", "head_dist."),
    # The stem is one Sequential: convolution, batch norm, GELU, twice.
    (r"^patch_embed\.0\.", "stem.conv1.conv."),
    (r"^patch_embed\.1\.", "stem.conv1.bn."),
    (r"^patch_embed\.3\.", "stem.conv2.conv."),
    (r"^patch_embed\.4\.", "stem.conv2.bn."),
    # Stages and what lies between them take turns in one list.
    (r"^network\.0\.", "stages.0.blocks."),
    (r"^network\.1\.", "stages.1.downsample."),
    (r"^network\.2\.", "stages.1.blocks."),
    (r"^network\.3\.", "stages.2.downsample."),
    (r"^network\.4\.", "stages.2.blocks."),
    (r"^network\.5\.", "stages.3.downsample."),
    (r"^network\.6\.", "stages.3.blocks."),
    (r"\.downsample\.(?:proj|conv)\.", ".downsample.conv.conv."),
    (r"\.downsample\.(?:norm|bn)\.", ".downsample.conv.bn."),
    # Sequentials of (GELU,) convolution and batch norm.
    (r"\.(token_mixer|attn)\.proj\.1\.", r".\1.proj.conv."),
    (r"\.(token_mixer|attn)\.proj\.2\.", r".\1.proj.bn."),
    (r"\.attn\.q\.local\.0\.", ".attn.q.local."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.0\.", r".\1.conv."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.1\.", r".\1.bn."),
    (r"\.mlp\.(fc1|mid|fc2)\.", r".mlp.\1.conv."),
    (r"\.mlp\.norm1\.", ".mlp.fc1.bn."),
    (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
    (r"\.mlp\.norm2\.", ".mlp.fc2.bn."),
    (r"\.layer_scale_([12])$", r".ls\1.gamma"),
)


@dataclass(frozen=True)
class Tensor:
    """Where the values of a Keras weight come from.

    Attributes:
        keys: names of PyTorch tensors; several are joined along the tokens (class and distillation token).
        layout: "vector", "linear" [out, in], "conv" [out, in, k, k], "depthwise" [C, 1, k, k], "tokens" [1, N, D],
            "biases" [heads, N] or "talking_head" [heads, heads, 1, 1].
        part: (index, count) of the equal parts of the rows that are meant, or None for all.
    """

    keys: tuple[str, ...]
    layout: str
    part: tuple[int, int] | None = None


def pytorch_tensors(model: keras.Model) -> dict[str, Tensor]:
    """The PyTorch tensor of every weight of the model, by path; of a detector or a segmenter those of the backbone.

    Raises:
        ValueError: the model is not one of `keras_models`.
    """
    rows = _rows_of(model)
    # The last layer that lists a weight is the innermost one: its owner.
    owners = {weight.path: layer for layer in model._flatten_layers(include_self=False) for weight in layer.weights}
    return {
        weight.path: _tensor(weight, owners[weight.path], rows)
        for weight in model.weights
        if not weight.path.startswith(DENSE_PREFIXES)
    }


def timm_name(key: str) -> str:
    """The timm name of a tensor of a timm or official checkpoint."""
    table: tuple[tuple[str, str], ...] = ()
    if re.match(r"(patch_embed|block|norm)[1-4]\.", key):
        table = _OFFICIAL_PVT_V2
    elif re.match(r"network\.|patch_embed\.[0134]\.|dist_head\.", key):
        table = _OFFICIAL_EFFICIENTFORMER_V2
    for pattern, replacement in table:
        key = _substitute(pattern, replacement, key)
    return key


def _rows_of(model: keras.Model) -> tuple[_Row, ...]:
    names = {layer.name for layer in model.layers}
    for mark, rows in _FAMILIES.items():
        if mark in names:
            return rows + _SHARED
    raise ValueError(f"{model.name} is no DeiT, PVTv2 or EfficientFormerV2 of keras_models; others have no names here.")


def _tensor(weight: keras.Variable, layer: keras.layers.Layer, rows: tuple[_Row, ...]) -> Tensor:
    owner, _, leaf = weight.path.rpartition("/")
    if owner == "class_token":
        return Tensor(("cls_token", "dist_token")[: weight.shape[1]], "tokens")
    if owner == "position_embedding":
        return Tensor(("pos_embed",), "tokens")
    for pattern, replacement, part in rows:
        if re.fullmatch(pattern, owner) and leaf in _LEAVES:
            return Tensor((f"{_substitute(pattern, replacement, owner)}.{_LEAVES[leaf]}",), _layout(leaf, layer), part)
    raise ValueError(f"The weight {weight.path} has no PyTorch name: it is not one of keras_models' families.")


def _layout(leaf: str, layer: keras.layers.Layer) -> str:
    if leaf == "attention_bias":
        return "biases"
    if leaf.startswith("talking_head") and leaf.endswith("kernel"):
        return "talking_head"
    if leaf != "kernel":
        return "vector"
    if isinstance(layer, keras.layers.Dense):
        return "linear"
    return "depthwise" if isinstance(layer, keras.layers.DepthwiseConv2D) else "conv"


def _substitute(pattern: str, replacement: str, text: str) -> str:
    """`re.sub`, where `{s}` in the replacement is the first group minus one."""

    def replace(match: re.Match[str]) -> str:
        stage = str(int(match[1]) - 1) if match.re.groups and "{s}" in replacement else ""
        return match.expand(replacement).replace("{s}", stage)

    return re.sub(pattern, replace, text)
