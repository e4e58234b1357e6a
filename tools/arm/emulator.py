"""Runs .tflite files in QEMU's emulation of an aarch64 processor and counts the instructions that are executed.

`setup.sh` prepares the toolchain, `infer.py` runs in the emulator, `count_instructions.c` counts; `count` is the whole.
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobiatt_tf.errors import UserError
from tflite.inspect import Description, describe

TOOLS = Path(__file__).resolve().parent
TOOLCHAIN = TOOLS.parents[1] / "runs" / "arm" / "toolchain"
CPU = "cortex-a76"  # two of the eight cores of a Pixel 6; setup.sh describes the same processor to XNNPACK
CLASSES = {  # as count_instructions.c names them
    "simd": "vector, floating point",
    "memory": "loads, stores",
    "branch": "branches, system",
    "integer": "integer",
    "other": "other",
}
SKIPPED = 2  # inferences: the first ones allocate and fill Python's caches
# Largest difference to this machine's outputs in float32 arithmetic, relative to max|output|. Measured: float32 5e-7;
# dynamic 9e-4, where a value between two int8 steps falls to the other side; float16 8e-3. int8 outputs are equal.
DIFFERENCES = {"float32": 1e-5, "dynamic": 5e-3, "float16": 3e-2, "int8": 0.0}
_FLOAT16_KEY, _FLOAT16_VALUE = "reduced_precision_support", "fp16accfp16"  # tflite/tools/optimize of LiteRT
_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Count:
    """One graph: nodes of the file, instructions executed per inference by class, or LiteRT's reason not to run it."""

    nodes: int
    classes: dict[str, int] | None = None
    error: str | None = None

    @property
    def instructions(self) -> int | None:
        """Instructions executed per inference; None where it does not run."""
        return None if self.classes is None else sum(self.classes.values())


def with_float16(content: bytes, allowed: bool = True) -> bytes:
    """A verified .tflite file with, or without, the mark that lets XNNPACK replace float32 by float16 arithmetic.

    It does so on processors with the instructions for it (FEAT_FP16: every Cortex-A since the A55 and A75), for inputs,
    outputs and weights of either type. LiteRT then refuses a graph that holds an operator without a float16 kernel.
    """
    from ai_edge_litert import schema_py_generated as schema

    from tflite.float_ops import packed

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    model.metadata = [entry for entry in model.metadata or [] if entry.name != _FLOAT16_KEY.encode()]
    if allowed:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(_FLOAT16_VALUE.encode(), np.uint8)
        entry = schema.MetadataT()
        entry.name, entry.buffer = _FLOAT16_KEY, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    return packed(model)


def allows_float16(content: bytes) -> bool:
    """Whether a verified .tflite file has the mark of `with_float16`."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    entries = [model.Metadata(index) for index in range(model.MetadataLength())]
    values = [model.Buffers(entry.Buffer()) for entry in entries if entry.Name() == _FLOAT16_KEY.encode()]
    return any(value.DataLength() and value.DataAsNumpy().tobytes() == _FLOAT16_VALUE.encode() for value in values)


def arithmetic(content: bytes, description: Description) -> str:
    """A key of `DIFFERENCES`: what a file is computed in."""
    if description.outputs[0].dtype != "float32":
        return "int8"
    if "int8" in description.weight_bytes:
        return "dynamic"
    return "float16" if allows_float16(content) else "float32"


def random_input(description: Description, seed: int = 0) -> np.ndarray:
    """Standard normal float32, or any int8, in the shape of the only input.

    Raises:
        UserError: there are more inputs, or outputs, the shape is not fixed, or the type is another.
    """
    first = description.inputs[0] if len(description.inputs) == len(description.outputs) == 1 else None
    if first is None or min(first.shape, default=0) < 1 or first.dtype not in ("float32", "int8"):
        raise UserError(
            f"{description.path} cannot be counted: that takes one input of a fixed shape, float32 or int8, and one "
            "output. Export it with tflite.export."
        )
    generator = np.random.default_rng(seed)
    if first.dtype == "int8":
        return generator.integers(-128, 128, first.shape, dtype=np.int8)
    return generator.standard_normal(first.shape, dtype=np.float32)


def parse(text: str, skipped: int, inferences: int) -> dict[str, int]:
    """Instructions executed per inference by class, from what count_instructions.c wrote.

    Args:
        text: one line of JSON per mark, cumulative; the first mark stands before the first inference.
        skipped: inferences to leave out.
        inferences: how many follow; the median of each class is taken over them.

    Raises:
        ValueError: the marks are not those of so many inferences.
    """
    marks = [json.loads(line) for line in text.splitlines()]
    if [mark["mark"] for mark in marks] != list(range(skipped + inferences + 1)):
        raise ValueError(f"{len(marks)} marks for {skipped} + {inferences} inferences: {text[:200]!r}")
    pairs = list(itertools.pairwise(marks[skipped:]))
    return {name: int(statistics.median_low(after[name] - before[name] for before, after in pairs)) for name in CLASSES}


def count(path: Path, inferences: int, toolchain: Path = TOOLCHAIN) -> Count:
    """Runs one file in the emulator and on this machine.

    Args:
        path: a .tflite file with one input and one output.
        inferences: how many are counted, after `SKIPPED` others.
        toolchain: what tools/arm/setup.sh prepared.

    Raises:
        UserError: the file or the toolchain cannot be used, or the emulated outputs are not this machine's.
    """
    description = describe(path)
    content = path.read_bytes()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        np.save(directory / "input.npy", random_input(description))
        (directory / "model.tflite").write_bytes(content)
        (directory / "float32.tflite").write_bytes(with_float16(content, allowed=False))
        root = str(toolchain / "root")
        plugin = f"{toolchain / 'count_instructions.so'},counts={directory / 'counts.jsonl'}"
        error = _infer(
            [
                *f"qemu-aarch64 -seed 1 -cpu {CPU} -plugin".split(),
                plugin,
                "-L",
                root,
                f"{root}/usr/bin/python3.11",
                "-sS",
            ],
            ["model.tflite", "input.npy", "emulated.npy", str(SKIPPED + inferences)],
            directory,
            # Nothing of the caller's environment: the hash seed and the size of the stack move the count.
            {"PYTHONPATH": str(toolchain / "site"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        if error:
            return Count(description.nodes, error=error)
        error = _infer([sys.executable], ["float32.tflite", "input.npy", "native.npy", "1"], directory, None)
        if error:
            raise UserError(f"{path} does not run on this machine: {error}")
        emulated, native = (np.load(directory / f"{name}.npy") for name in ("emulated", "native"))
        if problem := difference(emulated, native, arithmetic(content, description)):
            raise UserError(f"{path}: the emulated {problem}.")
        return Count(description.nodes, parse((directory / "counts.jsonl").read_text(), SKIPPED, inferences))


def _infer(command: list[str], arguments: list[str], directory: Path, environment: dict[str, str] | None) -> str | None:
    """Runs tools/arm/infer.py; LiteRT's reason if it refuses the file, else None."""
    try:
        done = subprocess.run(
            [*command, str(TOOLS / "infer.py"), *arguments],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        raise UserError(f"There is no {command[0]}. Run tools/arm/setup.sh.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{arguments[0]} did not end within {_TIMEOUT_SECONDS} s. Count a smaller graph.") from None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode and not last.startswith("RuntimeError: "):
        raise UserError(f"{command[0]} ended with status {done.returncode}: {last}")
    return last.removeprefix("RuntimeError: ") if done.returncode else None


def difference(emulated: np.ndarray, native: np.ndarray, arithmetic: str) -> str | None:
    """What is wrong with the emulated output, beside the one computed in float32 here; None if nothing is."""
    largest = float(np.abs(native.astype("float64")).max())
    found = float(np.abs(emulated.astype("float64") - native).max()) / (largest or 1.0)
    if not found <= DIFFERENCES[arithmetic]:  # a NaN is too large, too
        return f"output differs from this machine's by {found:.1e} of max|output|; {DIFFERENCES[arithmetic]} is allowed"
    if arithmetic == "float16" and found <= DIFFERENCES["float32"]:
        return "output is that of float32 arithmetic, though the file asks for float16"
    return None


def environment(toolchain: Path = TOOLCHAIN) -> dict[str, str]:
    """What the counts follow from beside the graphs.

    Raises:
        UserError: the toolchain is not there.
    """
    if not (toolchain / "stamp").is_file():
        raise UserError(f"{toolchain} is not there or not whole. Run tools/arm/setup.sh.")
    try:
        line = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError("There is no qemu-aarch64. Run tools/arm/setup.sh.") from None
    litert = next(toolchain.glob("site/ai_edge_litert-*.dist-info")).name
    return {
        "cpu": CPU,
        "qemu": line.splitlines()[0].removeprefix("qemu-aarch64 version "),
        "ai_edge_litert": litert.removeprefix("ai_edge_litert-").removesuffix(".dist-info"),
    }


def other_environment(found: dict[str, str], baseline: dict[str, str]) -> str | None:
    """Why counts cannot be compared, or None. Of QEMU, bug-fix releases (7.2.x) do not count as another version."""

    def relevant(values: dict[str, str]) -> dict[str, str]:
        return values | {"qemu": ".".join(re.findall(r"\d+", values["qemu"])[:2])}

    here, there = relevant(found), relevant(baseline)
    different = [f"{name} {here[name]}, not {there[name]}" for name in here if here[name] != there[name]]
    if not different:
        return None
    return f"The counts cannot be compared with the baseline's: this is {'; '.join(different)}. Rewrite it: --update."
