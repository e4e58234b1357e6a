"""What detectors and segmenters share: a backbone's four maps in all three families, and the feature pyramid network.

PVTv2 and EfficientFormerV2 have the maps: the ends of their stages, in PVTv2 normalised, in EfficientFormerV2 as they
are (its detection code adds no norms: github.com/snap-research/EfficientFormer, detection/). DeiT has one map, from
which four are made after Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
section 3 ("simple feature pyramid"). Ours there: nearest upsampling and a 3 x 3 convolution in place of each 2 x 2
deconvolution, because both converters and int8 have them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from keras_models import deit, efficientformer_v2, pvt_v2
from keras_models.common import Attention, ImageSize, attention_label, image_sides
from mobiatt_tf import ops
from mobiatt_tf.layers import TokensToMap

_BUILDERS: dict[str, Any] = {
    "deit": deit.DeiTMobiAtt,
    "pvt_v2": pvt_v2.PVTv2MobiAtt,
    "efficientformer_v2": efficientformer_v2.EfficientFormerV2MobiAtt,
}
_DEFAULT_VARIANTS = {"deit": "tiny", "pvt_v2": "b0", "efficientformer_v2": "s0"}
_VARIANTS: dict[str, Any] = {
    "deit": deit.VARIANTS,
    "pvt_v2": pvt_v2.VARIANTS,
    "efficientformer_v2": efficientformer_v2.VARIANTS,
}
# A quarter of a patch must be a whole number of pixels. Of the classifiers' "quickstart" with patches of 7 it is not;
# one to start from is built with patch_size=8.
_PATCH_SIZES = {"quickstart": 8}


class Pyramid(NamedTuple):
    """A backbone that ends in maps.

    Attributes:
        images: the model's input.
        maps: the four maps, [B, H / stride, W / stride, D] each.
        strides: of each map, in pixels: 4, 8, 16, 32, or 2, 4, 8, 16 for "quickstart".
        label: for a model's name, such as "pvt_v2_b0_mobile".
    """

    images: Any
    maps: list[Any]
    strides: list[int]
    label: str


def pyramid(
    family: str,
    variant: str | None,
    image_size: ImageSize,
    attention: Attention = "mobile",
    training_size: ImageSize | None = None,
    drop_path: float | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    freeze_batch_norm: bool = False,
    synchronized_batch_norm: bool = False,
    batch_size: int | None = None,
) -> Pyramid:
    """The backbone of a detector or a segmenter, under the current dtype policy; see `RetinaNetMobiAtt`.

    Raises:
        ValueError: an unknown family, variant or attention, sides that are no multiples of the last map's stride, or
            heads that do not divide a width.
    """
    if family not in _BUILDERS:
        raise ValueError(f"There is no family {family!r}. Choose one of {', '.join(_BUILDERS)}.")
    variant = variant or _DEFAULT_VARIANTS[family]
    if variant not in _VARIANTS[family]:
        raise ValueError(f"{family} has no variant {variant!r}. Choose one of {', '.join(_VARIANTS[family])}.")
    strides = _strides(family, variant)
    size = image_sides(image_size, strides[-1])
    arguments: dict[str, Any] = {
        "image_size": size,
        "attention": attention,
        "training_size": training_size,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "features_only": True,
        "batch_size": batch_size,
    }
    if drop_path is not None:
        arguments["drop_path"] = drop_path
    if family == "efficientformer_v2":
        arguments["freeze_batch_norm"] = freeze_batch_norm
        arguments["synchronized_batch_norm"] = synchronized_batch_norm
    if family == "deit":
        arguments["patch_size"] = strides[2]
    backbone = _BUILDERS[family](variant, **arguments)
    label = f"{family}_{variant}_{attention_label((attention,) if isinstance(attention, str) else tuple(attention))}"
    if family == "deit":
        maps = _simple_pyramid(backbone.output["norm"], (size[0] // strides[2], size[1] // strides[2]))
    else:
        maps = [backbone.output[f"stage{stage}"] for stage in (1, 2, 3, 4)]
    return Pyramid(backbone.input, maps, strides, label)


def _strides(family: str, variant: str) -> list[int]:
    """Of the four maps, in pixels."""
    row = _VARIANTS[family][variant]
    if family == "deit":
        patch = _PATCH_SIZES.get(variant, row.patch_size)
        if patch % 4:
            raise ValueError(
                f"The patches of {variant} are {patch} pixels wide, no multiple of 4: no pyramid has them."
            )
        first = patch // 4
    elif family == "pvt_v2":
        first = row.stem[1]
    else:
        first = row.stem_strides[0] * row.stem_strides[1]
    return [first * 2**stage for stage in range(4)]


def _simple_pyramid(tokens: Any, grid: tuple[int, int]) -> list[Any]:
    """Maps of 4, 2, 1 and 1/2 times the side of the grid of DeiT's normalised last tokens [B, 1 + hw, D]."""
    last = TokensToMap(grid, prefix=1, name="pyramid_map")(tokens)  # [B, h, w, D]
    dim = last.shape[-1]

    def enlarged(x: Any, filters: int, name: str) -> Any:
        x = keras.layers.UpSampling2D(name=f"pyramid_{name}_upsample")(x)  # [B, 2 h, 2 w, C]
        return keras.layers.Conv2D(filters, 3, padding="same", name=f"pyramid_{name}_conv")(x)

    first = enlarged(last, dim // 2, "stage1a")  # [B, 2 h, 2 w, D / 2]
    first = keras.layers.LayerNormalization(epsilon=1e-6, name="pyramid_stage1_norm")(first)
    first = keras.layers.Activation(ops.gelu, name="pyramid_stage1_gelu")(first)
    first = enlarged(first, dim // 4, "stage1b")  # [B, 4 h, 4 w, D / 4]
    second = enlarged(last, dim // 2, "stage2")  # [B, 2 h, 2 w, D / 2]
    fourth = keras.layers.MaxPooling2D(name="pyramid_stage4_pool")(last)  # [B, h / 2, w / 2, D]
    return [first, second, last, fourth]


def feature_pyramid(maps: Sequence[Any], channels: int, first_stage: int) -> list[Any]:
    """The feature pyramid network: every map sees the coarser ones, all with `channels` channels.

    Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017: 1 x 1 lateral convolutions, nearest
    upsampling by 2 and addition from the coarsest down, then a 3 x 3 convolution each. Weights start as in mmdetection
    and mmsegmentation (Xavier, uniform).

    Args:
        maps: [B, H, W, C], each with half the sides of the one before.
        channels: of the results.
        first_stage: the stage that the first map is of, for the layers' names.

    Returns:
        [B, H, W, channels] for each map.
    """
    stages = range(first_stage, first_stage + len(maps))
    merged = [
        keras.layers.Conv2D(channels, 1, name=f"fpn_lateral{stage}")(x) for stage, x in zip(stages, maps, strict=True)
    ]
    for index in reversed(range(len(maps) - 1)):
        stage = stages[index]
        coarse = keras.layers.UpSampling2D(name=f"fpn_upsample{stage + 1}")(merged[index + 1])  # [B, H, W, channels]
        merged[index] = keras.layers.Add(name=f"fpn_add{stage}")([merged[index], coarse])
    return [
        keras.layers.Conv2D(channels, 3, padding="same", name=f"fpn_output{stage}")(x)
        for stage, x in zip(stages, merged, strict=True)
    ]
