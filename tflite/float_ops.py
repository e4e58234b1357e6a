"""Takes operators of a .tflite file from int8 back to float, as the model that was trained has them.

TensorFlow's converter turns an operator into int8 wherever its inputs and outputs are, and cannot be told not to.

- An int8 GELU is a table look-up outside XNNPACK's partition: DeiT-Tiny then runs in 13 pieces instead of one. Written
  as DEQUANTIZE, GELU, QUANTIZE it stays inside, and is more exact.
- LOGISTIC, whose int8 output scale is fixed, becomes int8 behind any int8 tensor, whether the model rounds there or
  not. In front of the float core of the attention that is an error of 1/512 which training never saw.
"""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

# LOGISTIC, and the int8 kernels that XNNPACK (ai-edge-litert 2.3) does not take over, of those our graphs may hold.
FLOAT_ONLY = (
    "LOGISTIC",
    "GELU",
    "RELU",
    "RELU6",
    "SOFTMAX",
    "DIV",
    "RSQRT",
    "EXP",
    "AVERAGE_POOL_2D",
    "SQUARED_DIFFERENCE",
)
_TWIN = b"/float"  # ends the names of the tensors that are added here


def to_float(content: bytes, operators: tuple[str, ...] = FLOAT_ONLY) -> bytes:
    """The file with the int8 operators of these names between a DEQUANTIZE and a QUANTIZE.

    Tensors keep their scales and zero points, so nothing else changes.

    Args:
        content: a verified .tflite file with one subgraph.
        operators: names as in the schema's BuiltinOperator.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    codes = {getattr(schema.BuiltinOperator, name) for name in operators}
    changed = False
    for graph in model.subgraphs:
        rewritten: list[Any] = []
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            if max(code.builtinCode, code.deprecatedBuiltinCode) in codes and _is_int8(graph, operator):
                rewritten += _between_floats(model, graph, operator)
                changed = True
            else:
                rewritten.append(operator)
        graph.operators = _without_detours(model, graph, rewritten)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)) if changed else content


def _is_int8(graph: Any, operator: Any) -> bool:
    return any(graph.tensors[index].type == schema.TensorType.INT8 for index in operator.outputs)


def _between_floats(model: Any, graph: Any, operator: Any) -> list[Any]:
    """DEQUANTIZE for each int8 input, the operator on float tensors, QUANTIZE for each int8 output."""
    before, after = [], []
    inputs, outputs = list(operator.inputs), list(operator.outputs)
    for position, index in enumerate(inputs):
        if index >= 0 and graph.tensors[index].type == schema.TensorType.INT8:
            inputs[position] = _float_twin(graph, index)
            before.append(_operator(model, "DEQUANTIZE", index, inputs[position]))
    for position, index in enumerate(outputs):
        if graph.tensors[index].type == schema.TensorType.INT8:
            outputs[position] = _float_twin(graph, index)
            after.append(_operator(model, "QUANTIZE", outputs[position], index))
    operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    return [*before, operator, *after]


def _without_detours(model: Any, graph: Any, operators: list[Any]) -> list[Any]:
    """Leaves out QUANTIZE followed by DEQUANTIZE where these two were made here: the float tensor is at hand."""
    made = {id(tensor) for tensor in graph.tensors if (tensor.name or b"").endswith(_TWIN)}
    floats: dict[int, int] = {}  # int8 tensor to the float tensor that it was rounded from
    for operator in operators:
        if _name(model, operator) == "QUANTIZE" and id(graph.tensors[operator.inputs[0]]) in made:
            floats[operator.outputs[0]] = operator.inputs[0]
    renamed: dict[int, int] = {}
    kept = []
    for operator in operators:
        if _name(model, operator) == "DEQUANTIZE" and operator.inputs[0] in floats:
            renamed[operator.outputs[0]] = floats[operator.inputs[0]]
            continue
        operator.inputs = np.array([renamed.get(index, index) for index in operator.inputs], np.int32)
        kept.append(operator)
    graph.outputs = np.array([renamed.get(index, index) for index in graph.outputs], np.int32)
    used = {index for operator in kept for index in operator.inputs} | set(graph.outputs)
    return [
        operator
        for operator in kept
        if _name(model, operator) != "QUANTIZE" or operator.outputs[0] in used or operator.outputs[0] not in floats
    ]


def _name(model: Any, operator: Any) -> str:
    code = model.operatorCodes[operator.opcodeIndex]
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    return next((name for name in ("QUANTIZE", "DEQUANTIZE") if getattr(schema.BuiltinOperator, name) == builtin), "")


def _float_twin(graph: Any, index: int) -> int:
    """The index of a new float tensor of the same shape."""
    source = graph.tensors[index]
    twin = schema.TensorT()
    twin.shape, twin.shapeSignature = source.shape, source.shapeSignature
    twin.type = schema.TensorType.FLOAT32
    twin.buffer = 0  # the empty one: computed, not constant
    twin.name = (source.name or b"") + _TWIN
    graph.tensors.append(twin)
    return len(graph.tensors) - 1


def _operator(model: Any, name: str, source: int, target: int) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex = _code_index(model, getattr(schema.BuiltinOperator, name))
    operator.inputs, operator.outputs = np.array([source], np.int32), np.array([target], np.int32)
    return operator


def _code_index(model: Any, builtin: int) -> int:
    """Where the file lists an operator; adds it if need be."""
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
