"""Describes a .tflite file: tensors, operators, weights, and what XNNPACK takes of it.

python -m tflite.inspect FILE [--json=PATH] [--num_threads=N]
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite.process import Worker

_IDENTIFIER = b"TFL3"  # bytes 4 to 8 of the flatbuffer, from schema.fbs
_TIMEOUT_SECONDS = 600  # a damaged file must not hold the caller for ever; whole models take seconds


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A model input or output. `shape` has -1 where the size is free; `scale` and `zero_point` are None in float."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclasses.dataclass(frozen=True)
class Signature:
    """A named entry point and the names of its inputs and outputs."""

    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a .tflite file holds and how the host's LiteRT runs it.

    Attributes:
        path: the file.
        sha256: its checksum, 64 hexadecimal digits.
        size_bytes: its size.
        inputs: tensors of the main subgraph, in the file's order.
        outputs: likewise.
        signatures: the named entry points.
        op_counts: operator name to count over all subgraphs, most frequent first.
        custom_ops: names of custom operators, without Flex.
        flex_ops: names of TensorFlow operators that need the Flex delegate.
        weight_bytes: constant data in bytes by dtype, each buffer once.
        parameters: elements of constant tensors that are floating point or quantized, scalars included.
        nodes: operators of the main subgraph.
        delegate_partitions: calls of the XNNPACK delegate per inference; None if the runtime lacks an operator.
        delegated_nodes: how many of `nodes` run inside them; None likewise.
        undelegated_ops: operator name to count of the nodes that do not; None likewise.
        undelegated_reason: why the three are None, else None.
        max_rank: the largest number of dimensions of any tensor.
    """

    path: str
    sha256: str
    size_bytes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    signatures: tuple[Signature, ...]
    op_counts: dict[str, int]
    custom_ops: tuple[str, ...]
    flex_ops: tuple[str, ...]
    weight_bytes: dict[str, int]
    parameters: int
    nodes: int
    delegate_partitions: int | None
    delegated_nodes: int | None
    undelegated_ops: dict[str, int] | None
    undelegated_reason: str | None
    max_rank: int


def describe(path: str | os.PathLike[str], num_threads: int = 1) -> Description:
    """Describes a model. The file is read in a process of its own, so a damaged one cannot end this process.

    Args:
        path: a .tflite file.
        num_threads: threads the delegate is prepared with; it does not change the counts.

    Raises:
        UserError: the file is missing, empty, truncated, damaged or not TensorFlow Lite.
        ValueError: `num_threads` is not positive.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1.")
    path = Path(path)
    size = check_file(path)
    with Worker(f"{path} cannot be used as a TensorFlow Lite model") as worker:
        value: dict[str, Any] = worker.request(
            "describe", timeout_seconds=_TIMEOUT_SECONDS, path=str(path.absolute()), num_threads=num_threads
        )
    delegation = value["delegation"] or {}
    return Description(
        path=str(path),
        sha256=files.sha256(path),
        size_bytes=size,
        inputs=tuple(_tensor(tensor) for tensor in value["inputs"]),
        outputs=tuple(_tensor(tensor) for tensor in value["outputs"]),
        signatures=tuple(
            Signature(entry["key"], tuple(entry["inputs"]), tuple(entry["outputs"])) for entry in value["signatures"]
        ),
        op_counts=value["op_counts"],
        custom_ops=tuple(value["custom_ops"]),
        flex_ops=tuple(value["flex_ops"]),
        weight_bytes=value["weight_bytes"],
        parameters=value["parameters"],
        nodes=value["nodes"],
        delegate_partitions=delegation.get("partitions"),
        delegated_nodes=delegation.get("delegated_nodes"),
        undelegated_ops=delegation.get("undelegated_ops"),
        undelegated_reason=value["undelegated_reason"],
        max_rank=value["max_rank"],
    )


def check_file(path: Path) -> int:
    """The size in bytes of what looks like a .tflite file.

    Raises:
        UserError: it is missing, unreadable, empty, or does not carry the TFL3 identifier.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"There is no file {path}. Export a model first, or check the name.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if size == 0:
        raise UserError(f"{path} is empty. Export the model again.")
    if head[4:] != _IDENTIFIER:
        raise UserError(f"{path} is not a TensorFlow Lite file: it lacks the identifier TFL3.")
    return size


def to_json(description: Description) -> dict[str, Any]:
    """The description as plain values, ready for `json.dumps`."""
    return dataclasses.asdict(description)


def format_table(description: Description) -> str:
    """The description as fixed-width text."""
    weights = ", ".join(f"{dtype} {count:,}" for dtype, count in description.weight_bytes.items())
    lines = [
        f"file        {description.path}",
        f"size        {description.size_bytes:,} bytes; constants in bytes: {weights or 'none'}",
        f"parameters  {description.parameters:,}",
        *(f"input       {_format_tensor(tensor)}" for tensor in description.inputs),
        *(f"output      {_format_tensor(tensor)}" for tensor in description.outputs),
        *(
            f"signature   {entry.key}({', '.join(entry.inputs)}) -> {', '.join(entry.outputs)}"
            for entry in description.signatures
        ),
        f"max rank    {description.max_rank}",
        f"custom ops  {', '.join(description.custom_ops) or 'none'}",
        f"flex ops    {', '.join(description.flex_ops) or 'none'}",
        f"nodes       {description.nodes} in the main subgraph; {format_delegation(description)}",
    ]
    undelegated = description.undelegated_ops or {}
    lines += ["", f"{'operator':<28}{'count':>7}{'not delegated':>16}"]
    lines += [f"{name:<28}{count:>7}{undelegated.get(name, 0):>16}" for name, count in description.op_counts.items()]
    return "\n".join(lines)


def format_delegation(description: Description) -> str:
    """One phrase on what XNNPACK takes."""
    if description.delegate_partitions is None:
        return f"delegation unknown: {description.undelegated_reason}"
    return f"{description.delegated_nodes} delegated to XNNPACK in {description.delegate_partitions} partition(s)"


def _tensor(value: Mapping[str, Any]) -> Tensor:
    return Tensor(value["name"], tuple(value["shape"]), value["dtype"], value["scale"], value["zero_point"])


def _format_tensor(tensor: Tensor) -> str:
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    quantization = "" if tensor.scale is None else f", scale {tensor.scale:.6g}, zero point {tensor.zero_point}"
    return f"{tensor.name}: {shape} {tensor.dtype}{quantization}"


def define_flags() -> None:
    """The command line's flags; a function, because several commands share their names."""
    flags.DEFINE_string("json", None, "Also write the description to this file as JSON.")
    flags.DEFINE_integer("num_threads", 1, "Threads the delegate is prepared with.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    description = describe(files.user_path(argv[1]), flags.FLAGS.num_threads)
    if flags.FLAGS.json:
        files.write_json(files.user_path(flags.FLAGS.json), to_json(description))
    print(format_table(description))


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=("FILE",))
