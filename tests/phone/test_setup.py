"""tools/phone/setup.sh says in one line what is missing, before it changes anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


def setup(directory: Path, **variables: str) -> str:
    """The only line on standard error of a setup that fails."""
    done = subprocess.run(
        [shutil.which("sh") or "/bin/sh", str(ROOT / "tools/phone/setup.sh"), str(directory)],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_without_apt(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cat", "cksum", "dirname"):
        (programs / name).symlink_to(shutil.which(name) or name)
    assert "no apt-get here. Use Debian 12." in setup(tmp_path / "toolchain", PATH=str(programs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is looked for first")
def test_without_pip(toolchain: None, tmp_path: Path) -> None:
    assert "is not a Python with pip" in setup(tmp_path / "toolchain", PYTHON="/bin/false")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is looked for first")
def test_directory_with_other_things(toolchain: None, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "holds something else" in setup(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
