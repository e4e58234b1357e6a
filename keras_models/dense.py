"""Detectors and segmenters on trained backbones."""

import keras

from keras_models.common import carry_weights
from mobiatt_tf.layers import grid_tables
from mobiatt_tf.models import DENSE_PREFIXES, check_reference_tokens, is_dense


def start_from_classifier(source: keras.Model, target: keras.Model) -> None:
    """Copies the backbone of `source` into a detector or a segmenter; what that adds to it keeps its values.

    Position embeddings and attention biases are resized to the target's grid (bicubic). See
    `mobiatt_tf.interop.start_from` for PyTorch checkpoints and files.

    Args:
        source: a classifier of the same family, variant and attention, or another detector or segmenter on it.
        target: of `RetinaNetMobiAtt` or `SemanticFPNMobiAtt`.

    Raises:
        ValueError: `target` is neither, its backbone is another (lists the weights on either side), or the two count
            other `reference_tokens`. `target` is then unchanged.
    """
    if not is_dense(target):
        raise ValueError(f"{target.name} is no detector and no segmenter: use keras_models.copy_weights.")
    wanted = {weight.path: weight for weight in target.weights if not weight.path.startswith(DENSE_PREFIXES)}
    behind = ("head", "norm/", *DENSE_PREFIXES)  # what the source may have behind its backbone; DeiT's norm is wanted
    found = {
        weight.path: weight for weight in source.weights if weight.path in wanted or not weight.path.startswith(behind)
    }
    check_reference_tokens(source, target)
    carry_weights(found, wanted, grid_tables(source), grid_tables(target))
