"""Runs the benchmark as a person does, and what its errors look like."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.processes import ROOT
from tools.phone.emulated import EmulatedPhone

SECONDS = 300
_BAR = re.compile(r"(push|cool|load|measure|profile): ")  # a progress line


def command(graphs: Sequence[Path], output: Path, *flags: str) -> list[str]:
    """`python -m tflite.benchmark --device=adb` with few short rounds and no profile."""
    return [
        *(sys.executable, "-m", "tflite.benchmark", "--device=adb"),
        *("--runs=4", "--runs_per_round=2", "--warmup=1", "--noprofile"),
        f"--graph={','.join(map(str, graphs))}",
        f"--output_dir={output}",
        *flags,
    ]


def environment(phone: EmulatedPhone, home: Path) -> dict[str, str]:
    """The phone's, with an empty home directory."""
    return phone.environment | {"HOME": str(home), "TF_CPP_MIN_LOG_LEVEL": "3", "MPLBACKEND": "Agg"}


def run(
    phone: EmulatedPhone, graphs: Sequence[Path], directory: Path, *flags: str, cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    """Runs the benchmark to its end; results go to directory/out."""
    return subprocess.run(
        command(graphs, directory / "out", *flags),
        cwd=cwd,
        env=environment(phone, directory) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def start(phone: EmulatedPhone, graphs: Sequence[Path], directory: Path, *flags: str) -> "subprocess.Popen[str]":
    """Starts the benchmark; its end is the caller's."""
    return subprocess.Popen(
        command(graphs, directory / "out", *flags),
        cwd=ROOT,
        env=environment(phone, directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def failure(benchmark: "subprocess.Popen[str]") -> str:
    """Waits for its end; the message, after checking that it failed, printed no figure, and said nothing else."""
    stdout, stderr = benchmark.communicate(timeout=SECONDS)
    assert benchmark.returncode == 1
    assert stdout == ""
    return error(stderr)


def lines(text: str) -> list[str]:
    """What a person reads: without the progress lines that were overwritten."""
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip() and not _BAR.match(line)]


def error(stderr: str) -> str:
    """The message, after checking that it is the only line."""
    (line,) = lines(stderr)
    assert line.startswith("error: "), stderr
    return line.removeprefix("error: ")
