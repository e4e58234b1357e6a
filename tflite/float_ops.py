"""Takes operators of a .tflite file from int8 back to float, as the model that was trained has them.

TensorFlow's converter turns an operator into int8 wherever its inputs and outputs are, and cannot be told not to.

- An int8 GELU is a table look-up outside XNNPACK's partition: DeiT-Tiny then runs in 13 pieces instead of one. Written
  as DEQUANTIZE, GELU, QUANTIZE it stays inside, and is more exact.
- LOGISTIC and SOFTMAX, whose int8 output scale is fixed at 1/256, become int8 behind any int8 tensor, whether the model
  rounds there or not, and so does what multiplies by them. That is an error which training never saw; the weights of a
  softmax over 784 tokens are all 0 then.
"""

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mobiatt_tf.errors import UserError

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
_WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")  # have an int32 bias
_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_FIXED_SCALE = ("LOGISTIC", "SOFTMAX")
_MOVES = (
    "RESHAPE",
    "TRANSPOSE",
    "CONCATENATION",
    "SLICE",
    "STRIDED_SLICE",
    "PAD",
    "SQUEEZE",
    "EXPAND_DIMS",
    "SPLIT",
)  # hand the scale of their input on
_TWIN = b"/float"  # ends the names of the tensors that are added here


def to_float(content: bytes, operators: tuple[str, ...] = FLOAT_ONLY) -> bytes:
    """The file with the int8 operators of these names between a DEQUANTIZE and a QUANTIZE.

    Tensors keep their scales and zero points, so nothing else changes.

    Args:
        content: a verified .tflite file with one subgraph.
        operators: names as in the schema's BuiltinOperator.

    Raises:
        UserError: a dense layer or convolution reads a tensor of fixed scale.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    changed = False
    for graph in model.subgraphs:
        chosen, fixed = _chosen(model, graph, operators)
        rewritten: list[Any] = []
        for operator in graph.operators:
            rewritten += _between_floats(model, graph, operator) if id(operator) in chosen else [operator]
        graph.operators = _without_detours(model, graph, rewritten, fixed)
        changed = changed or bool(chosen) or bool(fixed)
    return packed(model) if changed else content


class _SharingBuilder(flatbuffers.Builder):
    """Writes equal vectors once: a zero for every channel of every kernel and bias is 3 % of DeiT-Tiny's file."""

    def __init__(self) -> None:
        super().__init__(1024)
        self._offsets: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802 (the name that `Pack` calls)
        key = (x.dtype.str, x.tobytes())
        if key not in self._offsets:
            if x.dtype == np.uint8:  # the content of a buffer: schema.fbs wants it aligned to 16 bytes
                self.StartVector(1, x.size, 16)
                self.head -= x.size
                self.Bytes[self.head : self.head + x.size] = key[1]
                self._offsets[key] = self.EndVector()
            else:
                self._offsets[key] = super().CreateNumpyVector(x)
        return self._offsets[key]


def packed(model: Any) -> bytes:
    """The bytes of a file."""
    builder = _SharingBuilder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _chosen(model: Any, graph: Any, names: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """The ids of the int8 operators to take back: those of these names, and whatever reads a fixed scale.

    Also the indices of the int8 tensors whose scale is fixed: TFLite's choice, not training's.
    """
    chosen: set[int] = set()
    fixed: set[int] = set()
    floats: set[int] = set()  # float outputs of the operators with a fixed scale
    for operator in graph.operators:  # in the order of execution
        name = _name(model, operator)
        if not _is_int8(graph, operator):
            if name in _FIXED_SCALE and name in names:
                floats.update(operator.outputs)
            continue
        if name == "QUANTIZE":
            if operator.inputs[0] in floats and _scale(graph, operator.outputs[0]) == 1 / 256:
                fixed.add(operator.outputs[0])
            continue
        reads_fixed = bool(fixed.intersection(operator.inputs))
        if name in names or reads_fixed:
            chosen.add(id(operator))
            if name in _FIXED_SCALE or (reads_fixed and name in _MOVES):
                fixed.update(operator.outputs)
    return chosen, fixed


def _scale(graph: Any, index: int) -> float:
    return float(graph.tensors[index].quantization.scale[0])


def _is_int8(graph: Any, operator: Any) -> bool:
    return any(graph.tensors[index].type == schema.TensorType.INT8 for index in operator.outputs)


def _between_floats(model: Any, graph: Any, operator: Any) -> list[Any]:
    """DEQUANTIZE for each int8 input, the operator on float tensors, QUANTIZE for each int8 output."""
    if any(graph.tensors[index].type == schema.TensorType.INT32 for index in operator.inputs if index >= 0) and (
        _name(model, operator) in _WEIGHTED
    ):
        raise UserError(f"{_name(model, operator)} behind a tensor of fixed scale cannot be taken back to float.")
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


def _without_detours(model: Any, graph: Any, operators: list[Any], fixed: set[int]) -> list[Any]:
    """Leaves out QUANTIZE followed by DEQUANTIZE where these were made here: the float tensor is at hand."""
    made = {id(tensor) for tensor in graph.tensors if (tensor.name or b"").endswith(_TWIN)}
    floats: dict[int, int] = {}  # int8 tensor to the float tensor that it was rounded from
    for operator in operators:
        is_ours = id(graph.tensors[operator.inputs[0]]) in made or operator.outputs[0] in fixed
        if _name(model, operator) == "QUANTIZE" and is_ours:
            floats[operator.outputs[0]] = operator.inputs[0]
    renamed: dict[int, int] = {}
    kept = []
    for operator in operators:
        if _name(model, operator) == "DEQUANTIZE" and operator.inputs[0] in floats:
            renamed[operator.outputs[0]] = floats[operator.inputs[0]]
            continue
        if _name(model, operator) == "QUANTIZE" and operator.inputs[0] in floats:  # from int8 to another int8
            operator.inputs = np.array([floats[operator.inputs[0]]], np.int32)
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
    return _NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "")


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
