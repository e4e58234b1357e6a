"""Vision transformers with Mobile-Attention as Keras models."""

from keras_models.common import copy_weights
from keras_models.deit import DeiTMobiAtt

__all__ = ["DeiTMobiAtt", "copy_weights"]
