"""What goes wrong with a phone, caused for real: one clear line, a status that is not 0, nothing left on the phone."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.phone import commands
from tflite.adb.client import Adb, LostPhoneError
from tflite.adb.storage import PhoneStorage
from tools.phone.emulated import EmulatedPhone

Model = Callable[[str], Path]
_LAST = 2  # of the starts of benchmark_model: one that loads, two rounds


@pytest.fixture
def binary(phone: EmulatedPhone, tmp_path: Path) -> str:
    """The flag for the stand-in for benchmark_model."""
    return f"--benchmark_binary={phone.benchmark_model(tmp_path / 'benchmark_model')}"


def run(phone: EmulatedPhone, graph: Path, directory: Path, *flags: str) -> str:
    """The error of a benchmark that fails, after checking that it quoted nothing and left nothing but the cache."""
    done = commands.run(phone, [graph], directory, *flags)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    check_tidy(phone, directory)
    return commands.error(done.stderr)


def check_tidy(phone: EmulatedPhone, directory: Path) -> None:
    assert phone.processes() == []
    assert [name for name in phone.files() if not name.startswith("mobiatt/cache/")] in (
        [],
        ["mobiatt", "mobiatt/cache"],
    )
    assert not (directory / "out").exists()


def start_and_hold(
    phone: EmulatedPhone, graph: Path, directory: Path, *flags: str, after: int = 0
) -> "subprocess.Popen[str]":
    """A benchmark whose benchmark_model waits in the middle of its work on the phone."""
    phone.hold(after)
    benchmark = commands.start(phone, [graph], directory, *flags)
    try:
        phone.wait_until_held()
        assert phone.processes()
    except BaseException:
        benchmark.kill()
        benchmark.communicate()
        raise
    return benchmark


def test_no_phone(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.unplug()
    assert run(phone, model("dense"), tmp_path, binary).startswith("No phone is connected.")


def test_wrong_serial(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    message = run(phone, model("dense"), tmp_path, binary, "--serial=R5CT900ABCD")
    assert "R5CT900ABCD" in message
    assert phone.serials[0] in message


def test_several_phones(toolchain: None, model: Model, tmp_path: Path) -> None:
    with EmulatedPhone("x86_64", phones=2) as phone:
        message = run(phone, model("dense"), tmp_path)
    assert message.startswith("2 phones are connected")
    assert all(text in message for text in (*phone.serials, "--serial="))


def test_unauthorized(toolchain: None, model: Model, tmp_path: Path) -> None:
    with EmulatedPhone("x86_64", authorized=False) as phone:
        message = run(phone, model("dense"), tmp_path)
    assert "unauthorized" in message
    assert "Allow USB debugging" in message


def test_offline(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.kill_adbd()
    assert "offline" in run(phone, model("dense"), tmp_path, binary)


def test_no_adb(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.environment["PATH"] = str(tmp_path)
    done = commands.run(phone, [model("dense")], tmp_path, binary)
    assert done.returncode == 1
    assert commands.error(done.stderr).startswith("The program adb is not on PATH.")


@pytest.mark.parametrize("flags", [[], ["--benchmark_binary=no/such/file"]])
def test_no_benchmark_model(phone: EmulatedPhone, model: Model, flags: list[str], tmp_path: Path) -> None:
    message = run(phone, model("dense"), tmp_path, *flags)
    assert "--benchmark_binary" in message
    assert "Build it" in message  # where to get it
    assert phone.files() == []


def test_wrong_abi(phone: EmulatedPhone, model: Model, toolchain: None, tmp_path: Path) -> None:
    binary = EmulatedPhone("arm64-v8a").benchmark_model(tmp_path / "for_arm")
    message = run(phone, model("dense"), tmp_path, f"--benchmark_binary={binary}")
    assert "is built for arm64-v8a" in message
    assert "the phone runs x86_64" in message
    assert phone.files() == []


def test_abi_of_the_phone_changes(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    for name in ("ro.product.cpu.abi", "ro.product.cpu.abilist"):
        phone.set_property(name, "arm64-v8a")
    assert "is built for x86_64, but the phone runs arm64-v8a" in run(phone, model("dense"), tmp_path, binary)
    assert phone.files() == []


def test_damaged_binary(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    path = phone.benchmark_model(tmp_path / "benchmark_model")
    path.write_bytes(path.read_bytes()[:80])  # the ELF header is whole
    message = run(phone, model("dense"), tmp_path, f"--benchmark_binary={path}")
    assert "dense.tflite does not run on the phone" in message


def test_not_a_program(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is no program.\n")
    message = run(phone, model("dense"), tmp_path, f"--benchmark_binary={tmp_path / 'text'}")
    assert "neither an ELF file nor a script" in message
    assert phone.files() == []


def test_graph_that_benchmark_model_cannot_load(
    phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path
) -> None:
    message = run(phone, model("flex"), tmp_path, binary)
    assert "flex.tflite" in message


def test_phone_without_gpu_delegate(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    message = run(phone, model("dense"), tmp_path, binary, "--use_gpu")
    assert "Failed to apply GPU delegate" in message


def test_full_storage(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.fill(64 << 10)
    message = run(phone, model("dense"), tmp_path, binary)
    assert message.startswith("The phone's storage is full")
    assert phone.files() == []


def test_not_a_byte_free(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.fill(0)
    message = run(phone, model("dense"), tmp_path, binary)
    assert message.startswith("The phone's storage is full")
    assert phone.files() == []


@pytest.fixture
def large_binary(phone: EmulatedPhone, tmp_path: Path) -> str:
    """The same with 128 MiB behind it that cannot be compressed, so that its push can be caught in the middle."""
    path = phone.benchmark_model(tmp_path / "large")
    with path.open("ab") as file:
        file.write(os.urandom(128 << 20))
    return f"--benchmark_binary={path}"


def start_and_stop_in_push(
    phone: EmulatedPhone, graph: Path, directory: Path, large_binary: str
) -> "subprocess.Popen[str]":
    """A benchmark whose push has begun; adbd is stopped (SIGSTOP)."""
    benchmark = commands.start(phone, [graph], directory, large_binary)
    until = time.monotonic() + commands.SECONDS
    while not any(path.stat().st_size for path in phone.temporary.glob("mobiatt/run.*/partial")):
        assert benchmark.poll() is None, benchmark.communicate()
        assert time.monotonic() < until
    phone.signal_adbd(signal.SIGSTOP)
    assert not list(phone.temporary.glob("mobiatt/cache/*"))
    return benchmark


def test_full_storage_in_the_middle_of_a_push(
    phone: EmulatedPhone, model: Model, large_binary: str, tmp_path: Path
) -> None:
    with start_and_stop_in_push(phone, model("dense"), tmp_path, large_binary) as benchmark:
        phone.fill(0)
        phone.signal_adbd(signal.SIGCONT)
        message = commands.failure(benchmark)
    assert message.startswith("The phone's storage is full")
    check_tidy(phone, tmp_path)
    assert not list(phone.temporary.glob("mobiatt/cache/*"))


def test_unplugged_in_the_middle_of_a_push(
    phone: EmulatedPhone, model: Model, large_binary: str, tmp_path: Path
) -> None:
    with start_and_stop_in_push(phone, model("dense"), tmp_path, large_binary) as benchmark:
        phone.unplug()
        phone.signal_adbd(signal.SIGCONT)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 1
    assert "went away in the middle" in commands.error(stderr)
    phone.wait_until_tidy()
    check_tidy(phone, tmp_path)
    assert not list(phone.temporary.glob("mobiatt/cache/*"))


def test_ctrl_c_in_the_middle_of_a_push(phone: EmulatedPhone, model: Model, large_binary: str, tmp_path: Path) -> None:
    with start_and_stop_in_push(phone, model("dense"), tmp_path, large_binary) as benchmark:
        benchmark.send_signal(signal.SIGINT)
        phone.signal_adbd(signal.SIGCONT)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 130
    assert commands.lines(stderr) == ["interrupted"]
    phone.wait_until_tidy()
    check_tidy(phone, tmp_path)


def test_hot_from_the_start(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    phone.set_thermal_status(3)
    message = run(phone, model("dense"), tmp_path, binary, "--max_cooldown_seconds=1")
    assert "throttles (thermal status 3 SEVERE)" in message


def test_hot_in_the_middle(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary, "--max_cooldown_seconds=1", after=_LAST) as benchmark:
        phone.set_thermal_status(2)
        phone.release()
        message = commands.failure(benchmark)
    assert "throttles (thermal status 2 MODERATE)" in message
    check_tidy(phone, tmp_path)


def test_slowed_cores_in_the_middle(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary, "--max_cooldown_seconds=1", after=_LAST) as benchmark:
        phone.set_allowed_frequency(4, 1200000)
        phone.release()
        message = commands.failure(benchmark)
    assert "throttles" in message
    check_tidy(phone, tmp_path)


@pytest.mark.parametrize(
    "loss",
    [lambda phone: phone.set_thermal_status(None), lambda phone: phone.remove_policy(4)],
    ids=["status", "clock"],
)
def test_heat_is_no_longer_reported(
    phone: EmulatedPhone, model: Model, binary: str, loss: Callable[[EmulatedPhone], None], tmp_path: Path
) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary, "--max_cooldown_seconds=1", after=_LAST) as benchmark:
        loss(phone)
        phone.release()
        message = commands.failure(benchmark)
    assert message.startswith("The phone no longer reports its heat")
    check_tidy(phone, tmp_path)


def test_a_limit_that_rose_and_fell(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    """Hot from the start with a low limit, cool without it, then held as low as at the start: that is throttling."""
    phone.set_thermal_status(2)
    phone.set_allowed_frequency(4, 1200000)
    phone.hold(after=_LAST)
    with commands.start(phone, [model("dense")], tmp_path, binary, "--max_cooldown_seconds=4") as benchmark:
        for _ in range(2):
            phone.wait_for_thermal_look()
        phone.set_allowed_frequency(4, 2802000)
        phone.set_thermal_status(0)
        phone.wait_until_held()
        phone.set_allowed_frequency(4, 1200000)
        phone.release()
        message = commands.failure(benchmark)
    assert "throttles (cores 4-7 held at 1200 MHz, 2802 MHz before)" in message
    check_tidy(phone, tmp_path)


def test_no_checksums_on_the_phone(toolchain: None, model: Model, tmp_path: Path) -> None:
    with EmulatedPhone("x86_64", lacking=["sha256sum"]) as phone:
        binary = phone.benchmark_model(tmp_path / "benchmark_model")
        message = run(phone, model("dense"), tmp_path, f"--benchmark_binary={binary}")
        assert message.startswith("The phone lacks the command sha256sum")
        assert phone.files() == []


def test_what_takes_too_long_is_named(
    phone: EmulatedPhone, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in phone.environment.items():
        monkeypatch.setenv(name, value)
    adb = Adb("adb", phone.serials[0])
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.hold()
    with PhoneStorage(adb, clean=True) as storage:
        remote = storage.provide([binary, model("dense")])
        with pytest.raises(
            LostPhoneError, match=r"^benchmark_model with x took longer than 3 s, so it was given up\.$"
        ):
            storage.execute([remote[binary], f"--graph={remote[model('dense')]}"], 3, "benchmark_model with x")
    phone.wait_until_tidy()
    assert phone.files() == []
    with pytest.raises(LostPhoneError, match="did not answer within 1 s"):
        adb.shell("sleep 3", 1)
    phone.wait_until_tidy()


@pytest.mark.parametrize("loss", [EmulatedPhone.unplug, EmulatedPhone.kill_adbd])
def test_unplugged_in_the_middle(
    phone: EmulatedPhone, model: Model, binary: str, loss: Callable[[EmulatedPhone], None], tmp_path: Path
) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary, after=1) as benchmark:
        loss(phone)
        message = commands.failure(benchmark)
    assert f"The phone {phone.serials[0]} went away in the middle" in message
    phone.wait_until_tidy()  # the phone tidies itself up
    check_tidy(phone, tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGKILL, -9, None)],
)
def test_ended_in_the_middle(
    phone: EmulatedPhone,
    model: Model,
    binary: str,
    number: signal.Signals,
    status: int,
    said: str | None,
    tmp_path: Path,
) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary) as benchmark:
        benchmark.send_signal(number)
        stdout, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == status
    assert stdout == ""
    if said is not None:
        (line,) = commands.lines(stderr)
        assert said in line
        check_tidy(phone, tmp_path)
    phone.wait_until_tidy()
    check_tidy(phone, tmp_path)


def test_ctrl_c_keeps_the_rounds_so_far(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary, after=2) as benchmark:  # loaded, one round
        benchmark.send_signal(signal.SIGINT)
        stdout, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 130
    assert "dense" in stdout
    assert commands.lines(stderr) == ["interrupted"]
    assert '"interrupted": true' in (tmp_path / "out/benchmark.json").read_text()
    assert phone.processes() == []
    assert [name for name in phone.files() if not name.startswith("mobiatt/cache/")] == ["mobiatt", "mobiatt/cache"]


def test_second_benchmark(phone: EmulatedPhone, model: Model, binary: str, tmp_path: Path) -> None:
    with start_and_hold(phone, model("dense"), tmp_path, binary) as benchmark:
        second = commands.run(phone, [model("dense")], tmp_path, binary)
        assert second.returncode == 1
        assert commands.error(second.stderr).startswith("Another benchmark is running on this phone.")
        phone.release()
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 0, stderr
