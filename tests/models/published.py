"""The published sizes, each built once in a test run: several files ask for their parameters and multiply-adds."""

import functools
from typing import Any, NamedTuple

from keras_models import FAMILIES
from mobiatt_tf.complexity import attention_stages, count_macs, trainable_parameters


class Size(NamedTuple):
    """What a model's shapes say; the model itself is not kept."""

    parameters: int
    macs: int
    attention: list[dict[str, Any]]


@functools.cache
def size_of(family: str, variant: str, attention: str, **arguments: Any) -> Size:
    """Trainable parameters, multiply-adds, and the attention layers by stage."""
    model = FAMILIES[family].build(variant, attention=attention, **arguments)
    return Size(trainable_parameters(model), count_macs(model), attention_stages(model))
