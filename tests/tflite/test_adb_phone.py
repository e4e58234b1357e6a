"""What adb, a phone's commands and a program's file say, read: texts in Android's formats with made-up values."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tflite.adb import binary, cooling, phone
from tflite.adb.client import Connected, choose, find_adb, parse_devices
from tflite.adb.device import AdbDevice
from tflite.adb.storage import parse_free
from tflite.measurements import Plan

# Test fixtures: outputs in the formats of adb (transport.cpp), getprop and dumpsys (battery, thermalservice).
DEVICES = """* daemon not running; starting now at tcp:5037
* daemon started successfully
List of devices attached
1A2B3C4D               device usb:1-2 product:oriole model:Pixel_6 device:oriole transport_id:1
192.168.1.7:5555       offline transport_id:2
R58M12345              unauthorized usb:1-3 transport_id:3
0123456789ABCDEF       no permissions (user in plugdev group; are your udev rules wrong?); see [page] usb:1-4

"""
PROPERTIES = """[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 6]
[ro.product.cpu.abilist]: [arm64-v8a,armeabi-v7a,armeabi]
[ro.build.version.release]: [15]
[ro.build.version.sdk]: [35]
[ro.build.fingerprint]: [google/oriole/oriole:15/X/1:user/release-keys]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [GS101]
[ro.hardware]: [oriole]
[empty]: []
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  status: 2
  level: 85
  scale: 100
  temperature: 283
"""
STATE = """IsStatusOverride: false
Thermal Status: {status}
Cached temperatures:
\tTemperature{{mValue=12.5, mType=0, mName=BIG, mStatus=0}}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{{mValue=31.25, mType=3, mName=VIRTUAL-SKIN, mStatus=0}}
\tTemperature{{mValue=NaN, mType=1, mName=G3D, mStatus=0}}
Temperature static thresholds from HAL:
\tTemperatureThreshold{{mType=3, mName=VIRTUAL-SKIN, mHotThrottlingThresholds=[NaN, 39.0]}}

mobiatt-policies
0 1 2 3|sched_pixel|1803000|{little}
4 5|sched_pixel|2253000|2253000
7||{big}|
"""


def state(status: int | str = 0, little: int = 1803000, big: int = 2802000) -> phone.PhoneState:
    return phone.parse_state(STATE.format(status=status, little=little, big=big))


def about(**changed: str) -> dict[str, str]:
    known = {"properties": PROPERTIES, "battery": BATTERY, "low_power": "0", "cores": "0-7", "count": "8"}
    return known | {"power": "  mWakefulness=Awake"} | changed


def compose(texts: dict[str, str], at: phone.PhoneState | None = None, backend: str = "XNNPACK") -> dict[str, object]:
    return phone.compose(
        texts, at or state(), serial="1A2B", runtime="benchmark_model 0123", backend=backend, taskset="f0"
    )


def headline(device: dict[str, object]) -> str:
    lines = device["headline"]
    assert isinstance(lines, list)
    return "\n".join(lines)


def test_devices_are_listed_with_state_and_model() -> None:
    assert parse_devices(DEVICES) == [
        Connected("1A2B3C4D", "device", "Pixel 6"),
        Connected("192.168.1.7:5555", "offline", ""),
        Connected("R58M12345", "unauthorized", ""),
        Connected("0123456789ABCDEF", "no permissions", ""),
    ]
    assert parse_devices("List of devices attached\n\n") == []
    assert parse_devices("") == []


def test_the_right_phone_is_chosen_or_one_line_says_why_not() -> None:
    listed = parse_devices(DEVICES)
    assert choose(listed[:1], None) == listed[0]
    assert choose(listed, "1A2B3C4D") == listed[0]
    nameless = parse_devices(
        "List of devices attached\n(no serial number)     device usb:1-2 product:x model:Cheap_Phone transport_id:1\n"
        "(no serial number)\tunauthorized\n"
    )
    assert [(one.state, one.model) for one in nameless] == [("device", "Cheap Phone"), ("unauthorized", "")]
    assert choose([*nameless, *listed], "1A2B3C4D") == listed[0]
    for connected, serial, message in (
        (nameless[:1], None, r"phone \(Cheap Phone\) has no serial number.*adb connect ADDRESS"),
        (nameless[1:], None, "phone has no serial number"),
        ([], None, "No phone is connected.*USB debugging"),
        ([], "X", "No phone with serial X is connected"),
        (listed[:2], None, r"2 phones are connected: 1A2B3C4D \(Pixel 6\), 192.*\(offline\).*--serial=SERIAL"),
        (listed, "X", "No phone with serial X is connected. Connected: 1A2B3C4D"),
        (listed, "192.168.1.7:5555", "does not answer"),
        (listed, "R58M12345", "does not trust this computer.*confirm the dialog"),
        (listed, "0123456789ABCDEF", "udev"),
        ([Connected("Y", "recovery", "")], None, "state recovery"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            choose(connected, serial)
        assert "\n" not in str(raised.value)


def test_a_missing_adb_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"adb is not on PATH\. Install it"):
        find_adb(None)
    with pytest.raises(UserError, match="--adb=/nowhere/adb is no program"):
        find_adb("/nowhere/adb")


def test_an_adb_beside_the_caller_is_found_where_bazel_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for directory in ("bin", "caller/tools"):
        (tmp_path / directory).mkdir(parents=True)
    for name in ("bin/adb", "caller/tools/adb"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path / "caller"))
    assert find_adb("tools/adb") == str(tmp_path / "caller/tools/adb")
    assert find_adb("adb") == str(tmp_path / "bin/adb")
    with pytest.raises(UserError, match=r"--adb=\./adb is no program"):  # that of PATH is another one
        find_adb("./adb")
    monkeypatch.delenv("BUILD_WORKING_DIRECTORY")
    monkeypatch.chdir(tmp_path / "caller/tools")
    assert find_adb("./adb") == str(tmp_path / "caller/tools/adb")


def test_a_phone_describes_itself() -> None:
    device = compose(about())
    assert device["name"] == "Google Pixel 6"
    assert (device["android"], device["sdk"], device["soc"]) == ("15", 35, "Google GS101")
    assert device["abis"] == ["arm64-v8a", "armeabi-v7a", "armeabi"]
    assert device["cores"] == 8
    assert device["battery"] == {"level": 85, "celsius": 28.3, "charging": True, "powered_by": ["USB"]}
    assert device["low_power"] is False
    assert device["thermal"] == {"status": 0, "name": "0 NONE", "sensors": {"VIRTUAL-SKIN": 31.25}}
    assert device["clusters"] == [
        {"cores": "0-3", "governor": "sched_pixel", "max_mhz": 1803, "allowed_mhz": 1803},
        {"cores": "4-5", "governor": "sched_pixel", "max_mhz": 2253, "allowed_mhz": 2253},
        {"cores": "7", "governor": None, "max_mhz": 2802, "allowed_mhz": None},
    ]
    assert "emulated" not in device
    for words in ("Google Pixel 6", "Android 15", "GS101", "arm64-v8a", "sched_pixel", "85 %", "0 NONE", "taskset f0"):
        assert words in headline(device), words
    governor = "sched_pixel (cores 0-3), sched_pixel (cores 4-5), unknown (cores 7)"
    assert device["governor"] == governor
    assert f"governor {governor}, battery 85 % 28.3 °C charging, awake, thermal" in headline(device)
    assert phone.doubts(device, state()) == []


def test_the_precision_of_a_gpu_is_named() -> None:
    assert compose(about())["gpu_precision"] is None
    device = compose(about(), backend="GPU")
    assert device["gpu_precision"] == "float16 allowed"
    assert ", GPU, float16 allowed, governor" in headline(device)
    unknown = phone.with_unknown_precision(device)
    assert unknown["gpu_precision"] == "unknown"
    assert ", GPU, precision unknown, governor" in headline(unknown)
    assert headline(device) != headline(unknown)


@pytest.mark.parametrize(
    ("text", "state_", "words"),
    [
        ("  mWakefulness=Awake\n  mWakefulnessChanging=false", "Awake", "awake"),
        ("  mWakefulness=Dozing", "Dozing", "dozing"),
        ("  mWakefulness=Asleep", "Asleep", "asleep"),
        ("", None, "wakefulness unknown"),
    ],
)
def test_a_phone_that_is_not_awake_is_doubtful(text: str, state_: str | None, words: str) -> None:
    device = compose(about(power=text))
    assert device["wakefulness"] == state_
    assert f", {words}, thermal" in headline(device)
    found = phone.doubts(device, state())
    assert len(found) == (state_ not in (None, "Awake"))
    assert all(f"Android calls it {state_}" in doubt for doubt in found)


def test_a_phone_that_says_nothing_is_described_by_what_is_not_known() -> None:
    nothing = dict.fromkeys(about(), "")
    device = compose(nothing, phone.parse_state(""))
    for key in ("android", "sdk", "soc", "abi", "cores", "battery", "low_power", "wakefulness"):
        assert device[key] is None, key
    assert device["name"] == "unknown phone"
    assert device["thermal"] == {"status": None, "name": "unknown", "sensors": {}}
    assert device["governor"] == "unknown"
    (doubt,) = phone.doubts(device, phone.parse_state(""))
    assert doubt.startswith("The phone reports neither a thermal status nor the clocks")
    assert doubt.endswith("throttling cannot be seen.")


def test_the_default_of_a_phone_without_thermal_driver_is_no_status() -> None:
    text = STATE.format(status=0, little=1803000, big=2802000)
    without = phone.parse_state(text.replace("HAL Ready: true", "HAL Ready: false"))
    assert without.thermal_status is None
    assert without.thermal_name == "unknown"
    (doubt,) = phone.doubts(compose(about(), without), without)
    assert "no thermal status" in doubt
    assert "throttling may go unnoticed" in doubt  # the clocks are seen
    by_hand = phone.parse_state(text.replace("HAL Ready: true", "HAL Ready: false").replace("Status: 0", "Status: 3"))
    assert by_hand.thermal_status == 3


@pytest.mark.parametrize(
    ("maker", "model", "name"),
    [
        ("samsung", "SM-G991B", "Samsung SM-G991B"),
        ("OnePlus", "ONEPLUS A6003", "ONEPLUS A6003"),
        ("", "Thing", "Thing"),
    ],
)
def test_names_do_not_say_the_maker_twice(maker: str, model: str, name: str) -> None:
    assert phone.name_of({"ro.product.manufacturer": maker, "ro.product.model": model}) == name


@pytest.mark.parametrize("property_", ["ro.kernel.qemu]: [1", "ro.boot.qemu]: [1", "ro.hardware]: [ranchu"])
def test_an_emulator_is_called_one(property_: str) -> None:
    text = PROPERTIES.replace("ro.hardware]: [oriole", property_)
    assert "not a phone's figures" in str(compose(about(properties=text))["emulated"])


def test_doubts_name_what_slows_a_phone() -> None:
    weak = about(battery=BATTERY.replace("85", "7"), low_power="1")
    capped = state(little=1200000)
    found = phone.doubts(compose(weak, capped), capped)
    assert [next(word for word in ("saver", "7 %", "1200 of 1803 MHz") if word in line) for line in found] == [
        "saver",
        "7 %",
        "1200 of 1803 MHz",
    ]


def test_any_thermal_status_above_none_is_throttling() -> None:
    assert state(0).throttling(state(0)) is None
    assert state(1).throttling(state(0)) == "thermal status 1 LIGHT"
    assert state(6).throttling(state(0)) == "thermal status 6 SHUTDOWN"
    assert phone.parse_state("").throttling(phone.parse_state("")) is None


def test_what_is_no_longer_reported_is_not_cool() -> None:
    assert phone.parse_state("").throttling(state(0)) == "the phone no longer reports its heat"
    unknown = replace(state(), thermal_status=None)
    assert unknown.throttling(state()) == "the phone no longer reports its heat"
    assert unknown.throttling(unknown) is None
    fewer = replace(state(), clusters=state().clusters[:1])
    assert fewer.throttling(state()) == ("the phone no longer reports its heat (the clock of cores 4-5 is missing)")
    assert state().throttling(fewer) is None
    assert cooling.given_up(str(unknown.throttling(state())), 600).startswith("The phone no longer reports its heat, ")


def test_the_best_of_a_phone_is_the_highest_limit_of_each_cluster() -> None:
    first, later = state(little=1200000, big=2802000), state(little=1803000, big=1000000)
    best = first.best_of(later)
    assert best.allowed() == later.best_of(first).allowed() == {"0-3": 1803, "4-5": 2253}
    assert first.throttling(best) == "cores 0-3 held at 1200 MHz, 1803 MHz before"
    unknown = phone.parse_state("")
    assert unknown.best_of(first).throttling(first) is None
    assert unknown.throttling(unknown.best_of(first)) == "the phone no longer reports its heat"
    assert unknown.throttling(first.best_of(unknown)) == "the phone no longer reports its heat"


def test_limits_that_rise_are_kept_with_the_first_and_the_last() -> None:
    low, middle, high = state(little=1000000), state(little=1200000), state(little=1803000)
    assert cooling.rises({}, high, low) == {}
    once = cooling.rises({}, low, middle)
    assert once == {"0-3": (1000, 1200)}
    assert cooling.rises(once, low.best_of(middle), middle) == once
    assert cooling.rises(once, low.best_of(middle), high) == {"0-3": (1000, 1803)}
    assert cooling.rises({}, phone.parse_state(""), high) == {}


def test_cores_held_lower_than_at_the_start_are_throttling() -> None:
    assert state(little=1200000).throttling(state()) == "cores 0-3 held at 1200 MHz, 1803 MHz before"
    assert state(little=1200000).throttling(state(little=1200000)) is None
    assert state().throttling(state(little=1200000)) is None


def elf(kind: int, machine: int, order: str = "<") -> bytes:
    """The first 20 bytes of an ELF file: class, byte order, type and machine."""
    return b"\x7fELF" + bytes([kind, 1 if order == "<" else 2, 1]) + bytes(9) + struct.pack(f"{order}HH", 3, machine)


@pytest.mark.parametrize(
    ("content", "abi"),
    [
        (elf(2, 183), "arm64-v8a"),
        (elf(1, 40), "armeabi-v7a"),
        (elf(2, 62), "x86_64"),
        (elf(1, 3), "x86"),
        (b"#!/bin/sh\n", None),
    ],
)
def test_the_abi_of_a_program_is_read_from_its_file(content: bytes, abi: str | None, tmp_path: Path) -> None:
    path = tmp_path / "benchmark_model"
    path.write_bytes(content)
    assert binary.binary_abi(path) == abi
    binary.check_abi(path, ["arm64-v8a", "armeabi-v7a", "x86_64", "x86"])
    if abi:
        with pytest.raises(UserError, match=f"is built for {abi}, but the phone runs riscv64"):
            binary.check_abi(path, ["riscv64"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither an ELF file nor a script"),
        (b"\x7fELF\x02", "neither an ELF file nor a script"),
        (b"PK\x03\x04" + bytes(100), "neither an ELF file nor a script"),
        (elf(2, 62, ">"), "no phone"),
        (elf(2, 21, ">"), "no phone"),
    ],
)
def test_other_files_are_no_programs_for_a_phone(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmark_model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        binary.binary_abi(path)


def test_benchmark_model_is_found_where_the_documentation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(binary.VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"--benchmark_binary.*android_aarch64_benchmark_model.*bazel build"):
        binary.find_binary(None, ["arm64-v8a"])
    kept = binary.default_path("armeabi-v7a")
    assert kept == tmp_path / ".cache/mobiatt/benchmark_model/armeabi-v7a/benchmark_model"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert binary.find_binary(None, ["arm64-v8a", "armeabi-v7a"]) == kept
    named = tmp_path / "mine"
    named.touch()
    monkeypatch.setenv(binary.VARIABLE, str(named))
    assert binary.find_binary(None, ["armeabi-v7a"]) == named
    with pytest.raises(UserError, match=r"--benchmark_binary names .*/nothing, which is not a file"):
        binary.find_binary(str(tmp_path / "nothing"), ["armeabi-v7a"])
    named.unlink()
    with pytest.raises(UserError, match="MOBIATT_BENCHMARK_MODEL names"):
        binary.find_binary(None, ["armeabi-v7a"])


def test_free_space_is_read_from_both_kinds_of_df() -> None:
    toybox = "Filesystem 1K-blocks  Used Available Use% Mounted on\n/dev/block/dm-8 100000 10000 90000  10% /data\n"
    assert parse_free(toybox) == 90000 * 1024
    assert parse_free("Filesystem Size Used Free Blksize\n/data 1G 1G 1G 4096\n") is None
    assert parse_free("") is None


@pytest.mark.parametrize(
    ("device", "plan", "message"),
    [
        (AdbDevice(taskset="0"), Plan((Path("a"),)), "--taskset=0 is no mask"),
        (AdbDevice(taskset="g1"), Plan((Path("a"),)), "--taskset=g1 is no mask"),
        (AdbDevice(max_cooldown_seconds=-1), Plan((Path("a"),)), "--max_cooldown_seconds=-1"),
        (AdbDevice(), Plan((Path("a"),), inputs=(Path("x.npy"),)), "--input is not read"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_phone_is_looked_for(
    device: AdbDevice, plan: Plan, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        device.run(plan)
