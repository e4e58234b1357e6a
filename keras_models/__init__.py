"""Vision transformers with Mobile-Attention as Keras models."""

from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_models import deit, efficientformer_v2, pvt_v2
from keras_models.common import copy_weights, resize
from keras_models.deit import DeiTMobiAtt
from keras_models.dense import start_from_classifier
from keras_models.efficientformer_v2 import EfficientFormerV2MobiAtt
from keras_models.pvt_v2 import PVTv2MobiAtt
from keras_models.retinanet import RetinaNetMobiAtt
from keras_models.semantic_fpn import SemanticFPNMobiAtt


class Family(NamedTuple):
    """How command lines build the models of a family.

    Attributes:
        build: the builder, whose first argument is the variant.
        variants: their names.
        default_variant: the smallest published one.
        has_batch_norm: whether the builder takes `synchronized_batch_norm`.
        has_distillation: whether the builder takes `distilled`.
    """

    build: Callable[..., keras.Model]
    variants: tuple[str, ...]
    default_variant: str
    has_batch_norm: bool
    has_distillation: bool


FAMILIES: dict[str, Family] = {
    "deit": Family(DeiTMobiAtt, tuple(deit.VARIANTS), "tiny", False, True),
    "pvt_v2": Family(PVTv2MobiAtt, tuple(pvt_v2.VARIANTS), "b0", False, False),
    "efficientformer_v2": Family(EfficientFormerV2MobiAtt, tuple(efficientformer_v2.VARIANTS), "s0", True, True),
}

# By the task that they are for; the first argument is the family.
DENSE: dict[str, Callable[..., keras.Model]] = {"detection": RetinaNetMobiAtt, "segmentation": SemanticFPNMobiAtt}

__all__ = [
    "DENSE",
    "FAMILIES",
    "DeiTMobiAtt",
    "EfficientFormerV2MobiAtt",
    "Family",
    "PVTv2MobiAtt",
    "RetinaNetMobiAtt",
    "SemanticFPNMobiAtt",
    "copy_weights",
    "resize",
    "start_from_classifier",
]
