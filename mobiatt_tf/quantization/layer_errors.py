"""Which layer of a quantized model loses most."""

import keras
import numpy as np

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
        ValueError: `quantized` is not calibrated.
    """
    check_calibrated(quantized)
    errors: dict[str, float] = {}
    twins = [(model.get_layer(layer.name), layer) for layer in quantized_layers(quantized)]
    ends = keras.Model(model.inputs, [(twin.input, twin.output) for twin, _ in twins])
    for (_, layer), (inputs, expected) in zip(twins, ends([images], training=False), strict=True):
        actual = layer(*inputs, training=False) if isinstance(inputs, list | tuple) else layer(inputs, training=False)
        actual, expected = (keras.ops.convert_to_numpy(x).astype("float64") for x in (actual, expected))
        scale = max(float(np.sqrt(np.mean(np.square(expected)))), 1e-30)
        errors[layer.name] = float(np.sqrt(np.mean(np.square(actual - expected)))) / scale
    return dict(sorted(errors.items(), key=lambda item: -item[1]))
