"""Reads a saved .mlpackage: the protobuf and the weight file, and nothing that coremltools keeps in memory.

Formats: mlmodel/format/MIL.proto and mlmodel/src/MILBlob/Blob/StorageFormat.hpp of github.com/apple/coremltools.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coreml.tools import coremltools
from mobiatt_tf.errors import UserError, first_line

MANIFEST = Path("Manifest.json")
PROGRAM = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")

# Keys of the user-defined metadata that export writes.
LAYERS_KEY, CHECKSUMS_KEY = "mobiatt.layers", "mobiatt.checksums"
TASK_KEY, CLASSES_KEY = "mobiatt.task", "mobiatt.classes"

# What reading a file with flipped bits may raise, at any place.
DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, MemoryError, StopIteration, struct.error)

_BLOB_SENTINEL = 0xDEADBEEF
_BLOB_HEADER = struct.Struct("<IIQQ")  # sentinel, type, bytes, offset of the data

# By the names of MIL.proto's enum DataType.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "STRING": np.str_,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
}


@dataclass(frozen=True)
class TensorType:
    """A declared type; `shape` is None for what is no tensor, and has None where a side is open."""

    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def numpy_dtype(self) -> Any:
        """The NumPy type, or None for what is no tensor."""
        return _DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Reference:
    """An argument that names the result of another operation."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One operation of the main block.

    Attributes:
        type: as in "conv".
        name: of its first result.
        arguments: by parameter, inputs and attributes alike: a `Reference`, an array, or a tuple of those.
        outputs: name and declared type of each result.
    """

    type: str
    name: str
    arguments: dict[str, Any]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True)
class Package:
    """A saved program.

    Attributes:
        path: the .mlpackage directory.
        specification_version: 6 for iOS 15, 7 for 16, 8 for 17, 9 for 18.
        inputs: name and declared type; an image is [1, 3, height, width].
        image_input: whether the first input is an RGB image.
        operations: in the order in which they run.
        outputs: names of the results.
        metadata: the user-defined entries.
        size_bytes: of the protobuf and the weights.
    """

    path: Path
    specification_version: int
    inputs: dict[str, TensorType]
    image_input: bool
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    size_bytes: int

    @property
    def operator_count(self) -> int:
        """How many operators compute something, weights and labels not counted."""
        return sum(operation.type not in ("const", "classify") for operation in self.operations)


def read(path: str | Path) -> Package:
    """Reads a package and every weight in it.

    Raises:
        UserError: it is missing, truncated or not an ML program, or its weight file is missing or too short.
    """
    path = Path(path)
    specification = read_specification(path)
    if specification.WhichOneof("Type") != "mlProgram":
        raise UserError(f"{path} is not an ML program. Neural networks of before iOS 15 cannot be verified here.")
    _check_manifest(path)
    try:
        found = _package(path, specification)
        _check_description(specification.description, found)
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}, {first_line(error)}. Export it again.") from error
    return found


def _package(path: Path, specification: Any) -> Package:
    if "main" not in specification.mlProgram.functions:
        raise UserError(f"{path} is damaged: it has no function called main. Export it again.")
    function = specification.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    weights = _Weights(path)
    description = specification.description
    return Package(
        path,
        specification.specificationVersion,
        {value.name: _type(value.type) for value in function.inputs},
        any(feature.type.WhichOneof("Type") == "imageType" for feature in description.input),
        tuple(_operation(proto, weights) for proto in block.operations),
        tuple(block.outputs),
        dict(description.metadata.userDefined),
        sum(file.stat().st_size for file in (path / PROGRAM, path / WEIGHTS) if file.is_file()),
    )


def _check_manifest(path: Path) -> None:
    """Core ML finds the parts of a package through its manifest."""
    try:
        items = json.loads((path / MANIFEST).read_text())["itemInfoEntries"].values()
        missing = [item["path"] for item in items if not (path / "Data" / item["path"]).exists()]
    except FileNotFoundError:
        raise UserError(f"{path} is not a whole Core ML package: {MANIFEST} is missing. Export it again.") from None
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {MANIFEST} cannot be read. Export it again.") from error
    if missing:
        raise UserError(f"{path} is not a whole Core ML package: {', '.join(missing)} is missing. Export it again.")


def _check_description(description: Any, found: Package) -> None:
    """What Core ML's caller is told must be what the program has.

    Raises:
        UserError: names, sizes or colours differ.
    """
    told, has = [feature.name for feature in description.input], list(found.inputs)
    outputs = sorted(feature.name for feature in description.output)
    if told != has or outputs != sorted(found.outputs):
        raise UserError(
            f"{found.path} is damaged: it describes the inputs {told} and the outputs {outputs}, but its program has "
            f"{has} and {sorted(found.outputs)}."
        )
    for feature in description.input:
        if feature.type.WhichOneof("Type") != "imageType":
            continue
        image = feature.type.imageType
        color = type(image).DESCRIPTOR.fields_by_name["colorSpace"].enum_type.values_by_number[image.colorSpace].name
        shape = found.inputs[feature.name].shape
        if color != "RGB" or shape != (1, 3, image.height, image.width):
            raise UserError(
                f"{found.path} is described for {color} images of {image.height} x {image.width}, but its program "
                f"takes {shape}: only RGB images of that size can be verified."
            )


def read_specification(path: Path) -> Any:
    """The `Model` protobuf of a package.

    Raises:
        UserError: it is missing or not a protobuf of a model.
    """
    coremltools()
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    file = path / PROGRAM
    if not path.is_dir():
        raise UserError(f"There is no package {path}. Give a directory that ends in .mlpackage.")
    if not file.is_file():
        raise UserError(f"{path} is not a whole Core ML package: {PROGRAM} is missing. Export it again.")
    specification = Model_pb2.Model()
    try:
        specification.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise UserError(f"{file} is truncated or is no Core ML model. Export it again.") from error
    if not specification.specificationVersion:
        raise UserError(f"{file} is empty or is no Core ML model. Export it again.")
    return specification


def checksums(package: Package) -> dict[str, str]:
    """CRC-32 of program and description without these sums, and of each weight by the name of its operation.

    `export` stores them in the package and `damage` compares: a flipped bit in the eighth digit of a weight is too
    small for any comparison of logits.
    """
    specification = read_specification(package.path)
    specification.description.metadata.userDefined.pop(CHECKSUMS_KEY, None)
    found = {"program": _crc(specification.SerializeToString(deterministic=True))}
    found.update({f"{name}/{parameter}": _crc(array.tobytes()) for name, parameter, array in weight_arrays(package)})
    return found


def damage(package: Package) -> str | None:
    """What differs from the checksums that export stored; None if nothing does, or if there are none."""
    stored = package.metadata.get(CHECKSUMS_KEY)
    if stored is None:
        return None
    try:
        expected = dict(json.loads(stored))
    except DAMAGE:
        return "its checksums cannot be read"
    actual = checksums(package)
    for name in sorted(expected.keys() | actual.keys(), key=lambda name: name == "program"):
        if expected.get(name) != actual.get(name):
            what = "the program or its description" if name == "program" else f"the weight {name.rsplit('/', 1)[0]}"
            return f"{what} is not what was exported (checksum {actual.get(name)} instead of {expected.get(name)})"
    return None


def _crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


class _Weights:
    """The weight file, one blob at a time."""

    def __init__(self, package: Path) -> None:
        self._directory = package / WEIGHTS.parent.parent
        self._package = package
        self._content: dict[str, bytes] = {}

    def blob(self, file_name: str, offset: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        content = self._read(file_name)
        header = content[offset : offset + _BLOB_HEADER.size]
        if len(header) < _BLOB_HEADER.size:
            raise UserError(self._truncated(file_name, len(content)))
        sentinel, _, size, start = _BLOB_HEADER.unpack(header)
        if sentinel != _BLOB_SENTINEL:
            raise UserError(f"{self._package} is damaged: there is no weight at byte {offset} of {file_name}.")
        data = content[start : start + size]
        if len(data) < size:
            raise UserError(self._truncated(file_name, len(content)))
        return np.frombuffer(data, dtype).reshape(shape)

    def _read(self, file_name: str) -> bytes:
        if file_name not in self._content:
            file = self._directory / file_name.removeprefix("@model_path/")
            if not file.is_file():
                raise UserError(f"{self._package} has lost its weights: {file.name} is missing. Export it again.")
            self._content[file_name] = file.read_bytes()
        return self._content[file_name]

    def _truncated(self, file_name: str, size: int) -> str:
        return f"{self._package} is truncated: {Path(file_name).name} ends after {size} bytes. Export it again."


def _operation(proto: Any, weights: _Weights) -> Operation:
    arguments: dict[str, Any] = {}
    for name, argument in proto.inputs.items():
        parts = [
            Reference(binding.name) if binding.WhichOneof("binding") == "name" else _value(binding.value, weights)
            for binding in argument.arguments
        ]
        arguments[name] = parts[0] if len(parts) == 1 else tuple(parts)
    for name, value in proto.attributes.items():
        if name != "name":  # coremltools renames operators, results keep the names that they were given
            arguments[name] = _value(value, weights)
    return Operation(
        proto.type, proto.outputs[0].name, arguments, tuple((out.name, _type(out.type)) for out in proto.outputs)
    )


def _type(proto: Any) -> TensorType:
    if proto.WhichOneof("type") != "tensorType":
        return TensorType(str(proto.WhichOneof("type")), None)
    tensor = proto.tensorType
    names = type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    sides = (dim.constant.size if dim.WhichOneof("dimension") == "constant" else None for dim in tensor.dimensions)
    return TensorType(names[tensor.dataType].name, tuple(sides))


def _value(proto: Any, weights: _Weights) -> Any:
    declared = _type(proto.type)
    shape = tuple(side or 0 for side in declared.shape or ())
    if proto.WhichOneof("value") == "blobFileValue":
        blob = proto.blobFileValue
        return weights.blob(blob.fileName, blob.offset, declared.numpy_dtype, shape)
    immediate = proto.immediateValue
    if immediate.WhichOneof("value") != "tensor":
        return tuple(_value(item, weights) for item in immediate.list.values)
    tensor = immediate.tensor
    kind = tensor.WhichOneof("value")
    if kind is None:
        return np.zeros(shape, declared.numpy_dtype)
    values = getattr(tensor, kind).values
    if kind == "strings":
        return values[0] if not shape else tuple(values)
    if kind == "bytes":  # float16 and the small integers
        return np.frombuffer(values, declared.numpy_dtype).reshape(shape)
    return np.array(list(values), declared.numpy_dtype).reshape(shape)


def weight_arrays(package: Package) -> Iterator[tuple[str, str, np.ndarray]]:
    """All arrays of more than one number that the program holds, after the names of their operation and parameter."""
    for operation in package.operations:
        for parameter, value in operation.arguments.items():
            if isinstance(value, np.ndarray) and value.size > 1:
                yield operation.name, parameter, value
