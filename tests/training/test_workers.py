"""Two processes on this machine compute what one computes, and lose nothing when one of them is killed."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mobiatt_tf import training
from mobiatt_tf.errors import UserError
from tests.training import small

WHOLE = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'


def start_workers(action: str, directories: list[Path]) -> list[subprocess.Popen[str]]:
    """One process for each directory, as workers of one cluster on 127.0.0.1."""
    sockets = [socket.socket() for _ in directories]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for index, directory in enumerate(directories):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        processes.append(small.start(action, directory, {"TF_CONFIG": json.dumps(config)}))
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and standard error of each process."""
    try:
        return [
            (process.returncode, errors) for process in processes for _, errors in [process.communicate(timeout=240)]
        ]
    finally:
        for process in processes:
            process.kill()


def run_together(action: str, directory: Path) -> Path:
    """An action of two workers to its end."""
    for status, errors in finish(start_workers(action, [directory, directory])):
        assert status == 0, errors
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of "workers" in one process."""
    directory = tmp_path_factory.mktemp("alone")
    ((status, errors),) = finish([small.start("alone", directory)])
    assert status == 0, errors
    return directory


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two workers."""
    return run_together("workers", tmp_path_factory.mktemp("together"))


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one_process(alone: Path, together: Path) -> None:
    one, two = small.losses(alone), small.losses(together)
    assert len(one) == 20
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, atol=1e-5)
    first, second = (json.loads((directory / "results.json").read_text()) for directory in (alone, together))
    assert (first["devices"], second["devices"]) == (1, 2)
    assert second["images"] == first["images"] == 23  # batches of 16: the last one does not fill its batch
    assert second["confusion_matrix"] == first["confusion_matrix"]
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)


@pytest.mark.slow
def test_the_chief_alone_writes(together: Path) -> None:
    lines = small.read_lines(together)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 21))
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [1, 2]
    assert len(list((together / "tensorboard").glob("events*"))) == 1
    assert not list(together.rglob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_run_goes_on_after_a_worker_was_killed(tmp_path: Path, long_together: Path, victim: int) -> None:
    processes = start_workers("long_workers", [tmp_path, tmp_path])
    small.wait_for_step(processes[0], tmp_path, 49, seconds=180)
    processes[victim].send_signal(signal.SIGKILL)
    ended = finish(processes)
    assert ended[victim][0] == -signal.SIGKILL
    status, errors = ended[1 - victim]
    assert status != 0
    print(status, errors)
    assert "lost another worker" in errors
    assert "Start all of them again" in errors
    run_together("long_workers", tmp_path)
    small.assert_same_run(tmp_path, long_together)


@pytest.fixture(scope="module")
def long_together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run of two workers that nobody stops."""
    return run_together("long_workers", tmp_path_factory.mktemp("long"))


@pytest.mark.slow
def test_both_stop_when_one_is_told_to(tmp_path: Path, long_together: Path) -> None:
    processes = start_workers("long_workers", [tmp_path, tmp_path])
    small.wait_for_step(processes[0], tmp_path, 49, seconds=180)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for status, _ in ended] == [143, 143], ended
    saved = {errors.split("saved at step ")[1].split()[0] for _, errors in ended}
    assert len(saved) == 1
    assert (tmp_path / "checkpoints" / f"step_{int(saved.pop()):09d}.json").exists()
    run_together("long_workers", tmp_path)
    small.assert_same_run(tmp_path, long_together)


@pytest.mark.slow
def test_workers_with_directories_of_their_own_are_refused(tmp_path: Path, long_together: Path) -> None:
    """One of them finds a checkpoint that the other does not see."""
    directories = [tmp_path / "first", tmp_path / "second"]
    os.symlink(long_together, directories[0])
    for status, errors in finish(start_workers("long_workers", directories)):
        assert status == 1
        assert "must lie on a disk that all of them share" in errors


@pytest.mark.slow
def test_workers_with_other_settings_are_refused(tmp_path: Path) -> None:
    processes = start_workers("workers_by_index", [tmp_path, tmp_path])
    for status, errors in finish(processes):
        assert status == 1
        assert "Worker 1 and worker 0 differ in recipe, dataset or model" in errors
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ('{"cluster": {}}', "KeyError: 'task'"),
        (WHOLE.replace('"index": 0', '"index": 2'), "IndexError"),
        (WHOLE.replace('"type": "worker"', '"type": "chief"'), "KeyError: 'chief'"),
        (WHOLE.replace('"index": 0', '"index": -1'), "allowed are workers"),
        (WHOLE.replace('"worker": [', '"ps": ["c:1"], "worker": ['), "allowed are workers"),
        ("[1]", "TypeError"),
    ],
)
def test_a_wrong_tf_config_is_named(monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=problem):
        training.make_strategy("multi_worker")


def test_nobody_says_who_the_workers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TF_CONFIG", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set TF_CONFIG to"):
        training.make_strategy("multi_worker")


def test_slurm_without_its_variables_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="Start them with srun"):
        training.make_strategy("multi_worker")


def test_slurm_describes_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tasks on two nodes, as srun sets the variables of its steps."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    from mobiatt_tf.training.strategy import cluster_resolver

    resolver = cluster_resolver()
    workers = resolver.cluster_spec().as_dict()["worker"]
    assert workers[0] == "node3:18888"
    assert workers[5] == "node4:18889"
    assert (resolver.task_type, resolver.task_id, len(workers)) == ("worker", 5, 8)


def test_a_tpu_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"There is no TPU 'local' .*tensorflow-tpu"):
        training.make_strategy("tpu")
