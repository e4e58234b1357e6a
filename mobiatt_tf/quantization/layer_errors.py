"""Which layer of a quantized model loses most."""

import keras
import numpy as np

from mobiatt_tf.models import layer_calls
from mobiatt_tf.quantization.aware import check_calibrated, quantized_layers


def layer_errors(model: keras.Model, quantized: keras.Model, images: np.ndarray) -> dict[str, float]:
    """The error that each quantized layer makes by itself: it reads what its float twin reads.

    Args:
        model: the float model.
        quantized: its calibrated, or trained, copy of `quantize_aware`. After training its weights are others, and what
            they change is in the figure too.
        images: float32 [B, height, width, 3]; 32 are plenty.

    Returns:
        Layer name to root mean square error over the root mean square of the float layer's output, largest first.

    Raises:
        ValueError: `quantized` is not calibrated, or has layers that `model` does not.
    """
    check_calibrated(quantized)
    twins = {layer.name: layer for layer in quantized_layers(quantized)}
    # A layer that is called several times, such as the head of a detector, has a node for each call.
    calls = [node for node in layer_calls(model) if node.operation.name in twins]
    if unknown := twins.keys() - {node.operation.name for node in calls}:
        raise ValueError(
            f"{quantized.name} was not made from {model.name}, which has no layer {', '.join(sorted(unknown))}. Give "
            "the float model that went into quantize_aware."
        )
    ends = keras.Model(model.inputs, [(node.input_tensors, node.output_tensors) for node in calls])
    sums = {name: np.zeros(2) for name in twins}  # of the squares of the errors, and of what is expected
    for node, (inputs, outputs) in zip(calls, ends([images], training=False), strict=True):
        actual = twins[node.operation.name](*inputs, training=False)
        difference, expected = (
            keras.ops.convert_to_numpy(x).astype("float64") for x in (actual - outputs[0], outputs[0])
        )
        sums[node.operation.name] += np.square(difference).sum(), np.square(expected).sum()
    errors = {name: float(np.sqrt(error / max(expected, 1e-60))) for name, (error, expected) in sums.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))
