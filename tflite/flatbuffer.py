"""What a .tflite file holds, read with LiteRT's schema classes and without TensorFlow.

The schema is `tflite/converter/schema/schema.fbs` of LiteRT. The classes check no offset: verify the file first.
"""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}


def read(content: bytes) -> dict[str, Any]:
    """Summarizes a verified model as plain values that JSON can carry.

    Returns:
        A dictionary: `inputs`, `outputs` (lists of name, shape, dtype, scale, zero_point), `signatures` (key, inputs,
        outputs), `op_counts` over all subgraphs, `custom_ops`, `flex_ops` (sorted names), `nodes` of the main subgraph,
        `weight_bytes` by dtype, `parameters` and `max_rank`.

        `parameters` counts the elements of constant tensors that are floating point or quantized; index constants
        (axes, shapes) are left out, and the scalars that the converter writes (epsilons, scales) are counted.
    """
    model = schema.Model.GetRootAs(content, 0)
    subgraphs = [model.Subgraphs(index) for index in range(model.SubgraphsLength())]
    if not subgraphs:
        raise ValueError("the model holds no subgraph")
    names = [_operator_name(model.OperatorCodes(index)) for index in range(model.OperatorCodesLength())]
    counts: dict[str, int] = {}
    for graph in subgraphs:
        for index in range(graph.OperatorsLength()):
            name = names[graph.Operators(index).OpcodeIndex()]
            counts[name] = counts.get(name, 0) + 1
    custom = [
        name
        for index, name in enumerate(names)
        if _builtin_code(model.OperatorCodes(index)) == schema.BuiltinOperator.CUSTOM and name in counts
    ]
    weight_bytes, parameters = _weights(model, subgraphs)
    main = subgraphs[0]
    return {
        "inputs": [_tensor(main.Tensors(main.Inputs(index))) for index in range(main.InputsLength())],
        "outputs": [_tensor(main.Tensors(main.Outputs(index))) for index in range(main.OutputsLength())],
        "signatures": [_signature(model.SignatureDefs(index)) for index in range(model.SignatureDefsLength())],
        "op_counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "custom_ops": sorted({name for name in custom if not name.startswith("Flex")}),
        "flex_ops": sorted({name for name in custom if name.startswith("Flex")}),
        "nodes": main.OperatorsLength(),
        "weight_bytes": weight_bytes,
        "parameters": parameters,
        "max_rank": max(
            (graph.Tensors(index).ShapeLength() for graph in subgraphs for index in range(graph.TensorsLength())),
            default=0,
        ),
    }


def _text(content: bytes | None) -> str:
    return (content or b"").decode(errors="replace")


def _builtin_code(code: Any) -> int:
    # Codes above 127 do not fit the first field, which older files have alone.
    return max(code.DeprecatedBuiltinCode(), code.BuiltinCode())


def _operator_name(code: Any) -> str:
    builtin = _builtin_code(code)
    if builtin == schema.BuiltinOperator.CUSTOM:
        return _text(code.CustomCode() or b"CUSTOM")
    return _OPERATORS.get(builtin, f"BUILTIN_{builtin}")


def _tensor(tensor: Any) -> dict[str, Any]:
    shape = tensor.ShapeAsNumpy() if tensor.ShapeSignatureIsNone() else tensor.ShapeSignatureAsNumpy()
    quantization = tensor.Quantization()
    quantized = quantization is not None and quantization.ScaleLength() == 1
    return {
        "name": _text(tensor.Name()),
        "shape": [int(size) for size in shape] if isinstance(shape, np.ndarray) else [],  # an empty vector reads as 0
        "dtype": _TYPES.get(tensor.Type(), f"type_{tensor.Type()}"),
        "scale": float(quantization.Scale(0)) if quantized else None,
        "zero_point": int(quantization.ZeroPoint(0)) if quantized and quantization.ZeroPointLength() else None,
    }


def _signature(signature: Any) -> dict[str, Any]:
    return {
        "key": _text(signature.SignatureKey()),
        "inputs": [_text(signature.Inputs(index).Name()) for index in range(signature.InputsLength())],
        "outputs": [_text(signature.Outputs(index).Name()) for index in range(signature.OutputsLength())],
    }


def _weights(model: Any, subgraphs: list[Any]) -> tuple[dict[str, int], int]:
    """Bytes of constant data by dtype, each buffer once, and the number of parameters in it."""
    bytes_by_type: dict[str, int] = {}
    parameters = 0
    seen: set[int] = set()
    for graph in subgraphs:
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            buffer = model.Buffers(tensor.Buffer())
            size = buffer.DataLength() or buffer.Size()  # data of files above 2 GB lies behind the flatbuffer
            if size == 0 or tensor.Buffer() in seen:
                continue
            seen.add(tensor.Buffer())
            dtype = _TYPES.get(tensor.Type(), f"type_{tensor.Type()}")
            bytes_by_type[dtype] = bytes_by_type.get(dtype, 0) + size
            quantization = tensor.Quantization()
            quantized = quantization is not None and quantization.ScaleLength() > 0
            if quantized or "float" in dtype:
                parameters += int(np.prod(tensor.ShapeAsNumpy())) if tensor.ShapeLength() else 1
    return dict(sorted(bytes_by_type.items())), parameters
