"""A run that is killed or stopped goes on as if nothing had happened: real processes, real signals."""

import signal
from pathlib import Path

import pytest

from tests.training import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    process = small.start("long", directory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return directory


def send_in_mid_epoch(directory: Path, number: signal.Signals) -> tuple[int, str]:
    """Sends the signal when the log has passed step 600 (in the third of four epochs); returns status and errors."""
    process = small.start("long", directory)
    small.wait_for_step(process, directory, 602)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_killed_run_resumes_bit_by_bit(whole_run: Path, tmp_path: Path) -> None:
    status, _ = send_in_mid_epoch(tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    steps = [line["step"] for line in small.read_lines(tmp_path) if line["kind"] == "train"]
    assert 602 <= steps[-1] < 1000
    process = small.start("long", tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert int(errors.split("Going on after step ")[1].split()[0]) >= 600
    small.assert_same_run(tmp_path, whole_run)


def test_terminated_run_saves_and_resumes_bit_by_bit(whole_run: Path, tmp_path: Path) -> None:
    status, errors = send_in_mid_epoch(tmp_path, signal.SIGTERM)
    assert status == 143
    assert "SIGTERM: saved at step" in errors
    assert "same command" in errors
    saved = int(errors.split("saved at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / f"step_{saved:09d}.json").exists()
    process = small.start("long", tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"Going on after step {saved} " in errors
    small.assert_same_run(tmp_path, whole_run)
