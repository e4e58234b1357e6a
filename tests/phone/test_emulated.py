"""The emulated phone is one: real adb and adbd, a file system, processes, Android's shell."""

import os
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tools.phone import state
from tools.phone.emulated import EmulatedPhone, requiring_authorization
from tools.phone.launcher import MACHINES, launcher


def test_shell_passes_output_and_exit_status(phone: EmulatedPhone) -> None:
    done = phone.adb("shell", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_commands_are_androids(phone: EmulatedPhone) -> None:
    assert "MIRBSD KSH" in phone.adb("shell", "echo $KSH_VERSION").stdout
    assert "toybox" in phone.adb("shell", "readlink -f $(which sha256sum)").stdout
    assert phone.adb("shell", "readlink $(which sha256sum)").stdout == "/system/bin/sha256sum\n"


def test_push_and_pull(phone: EmulatedPhone, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "sent").write_bytes(content)
    assert phone.adb("push", str(tmp_path / "sent"), "/data/local/tmp/kept").returncode == 0
    assert phone.files() == ["kept"]
    assert (phone.temporary / "kept").read_bytes() == content
    assert phone.adb("pull", "/data/local/tmp/kept", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == content


def test_full_storage(phone: EmulatedPhone, tmp_path: Path) -> None:
    phone.fill(1 << 20)
    assert phone.free_bytes() == 1 << 20
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    done = phone.adb("push", str(tmp_path / "large"), "/data/local/tmp/large")
    assert done.returncode == 1
    assert "No space left on device" in done.stdout + done.stderr


def test_fixtures_say_what_tests_set(phone: EmulatedPhone) -> None:
    assert phone.adb("shell", "getprop ro.product.cpu.abi").stdout == "x86_64\n"
    assert phone.adb("shell", "getprop ro.no.such.name").stdout == "\n"
    phone.set_property("ro.product.model", "A phone [with] brackets")
    assert phone.adb("shell", "getprop ro.product.model").stdout == "A phone [with] brackets\n"
    assert "[ro.product.model]: [A phone [with] brackets]\n" in phone.adb("shell", "getprop").stdout
    phone.set_thermal_status(3)
    assert phone.adb("shell", "dumpsys thermalservice").stdout == state.thermal_dump(3)
    phone.set_thermal_status(0, has_driver=False)
    assert "HAL Ready: false\n" in phone.adb("shell", "dumpsys thermalservice").stdout
    phone.set_thermal_status(None)
    assert "TIMEOUT" in phone.adb("shell", "dumpsys thermalservice").stdout
    assert "  mWakefulness=Awake\n" in phone.adb("shell", "dumpsys power").stdout
    phone.set_wakefulness("Dozing")
    assert "  mWakefulness=Dozing\n" in phone.adb("shell", "dumpsys power").stdout
    phone.set_wakefulness(None)
    assert phone.adb("shell", "dumpsys power").stdout == ""
    phone.set_battery(state.Battery(level=9, usb_powered=False, status=3))
    assert "  level: 9\n" in phone.adb("shell", "dumpsys battery").stdout
    phone.set_allowed_frequency(4, 1000000)
    path = "/sys/devices/system/cpu/cpu7/cpufreq/scaling_max_freq"
    assert phone.adb("shell", f"cat {path}").stdout == "1000000\n"
    phone.remove_policy(4)
    assert phone.adb("shell", "echo /sys/devices/system/cpu/cpufreq/policy*").stdout.endswith("/policy0\n")


def test_a_command_can_be_lacking(toolchain: None) -> None:
    with EmulatedPhone("x86_64", lacking=["sha256sum"]) as phone:
        done = phone.adb("shell", "command -v md5sum; sha256sum /proc/version")
        assert done.stdout == "/fixture/commands/md5sum\n"
        assert done.returncode == 127


def test_unplugging(phone: EmulatedPhone) -> None:
    phone.unplug()
    assert "not found" in phone.adb("shell", "true").stderr
    phone.plug()
    assert phone.adb("shell", "true").returncode == 0
    phone.kill_adbd()
    assert phone.adb("get-state").stderr == "error: device offline\n"
    phone.start_adbd()
    assert phone.adb("shell", "true").returncode == 0
    assert phone.processes() == []


def test_a_stopped_daemon_answers_nothing(phone: EmulatedPhone) -> None:
    phone.signal_adbd(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        phone.adb("shell", "true", seconds=1)
    phone.signal_adbd(signal.SIGCONT)
    assert phone.adb("shell", "true").returncode == 0


def test_processes_are_seen(phone: EmulatedPhone) -> None:
    phone.adb("shell", "sleep 100 </dev/null >/dev/null 2>&1 &")
    assert phone.processes() == ["sleep 100"]
    phone.adb("shell", "kill $(pidof sleep)")
    phone.wait_until_tidy()


def test_unauthorized_is_adbds_own_answer(toolchain: None) -> None:
    with EmulatedPhone("x86_64", authorized=False) as phone:
        assert f"{phone.serials[0]}\tunauthorized" in phone.adb("devices", serial=None).stdout
        assert "device unauthorized" in phone.adb("shell", "true").stderr


def test_authorization_is_not_switched_on_blindly() -> None:
    with pytest.raises(UserError, match=r"34\.0\.5"):
        requiring_authorization(b"\x7fELF" + bytes(100))


def test_several_serials(toolchain: None) -> None:
    with EmulatedPhone("x86_64", phones=2) as phone:
        assert phone.adb("devices", serial=None).stdout.count("\tdevice") == 2
        assert "more than one device" in phone.adb("shell", "true", serial=None).stderr
        phone.unplug(1)
        assert phone.adb("devices", serial=None).stdout.count("\tdevice") == 1


def test_the_phone_is_on_its_own(phone: EmulatedPhone) -> None:
    with socket.socket() as outside:
        outside.settimeout(1)
        assert outside.connect_ex(("127.0.0.1", int(phone.serials[0].rpartition(":")[2]))) != 0
    assert not Path("/data/local/tmp").exists()


def test_nothing_survives(toolchain: None) -> None:
    with EmulatedPhone("x86_64") as phone:
        phone.adb("shell", "sleep 100 </dev/null >/dev/null 2>&1 &")
        assert phone.processes() == ["sleep 100"]
        root, path = phone.root, Path(phone.environment["ADB_SERVER_SOCKET"].removeprefix("localfilesystem:"))
        assert path.exists()
    assert not root.exists()
    assert not path.parent.exists()


def test_the_home_directory_is_left_alone(
    phone: EmulatedPhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(phone.environment, "HOME", str(tmp_path))
    assert phone.adb("shell", "true").returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("abi", MACHINES)
def test_launcher_is_an_elf_file_of_its_abi(abi: str) -> None:
    content = launcher(abi, "/system/bin/true")
    assert content.startswith(b"\x7fELF\x02\x01")
    assert struct.unpack_from("<HH", content, 16) == (2, MACHINES[abi])
    assert content.endswith(b"/system/bin/true\0")


def test_launcher_passes_arguments_and_environment(phone: EmulatedPhone, tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(launcher("x86_64", "/system/bin/env"))  # toybox goes by the name it is called by
    phone.adb("push", str(tmp_path / "env"), "/data/local/tmp/env")
    done = phone.adb("shell", "cd /data/local/tmp; chmod 755 env; A=1 ./env B=2; ./env C='3 4' sh -c 'echo $C; exit 5'")
    assert {"A=1", "B=2"} <= set(done.stdout.splitlines())
    assert done.stdout.endswith("\n3 4\n")
    assert done.returncode == 5


def test_arm_phone_runs_arm_programs(arm_phone: EmulatedPhone, tmp_path: Path) -> None:
    assert arm_phone.adb("shell", "uname -m").stdout == "aarch64\n"
    for program in ("bin/mksh", "bin/toybox", "usr/lib/android-sdk/platform-tools/adbd"):
        assert struct.unpack_from("<H", (arm_phone.root / program).read_bytes(), 18) == (MACHINES["arm64-v8a"],)
    (tmp_path / "echo").write_bytes(launcher("arm64-v8a", "/system/bin/echo"))
    arm_phone.adb("push", str(tmp_path / "echo"), "/data/local/tmp/echo")
    assert arm_phone.adb("shell", "cd /data/local/tmp; chmod 755 echo; ./echo a 'b c'").stdout == "a b c\n"
