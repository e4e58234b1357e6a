"""Layer-wise learning-rate decay: while fine-tuning, the earlier a block, the smaller its steps."""

import re
from collections.abc import Sequence

# First parts of the variables' paths in `keras_models`.
_STEM = re.compile(r"(patch_embedding|class_token|position_embedding|stage1_patch_embedding|stem_conv\d+)$")
_BLOCK = re.compile(r"(?:stage(\d+)_)?block(\d+)_")
_BEFORE_STAGE = re.compile(r"stage(\d+)_(?:patch_embedding|downsample_\w+)$")
_AFTER_STAGE = re.compile(r"stage(\d+)_norm$")
_TOP = re.compile(r"(norm|head|head_distillation)$")


def layer_depths(paths: Sequence[str]) -> list[int]:
    """How deep in the network each variable is: 0 in the stem, 1 to n in the n blocks, n + 1 in final norm and heads.

    As BEiT counts (`get_num_layer_for_vit` in optim_factory.py of microsoft/unilm): patch embedding, class token and
    position embedding are the stem. In PVTv2 and EfficientFormerV2 the blocks are counted through all stages; what
    shrinks the map before a stage belongs to the stage's first block, a norm after a stage to its last.

    Args:
        paths: of all trainable variables of one model of `keras_models`, such as "stage2_block0_mlp/fc1/kernel".

    Returns:
        The depth of each path, in the same order.

    Raises:
        ValueError: a path is not one of those models'.
    """
    layers = [path.split("/")[0] for path in paths]
    blocks = sorted({_stage_and_block(match) for layer in layers if (match := _BLOCK.match(layer))})  # front to back
    depths = [_depth(layer, blocks) for layer in layers]
    if unknown := [path for path, depth in zip(paths, depths, strict=True) if depth is None]:
        raise ValueError(
            f"The layer of {unknown[0]} is not known, so that it has no depth: layer_decay works for DeiT, PVTv2 and "
            "EfficientFormerV2 from keras_models. Set layer_decay=1 for other models."
        )
    return [depth for depth in depths if depth is not None]


def layer_scales(paths: Sequence[str], decay: float) -> list[float]:
    """What the learning rate of each variable is multiplied by: decay ** (n + 1 - depth), 1 in the heads.

    BEiT (Bao et al., ICLR 2022, section 3.2); `param_groups_layer_decay` of timm.

    Args:
        paths: as in `layer_depths`.
        decay: in (0, 1].

    Raises:
        ValueError: a path is not one of `keras_models`' models.
    """
    top = 1 + len({match.group() for path in paths if (match := _BLOCK.match(path))})
    return [decay ** (top - depth) for depth in layer_depths(paths)]


def _stage_and_block(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1] or 1), int(match[2])


def _depth(layer: str, blocks: list[tuple[int, int]]) -> int | None:
    """The depth of a layer in a network with these (stage, block) pairs; None if it is unknown there."""
    if not blocks:
        return None
    if _STEM.match(layer):
        return 0
    if _TOP.match(layer):
        return len(blocks) + 1
    if match := _BLOCK.match(layer):
        return 1 + blocks.index(_stage_and_block(match))
    for pattern, position in ((_BEFORE_STAGE, 0), (_AFTER_STAGE, -1)):
        if match := pattern.match(layer):
            of_stage = [index for index, (stage, _) in enumerate(blocks) if stage == int(match[1])]
            return 1 + of_stage[position] if of_stage else None
    return None
