"""Which operators of a .tflite file compute in int8."""

from collections import Counter
from pathlib import Path

from ai_edge_litert import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils


def int8_operators(path: Path) -> Counter[str]:
    """Operator name to the number of those whose output is int8."""
    model = flatbuffer_utils.read_model(str(path))
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    found: Counter[str] = Counter()
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            if graph.tensors[operator.outputs[0]].type == schema.TensorType.INT8:
                found[names[max(code.builtinCode, code.deprecatedBuiltinCode)]] += 1
    return found
