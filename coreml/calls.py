"""The calls of layers that a functional model consists of: a layer that is called several times has several."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import keras

from mobiatt_tf.tasks import task_of


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        name: the layer's; where the layer is called more than once with the number of the call, as in "head.2".
        operation: the layer, or a bare operation such as x + y.
        inputs: symbolic tensors.
        outputs: symbolic tensors.
    """

    name: str
    operation: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


def calls(model: keras.Model) -> list[Call]:
    """The calls of a functional model, each behind those whose results it takes.

    The order and the numbers depend on the graph alone, so that they are the same in every copy of a model.
    """
    found: list[Any] = []  # nodes
    seen: set[int] = set()
    inputs = {id(tensor) for tensor in model.inputs}
    pending = [(_node(tensor), False) for tensor in reversed(model.outputs) if id(tensor) not in inputs]
    while pending:  # depth first without recursion: models have hundreds of layers
        node, complete = pending.pop()
        if complete:
            found.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            pending.append((node, True))
            pending += [(_node(tensor), False) for tensor in reversed(node.input_tensors) if id(tensor) not in inputs]
    times = Counter(id(node.operation) for node in found)
    names = {node.operation.name for node in found}
    numbers: Counter[int] = Counter()
    result = []
    for node in found:
        name = node.operation.name
        if times[id(node.operation)] > 1:
            numbers[id(node.operation)] += 1
            name = f"{name}.{numbers[id(node.operation)]}"
            while name in names:  # a layer that bears the same name by itself
                name += "_"
        result.append(Call(name, node.operation, tuple(node.input_tensors), tuple(node.outputs)))
    return result


def _node(tensor: Any) -> Any:
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def outputs_of(model: keras.Model) -> dict[str, list[Any]]:
    """The symbolic outputs of a model by their names in a package: of a classifier "logits", one or two heads.

    Raises:
        ValueError: the model is no classifier, detector or segmenter.
    """
    if task_of(model) != "detection":
        return {"logits": list(model.outputs)}
    found = model.output  # as it was given to keras.Model
    if not isinstance(found, dict) or found.keys() != {"boxes", "logits"}:
        raise ValueError(f"A detector gives a dict with boxes and logits, but {model.name} gives {found}.")
    return {name: [found[name]] for name in ("boxes", "logits")}
