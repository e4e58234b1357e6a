"""Quantization-aware training: fake-quantized copies of Keras models, policies, calibration.

Example:
    >>> from mobiatt_tf import quantization
    >>> model = quantization.quantize_aware(float_model, "int8")
    >>> quantization.calibrate(model, batches_of_training_images)

Needs tensorflow-model-optimization, which is loaded when the first quantized layer is built.
"""

from mobiatt_tf.quantization.aware import (
    bake,
    check_calibrated,
    is_quantized,
    policy_of,
    quantize_aware,
    quantized_layers,
)
from mobiatt_tf.quantization.calibration import calibrate, calibrated_copy
from mobiatt_tf.quantization.composites import QuantizedChildren
from mobiatt_tf.quantization.layer_errors import layer_errors
from mobiatt_tf.quantization.policies import POLICIES, Policy, get_policy

__all__ = [
    "POLICIES",
    "Policy",
    "QuantizedChildren",
    "bake",
    "calibrate",
    "calibrated_copy",
    "check_calibrated",
    "get_policy",
    "is_quantized",
    "layer_errors",
    "policy_of",
    "quantize_aware",
    "quantized_layers",
]
