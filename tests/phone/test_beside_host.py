"""A phone's figures beside this computer's, and an earlier result beside both."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.phone import commands
from tools.phone.emulated import EmulatedPhone

Model = Callable[[str], Path]


def test_this_computer_and_an_earlier_result_stand_beside_the_phone(
    phone: EmulatedPhone, model: Model, tmp_path: Path
) -> None:
    binary = f"--benchmark_binary={phone.benchmark_model(tmp_path / 'benchmark_model')}"
    assert commands.run(phone, [model("dense")], tmp_path, binary).returncode == 0
    earlier = (tmp_path / "out/benchmark.json").rename(tmp_path / "earlier.json")
    assert json.loads((tmp_path / "out/host.json").read_text())["device"]["kind"] == "host"
    done = commands.run(phone, [model("dense")], tmp_path, binary, f"--compare={earlier}")
    assert done.returncode == 0, done.stderr
    assert "adb beside host" in done.stdout
    assert "now beside earlier.json" in done.stdout
    assert "another" not in done.stdout  # the same phone and the same program
    alone = commands.run(phone, [model("dense")], tmp_path, binary, "--nobeside_host")
    assert alone.returncode == 0, alone.stderr
    assert not (tmp_path / "out/host.json").exists()  # an earlier run's would be taken for this one's


def test_ctrl_c_while_this_computer_is_measured(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = f"--benchmark_binary={phone.benchmark_model(tmp_path / 'benchmark_model')}"
    flags = ("--runs=1000000", "--runs_per_round=100000")
    with commands.start(phone, [model("dense")], tmp_path, binary, *flags) as benchmark:
        deadline = time.monotonic() + commands.SECONDS
        while not (tmp_path / "out/benchmark.png").exists():
            assert benchmark.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        assert benchmark.poll() is None
        benchmark.send_signal(signal.SIGINT)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 130
    assert commands.lines(stderr) == ["interrupted"]
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["interrupted"] is False
    if (tmp_path / "out/host.json").exists():
        assert json.loads((tmp_path / "out/host.json").read_text())["interrupted"] is True
