"""The peers' environments: each its own virtual environment under runs/peers, with pinned packages.

What is installed is in `requirements-NAME.txt` beside this file, every package at the version that was measured.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from mobiatt_tf import files
from mobiatt_tf.errors import UserError

DIRECTORY = Path(__file__).resolve().parent
_STAMP = "installed.txt"  # holds the requirements that were installed; written last, so that it means "whole"
_TIMEOUT_SECONDS = 3600
_ERROR = re.compile(r"ERROR: |[\w.]*(Error|Exception)(: |$)")


def requirements(name: str) -> Path:
    """The file that says what the environment `name` holds."""
    return DIRECTORY / f"requirements-{name}.txt"


def versions(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    """The pinned versions of some packages of an environment."""
    lines = [line.partition("==") for line in requirements(name).read_text().splitlines()]
    return {package: version for package, _, version in lines if package in packages}


def python_of(name: str, root: Path, required: Path | None = None) -> Path:
    """The interpreter of an environment, which is installed first unless it is whole already.

    Args:
        name: of the environment; its directory is `root / name`.
        root: where the environments are.
        required: the requirements; None: `requirements(name)`.

    Raises:
        UserError: the packages cannot be installed; says why and where the whole report is.
    """
    required = required or requirements(name)
    directory = root / name
    python = directory / "bin" / "python"
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}\n{required.read_text()}"
    stamp = directory / _STAMP
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)  # pip leaves packages that look whole when it is killed
    directory.mkdir(parents=True)
    print(f"installing {required.name} into {directory} (some minutes) ...", file=sys.stderr, flush=True)
    options = ["--disable-pip-version-check", "--no-input", "--requirement", str(required)]
    log = root / f"{name}.log"
    for command in ([sys.executable, "-m", "venv", str(directory)], [str(python), "-m", "pip", "install", *options]):
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(f"{required.name} was not installed within {_TIMEOUT_SECONDS} s.") from None
        report = (run.stdout + run.stderr).strip()
        if run.returncode:
            files.write_bytes(log, report.encode())
            raise UserError(f"{required.name} cannot be installed: {error_in(report)} (all of it: {log})")
    files.write_bytes(stamp, wanted.encode())
    return python


def error_in(report: str) -> str:
    """The line of a command's output that says what went wrong: pip's or Python's last error, else the last line."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["it says nothing"])[-1]
