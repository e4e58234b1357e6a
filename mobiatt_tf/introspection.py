"""What the heads of a whole model do on real images: for pictures, ablations and layer-by-layer parity."""

from typing import Any

import keras
import numpy as np

from mobiatt_tf.layers import MobileAttention, MobileConvAttention


def model_flows(model: keras.Model, images: Any) -> dict[str, dict[str, np.ndarray]]:
    """Flows, competition and allocation of every Mobile-Attention layer of a functional model.

    Args:
        model: a functional model with layers of Mobile-Attention, such as `keras_models.DeiTMobiAtt()`.
        images: a batch of the model's input.

    Returns:
        By layer name, in the order of the model: what `MobileAttention.introspect` returns, float32 [B, H, N] each.

    Raises:
        ValueError: the model has no such layer, or calls one more than once.
    """
    layers = [layer for layer in model.layers if isinstance(layer, MobileAttention | MobileConvAttention)]
    if not layers:
        kinds = sorted({type(layer).__name__ for layer in model.layers})
        raise ValueError(f"{model.name} has no MobileAttention layer; its layers are {', '.join(kinds)}.")
    shared = [layer.name for layer in layers if len(layer._inbound_nodes) != 1]
    if shared:
        raise ValueError(f"{', '.join(shared)} is called more than once: ask each call with layer.introspect instead.")
    inputs = keras.Model(model.input, {layer.name: layer.input for layer in layers})(images, training=False)
    seen: dict[str, dict[str, np.ndarray]] = {}
    for layer in layers:
        tokens = inputs[layer.name]  # the query, or [query, key] or [query, key, value]
        flows = layer.introspect(*tokens[:2]) if isinstance(tokens, list) else layer.introspect(tokens)
        seen[layer.name] = {name: keras.ops.convert_to_numpy(value) for name, value in flows.items()}
    return seen
