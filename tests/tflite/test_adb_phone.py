"""What adb, a phone's commands and a program's file say, read: texts in Android's formats with made-up values."""

import struct
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tflite.adb import binary, phone
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
    return known | changed


def compose(texts: dict[str, str], at: phone.PhoneState | None = None) -> dict[str, object]:
    return phone.compose(
        texts, at or state(), serial="1A2B", runtime="benchmark_model 0123", backend="XNNPACK", taskset="f0"
    )


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
    for connected, serial, message in (
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
    headline = device["headline"]
    assert isinstance(headline, list)
    for words in ("Google Pixel 6", "Android 15", "GS101", "arm64-v8a", "sched_pixel", "85 %", "0 NONE", "taskset f0"):
        assert any(words in line for line in headline), words


def test_a_phone_that_says_nothing_is_described_by_what_is_not_known() -> None:
    nothing = dict.fromkeys(about(), "")
    device = compose(nothing, phone.parse_state(""))
    for key in ("android", "sdk", "soc", "abi", "cores", "battery", "low_power"):
        assert device[key] is None, key
    assert device["name"] == "unknown phone"
    assert device["thermal"] == {"status": None, "name": "unknown", "sensors": {}}
    doubts = phone.doubts(device, phone.parse_state(""))
    assert doubts == ["The phone reports no thermal status (Android 10 and newer do): throttling may go unnoticed."]


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
    assert phone.parse_state("").throttling(state(0)) is None


def test_cores_held_lower_than_at_the_start_are_throttling() -> None:
    assert state(little=1200000).throttling(state()) == "cores 0-3 held at 1200 MHz, 1803 MHz when measuring started"
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
