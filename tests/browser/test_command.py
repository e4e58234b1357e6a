"""`python -m tflite.benchmark --device=browser` as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import LITERTJS, ROOT
from tests.browser.driving import open_page, start
from tflite import results

pytestmark = pytest.mark.slow


class Command:
    """`python -m tflite.benchmark --device=browser ...` as a user runs it."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "tflite.benchmark", "--device=browser", "--address=localhost", *arguments]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `end`)
        self.process = subprocess.Popen(
            [*command, f"--litertjs_dir={LITERTJS}", f"--output_dir={directory}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.errors = ""
        self.printed: list[str] = []

    def url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line.rstrip("\n"))
            if re.fullmatch(r"https?://localhost:\d+/[\w-]{22}/", self.printed[-1]):
                return self.printed[-1]
        raise AssertionError(self.end() + self.errors)

    def end(self) -> str:
        """Waits for the end and returns all that was printed."""
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.wait(120)
        self.process.stdout.close()
        self._errors.seek(0)
        self.errors = self._errors.read()
        self._errors.close()
        return "\n".join(self.printed) + "\n" + rest


def test_the_command(chrome: Any, serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    command = Command(tmp_path, f"--graph={graphs['float32']}", "--runs=10", "--nowebgpu")
    open_page(chrome, command.url())
    assert start(chrome).startswith("Done.")
    printed = command.end()
    assert command.process.returncode == 0, command.errors
    found = results.load(tmp_path / "benchmark.json")
    assert found.device["kind"] == "browser"
    assert len(found.measurements[0].latencies) == 10
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert "▄▄▄▄▄" in printed  # the QR code
    assert re.search(r"^([0-9A-F]{2}:){31}[0-9A-F]{2}$", printed, re.MULTILINE)  # the certificate's fingerprint
    assert "headless Chrome" in printed
    assert re.search(r"^float32 +WASM +1 +10 ", printed, re.MULTILINE)


def test_the_command_stays(chrome: Any, serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    """Two phones one after the other, each with files of its own, until Ctrl-C."""
    command = Command(
        tmp_path, f"--graph={graphs['float32']}", "--runs=4", "--nowebgpu", "--stay", "--nobeside_host", "--nohttps"
    )
    url = command.url()
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    for name in ("Phone\tone", f"Phone {family}"):
        open_page(chrome, url)
        chrome.execute_script("document.getElementById('name').value = arguments[0]", name)
        assert start(chrome) == "Done. The computer has the result."
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("phone-*/benchmark.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    command.process.send_signal(signal.SIGINT)
    command.end()
    assert command.process.returncode == 0, command.errors
    written = sorted(tmp_path.glob("phone-*/benchmark.json"))
    assert [results.load(file).device["name"] for file in written] == ["Phone \N{MAN} \N{WOMAN}", "Phone one"]
    assert results.load(tmp_path / "benchmark.json").device["name"] == "Phone \N{MAN} \N{WOMAN}"


def test_ctrl_c_before_a_phone_comes(serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    command = Command(tmp_path, f"--graph={graphs['float32']}")
    command.url()
    command.process.send_signal(signal.SIGINT)
    command.end()
    assert command.process.returncode == 130
    assert "interrupted" in command.errors
    assert not list(tmp_path.iterdir())


def test_litertjs_is_missing(graphs: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--device=browser", f"--graph={graphs['float32']}", f"--litertjs_dir={tmp_path}"]
    found = subprocess.run(
        [sys.executable, "-m", "tflite.benchmark", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 1
    assert f"error: LiteRT.js is not in {tmp_path}. Install it with tools/phone_page.sh" in found.stderr
