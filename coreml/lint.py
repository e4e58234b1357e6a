"""What is known to leave or to slow the Neural Engine of an iPhone 12 (A14), found in a saved package without a Mac.

Apple documents little of the Neural Engine. Every rule says where it comes from and how sure it is; the schedule of a
real phone (Xcode's performance report, or coreml.device on a Mac) has the last word.

Example:
    python -m coreml.lint runs/model.mlpackage
"""

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from coreml import package
from coreml.package import Operation, Package, Reference
from mobiatt_tf import cli, files

_Shape = tuple[int | None, ...] | None

_ANE_TRANSFORMERS = "Apple, Deploying Transformers on the Apple Neural Engine (2022) and apple/ml-ane-transformers"
_HOLLEMANS = "hollance/neural-engine, docs/unsupported-layers.md, which calls some of it guesses"
_COREMLTOOLS = "coremltools documentation, Typed Execution and Flexible Input Shapes"


class Rule(NamedTuple):
    """What is looked for, where it is known from, how sure that is."""

    text: str
    source: str
    certainty: str


RULES = {
    "rank": Rule("tensors of rank above 5 are refused by Core ML", "coremltools, MIL type inference", "certain"),
    "rank5": Rule("tensors of rank 5 leave the Neural Engine, which works on 4 axes", _ANE_TRANSFORMERS, "likely"),
    "transpose": Rule("transposes copy memory; the layout (B, C, 1, S) needs none", _ANE_TRANSFORMERS, "likely"),
    "tile": Rule("tile copies what broadcasting would not", "the definitions of MIL's operators", "assumed"),
    "reduction": Rule(
        "sums over 192 numbers or more lose digits in float16, if they are kept in it",
        "coreml.verify, mode float16",
        "assumed",
    ),
    "last_axis": Rule(
        "a last axis of 16 or less is padded to 64 bytes, 32 float16 numbers (from 64 kB on)",
        _ANE_TRANSFORMERS,
        "certain",
    ),
    "dynamic": Rule("open shapes keep a model off the Neural Engine", _COREMLTOOLS, "likely"),
    "float32": Rule("float32 operators run on CPU or GPU only", _COREMLTOOLS, "certain"),
    "unsupported": Rule(
        "gathers, dilated convolutions and recurrent layers were seen to leave it", _HOLLEMANS, "reported"
    ),
}

_UNSUPPORTED = {"gather", "gather_along_axis", "gather_nd", "gru", "lstm", "rnn"}
_REDUCTIONS = {"layer_norm": "axes", "reduce_mean": "axes", "reduce_sum": "axes", "softmax": "axis"}  # and their axes
_LONG_REDUCTION = 192
_ROW = 32  # float16 numbers in 64 bytes
_LARGE_BYTES = 1 << 16  # small tensors may be padded: nobody notices


@dataclass(frozen=True)
class Finding:
    """One rule, and the operators that it concerns."""

    rule: str
    text: str
    source: str
    certainty: str
    operators: tuple[str, ...]


def lint(found: Package) -> tuple[Finding, ...]:
    """The findings of every rule that concerns an operator of the package, in the order of `RULES`."""
    shapes = {name: declared.shape for op in found.operations for name, declared in op.outputs}
    shapes.update({name: declared.shape for name, declared in found.inputs.items()})
    constants = {op.outputs[0][0]: op.arguments["val"] for op in found.operations if op.type == "const"}
    steps = [op for op in found.operations if op.type != "const" and not op.type.startswith("constexpr")]
    by_rule: dict[str, list[str]] = collections.defaultdict(list)
    for operation in steps:
        for rule in _broken(operation, shapes, constants, found):
            by_rule[rule].append(operation.name)
    return tuple(Finding(name, *RULES[name], tuple(by_rule[name])) for name in RULES if name in by_rule)


def _broken(
    operation: Operation, shapes: dict[str, _Shape], constants: dict[str, Any], found: Package
) -> Iterable[str]:
    declared = operation.outputs[0][1]
    shape = declared.shape or ()
    if len(shape) > 5:
        yield "rank"
    if len(shape) == 5:
        yield "rank5"
    if None in shape:
        yield "dynamic"
    if operation.type == "transpose":
        yield "transpose"
    if operation.type == "tile":
        yield "tile"
    if operation.type in _UNSUPPORTED or _dilated(operation, constants):
        yield "unsupported"
    if declared.dtype == "FLOAT32" and operation.type not in ("cast", "classify") and not _is_end(operation, found):
        yield "float32"
    if operation.type in _REDUCTIONS and _summed(operation, shapes, constants) >= _LONG_REDUCTION:
        yield "reduction"
    if declared.dtype == "FLOAT16" and shape and 0 < (shape[-1] or 0) <= _ROW // 2:
        padded = 2 * _ROW * int(np.prod([side or 1 for side in shape[:-1]]))
        if padded >= _LARGE_BYTES:
            yield "last_axis"


def _dilated(operation: Operation, constants: dict[str, Any]) -> bool:
    rates = operation.arguments.get("dilations") if operation.type == "conv" else None
    rates = constants.get(rates.name) if isinstance(rates, Reference) else rates
    return rates is not None and bool(np.max(rates) > 1)


def _is_end(operation: Operation, found: Package) -> bool:
    """Whether an operator makes an output, or the probabilities that `classify` reads."""
    own = {name for name, _ in operation.outputs}
    labels = (op for op in found.operations if op.type == "classify")
    read = {value.name for op in labels for value in op.arguments.values() if isinstance(value, Reference)}
    return bool(own & ({*found.outputs} | read))


def _summed(operation: Operation, shapes: dict[str, _Shape], constants: dict[str, Any]) -> int:
    """How many numbers one result of a reduction sums."""
    source, axes = operation.arguments["x"], operation.arguments.get(_REDUCTIONS[operation.type])
    shape = shapes.get(source.name) if isinstance(source, Reference) else None
    if not shape:
        return 0
    if isinstance(axes, Reference):
        axes = constants.get(axes.name)
    indices = range(len(shape)) if axes is None else [int(axis) for axis in np.atleast_1d(axes)]
    return int(np.prod([shape[index] or 1 for index in indices]))


def format_table(findings: Sequence[Finding]) -> str:
    """The findings as text, a line each."""
    if not findings:
        return "Lint      nothing known to leave or slow the Neural Engine"
    lines = []
    for finding in findings:
        named = ", ".join(finding.operators[:3]) + (", ..." if len(finding.operators) > 3 else "")
        lines.append(
            f"Lint      {len(finding.operators)} x {finding.rule}: {finding.text} [{finding.certainty}; "
            f"{finding.source}] ({named})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints the findings of a package."""
    print(format_table(lint(package.read(files.user_path(argv[1])))))


if __name__ == "__main__":
    cli.run(main, ["PACKAGE"])
