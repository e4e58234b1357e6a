"""Augmentation of training images: RandAugment, colour jitter, random erasing, mixup and CutMix."""

from mobiatt_tf.augment.erasing import random_erasing
from mobiatt_tf.augment.jitter import color_jitter
from mobiatt_tf.augment.mixing import mix
from mobiatt_tf.augment.policy import CROPS, Augmentation
from mobiatt_tf.augment.rand_augment import rand_augment

__all__ = ["CROPS", "Augmentation", "color_jitter", "mix", "rand_augment", "random_erasing"]
