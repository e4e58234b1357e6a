"""`python -m tflite.benchmark --device=adb` against a real adb daemon, to the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.phone import commands
from tools.phone import state
from tools.phone.emulated import EmulatedPhone

Model = Callable[[str], Path]


def results(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "out/benchmark.json").read_text())
    return found


def cached(phone: EmulatedPhone) -> dict[str, int]:
    """Name and inode of every file that stays on the phone; a file that is pushed again has another inode."""
    return {path.name: path.stat().st_ino for path in (phone.temporary / "mobiatt/cache").iterdir()}


def test_measures(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    graphs = [model("dense"), model("power")]
    done = commands.run(phone, graphs, tmp_path, f"--benchmark_binary={binary}", "--profile")
    assert done.returncode == 0, done.stderr
    assert commands.lines(done.stderr) == []
    assert "Emulated phone" in done.stdout
    found = results(tmp_path)
    device = {"kind": "adb", "serial": phone.serials[0], "abi": "x86_64", "cores": state.CORES}
    assert device.items() <= found["device"].items()
    measurements = found["measurements"]
    assert [one["label"] for one in measurements] == ["dense", "power"]
    for one in measurements:
        assert [each["runs"] for each in one["round_statistics"]] == [2, 2]
        assert one["profile"]["nodes"]
        assert 0 < one["peak_bytes"] < 1 << 30
    assert (tmp_path / "out/benchmark.png").stat().st_size > 1000
    assert phone.processes() == []
    first = cached(phone)
    assert len(first) == 3
    assert phone.files() == ["mobiatt", "mobiatt/cache", *sorted(f"mobiatt/cache/{name}" for name in first)]


def test_what_is_cached_stays(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    flags = f"--benchmark_binary={binary}"
    assert commands.run(phone, [model("dense")], tmp_path, flags).returncode == 0
    first = cached(phone)
    damaged = sorted(first)[0]
    content = (phone.temporary / "mobiatt/cache" / damaged).read_bytes()
    (phone.temporary / "mobiatt/cache" / damaged).write_bytes(b"damaged" + content[7:])
    assert commands.run(phone, [model("dense")], tmp_path, flags).returncode == 0
    second = cached(phone)
    assert (phone.temporary / "mobiatt/cache" / damaged).read_bytes() == content
    assert {name for name in first if first[name] == second[name]} == first.keys() - {damaged}


def test_one_of_two_phones(toolchain: None, model: Model, tmp_path: Path) -> None:
    with EmulatedPhone("x86_64", phones=2) as phone:
        binary = phone.benchmark_model(tmp_path / "benchmark_model")
        flags = (f"--benchmark_binary={binary}", f"--serial={phone.serials[1]}", "--taskset=1", "--num_threads=1,2")
        done = commands.run(phone, [model("dense")], tmp_path, *flags)
        assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["device"]["serial"] == phone.serials[1]
    assert [one["num_threads"] for one in found["measurements"]] == [1, 2]


def test_the_runtimes_own_kernels(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    done = commands.run(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}", "--nouse_xnnpack")
    assert done.returncode == 0, done.stderr
    (one,) = results(tmp_path)["measurements"]
    assert one["backend"] == "CPU"


def test_rounds_on_a_hot_phone_are_repeated(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.hold(after=1)  # the first start only loads
    with commands.start(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}") as benchmark:
        phone.wait_until_held()
        phone.set_thermal_status(2)
        phone.release()
        phone.wait_for_thermal_look()  # after the round: throttled
        phone.wait_for_thermal_look()  # before the next: it waits
        phone.set_thermal_status(0)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 0, stderr
    found = results(tmp_path)
    assert [each["runs"] for each in found["measurements"][0]["round_statistics"]] == [2, 2]
    assert any("repeated" in warning for warning in found["warnings"])


def test_files_whose_names_begin_with_a_dash(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    (tmp_path / "-m").write_bytes(model("dense").read_bytes())
    phone.benchmark_model(tmp_path / "-benchmark_model")
    done = commands.run(phone, [Path("-m")], tmp_path, "--benchmark_binary=-benchmark_model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)["measurements"][0]["label"] == "-m"


def test_the_state_of_the_phone_is_told(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.set_thermal_status(0, has_driver=False)
    phone.set_wakefulness("Dozing")
    phone.set_allowed_frequency(4, 1200000)
    done = commands.run(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["device"]["thermal"] == {"status": None, "name": "unknown", "sensors": {}}
    assert found["device"]["wakefulness"] == "Dozing"
    governor = "schedutil (cores 0-3), schedutil (cores 4-7)"
    assert found["device"]["governor"] == governor
    assert f"governor {governor}, battery 85 % 28.1 °C charging, dozing, thermal status unknown" in done.stdout
    for words in ("no thermal status", "Android calls it Dozing", "Cores 4-7 are held at 1200 of 2802 MHz"):
        assert len([warning for warning in found["warnings"] if words in warning]) == 1, words
        assert words in done.stdout
    assert len(found["warnings"]) == 3


def test_a_phone_that_says_nothing_of_its_heat(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.set_thermal_status(None)
    phone.set_wakefulness(None)
    for policy in state.CLUSTERS:
        phone.remove_policy(policy)
    done = commands.run(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["device"]["wakefulness"] is None
    (warning,) = found["warnings"]
    assert warning.endswith("throttling cannot be seen.")


def test_limits_of_a_hot_phone_are_no_baseline(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    """Hot from the start, with a low limit; what is measured after it has cooled down is measured without it."""
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.set_thermal_status(2)
    phone.set_allowed_frequency(4, 1200000)
    with commands.start(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}") as benchmark:
        for _ in range(2):
            phone.wait_for_thermal_look()
        phone.set_allowed_frequency(4, state.CLUSTERS[4])
        phone.set_thermal_status(0)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 0, stderr
    found = results(tmp_path)
    assert found["warnings"] == []
    assert [cluster["allowed_mhz"] for cluster in found["device"]["clusters"]] == [1803, 2802]
    assert found["device"]["thermal"]["name"] == "0 NONE"


def test_a_limit_that_rises_later_is_told(phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.set_allowed_frequency(4, 1200000)
    phone.hold(after=2)  # loaded, one round
    with commands.start(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}") as benchmark:
        phone.wait_until_held()
        phone.set_allowed_frequency(4, state.CLUSTERS[4])
        phone.release()
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 0, stderr
    capped, risen = results(tmp_path)["warnings"]
    assert capped == "Cores 4-7 are held at 1200 of 2802 MHz."
    assert risen.startswith("Cores 4-7 were held at 1200 MHz when measuring started and were allowed 2802 MHz later")


def test_a_round_after_which_the_heat_is_unknown_is_repeated(
    phone: EmulatedPhone, model: Model, tmp_path: Path
) -> None:
    binary = phone.benchmark_model(tmp_path / "benchmark_model")
    phone.hold(after=1)  # the first start only loads
    with commands.start(phone, [model("dense")], tmp_path, f"--benchmark_binary={binary}") as benchmark:
        phone.wait_until_held()
        phone.set_thermal_status(None)
        phone.release()
        phone.wait_for_thermal_look()  # after the round: no answer
        phone.wait_for_thermal_look()  # before the next: it waits
        phone.set_thermal_status(0)
        _, stderr = benchmark.communicate(timeout=commands.SECONDS)
    assert benchmark.returncode == 0, stderr
    (warning,) = results(tmp_path)["warnings"]
    assert warning == "Rounds that were repeated: 1 (the phone no longer reports its heat)."


@pytest.mark.slow
def test_arm64(arm_phone: EmulatedPhone, model: Model, tmp_path: Path) -> None:
    """AArch64 programs are pushed, run in QEMU and report; what they measure there is not a phone's speed."""
    binary = arm_phone.benchmark_model(tmp_path / "benchmark_model")
    done = commands.run(
        arm_phone, [model("wide"), model("power")], tmp_path, f"--benchmark_binary={binary}", "--profile", "--clean"
    )
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["device"]["abi"] == "arm64-v8a"
    assert found["device"]["emulated"]
    wide, power = found["measurements"]
    assert wide["delegation"]["partitions"] == 1
    assert power["delegation"]["partitions"] > 1
    assert any("GEMM" in node["op"] for node in wide["profile"]["nodes"])
    assert any(node["op"] == "POW" for node in power["profile"]["nodes"])
    assert arm_phone.files() == []
    assert arm_phone.processes() == []
