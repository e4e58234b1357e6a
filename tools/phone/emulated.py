"""An emulated phone: a real adb daemon, real shell and real tools, without a phone.

python -m tools.phone.emulated --abi=arm64-v8a

prints the environment that makes `adb` and `python -m tflite.benchmark --device=adb` see the phone; stays until Ctrl-C.

Real are adbd and adb (Debian's), the kernel, the file system under /data, and Android's shell and commands (mksh and
toybox, Debian's). For the ABI arm64-v8a every program of the phone is AArch64 and runs in QEMU's user emulation. Test
fixtures are `getprop`, `dumpsys`, `settings`, the files under /sys and the stand-in for Google's benchmark_model; tests
change what they say. Latencies measured on it are those of an emulator.

The phone lives in Linux namespaces of its own and talks to clients through a UNIX socket; neither a running adb server
nor ~/.android is touched, and nothing of it survives the end of the process that made it.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from absl import flags

from mobiatt_tf import cli
from mobiatt_tf.errors import UserError
from tools.phone import state
from tools.phone.launcher import launcher

TOOLCHAIN = Path(__file__).parents[2] / "runs/phone/toolchain"
ARCHITECTURES = {"arm64-v8a": "arm64", "x86_64": "amd64"}
_HERE = Path(__file__).parent
_FIRST_PORT = 6001
_ADBD = "usr/lib/android-sdk/platform-tools/adbd"
_ADB_SECONDS = 60
_FOR_BENCHMARK_MODEL = ("__init__.py", "memory.py", "profiler.py", "serving.py", "worker.py")


def unavailable(abi: str = "x86_64") -> str | None:
    """Why no phone with this ABI can be emulated here; None: it can, if tools/phone/setup.sh has run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"phones are emulated on x86-64 Linux only; this is {platform.machine()} {sys.platform}"
    if shutil.which("unshare") is None:
        return "there is no unshare (util-linux)"
    own = "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc" if abi == "arm64-v8a" else "true"
    tried = subprocess.run([*_namespaces(), *own.split()], capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    needs = "namespaces with a binfmt_misc of their own (Linux 6.7)" if abi == "arm64-v8a" else "user namespaces"
    return f"it needs {needs}: {tried.stderr.strip()}"


def _namespaces() -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--"]


class EmulatedPhone:
    """A phone with `phones` serial numbers; a context manager.

    Attributes:
        environment: the process environment in which `adb` sees the phone, and only it.
        serials: the serial numbers, "127.0.0.1:6001" and so on.
        root: the phone's "/" as this process sees it.
    """

    def __init__(
        self,
        abi: str = "arm64-v8a",
        *,
        phones: int = 1,
        authorized: bool = True,
        data_bytes: int = 512 << 20,
        properties: Mapping[str, str] | None = None,
        lacking: Sequence[str] = (),
        toolchain: Path = TOOLCHAIN,
    ) -> None:
        """Describes the phone; entering the context starts it.

        Args:
            abi: of ARCHITECTURES.
            phones: the number of daemons, each with a serial number; all show the same files.
            authorized: False: adbd asks for a key that the phone's user has not accepted.
            data_bytes: the size of /data.
            properties: replace or add to what `getprop` says.
            lacking: commands that are not on the phone's PATH, as on one with an older toybox.
            toolchain: the directory that tools/phone/setup.sh made.

        Raises:
            UserError: the ABI is unknown or the toolchain is not there.
        """
        if abi not in ARCHITECTURES:
            raise UserError(f"There is no emulated phone with the ABI {abi}; allowed: {', '.join(ARCHITECTURES)}.")
        if not (toolchain / "stamp").is_file():
            raise UserError(f"There is no {toolchain}. Make it: sh tools/phone/setup.sh")
        self._toolchain = toolchain.absolute()
        self._files = self._toolchain / ARCHITECTURES[abi]
        self._ports = [_FIRST_PORT + number for number in range(phones)]
        self._authorized = authorized
        self._data_bytes = data_bytes
        self._lacking = frozenset(lacking)
        self._properties = state.PROPERTIES | state.abi_properties(abi) | dict(properties or {})
        self._stack = contextlib.ExitStack()
        self.abi = abi
        self.serials = [f"127.0.0.1:{port}" for port in self._ports]
        self.environment: dict[str, str] = {}
        self.root = Path()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        # A UNIX socket's path is limited to 107 bytes; TMPDIR may be long.
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phone-", dir="/tmp")))
        for name in ("root", "home", "state"):
            (base / name).mkdir()
        self._state = base / "state"
        state.write_all(self._state, self._properties)
        shutil.copytree(_HERE / "fixture", self._state / "bin")
        (self._state / "commands").mkdir()
        for command in (self._files / "system/bin").iterdir():
            if command.name not in self._lacking:
                (self._state / "commands" / command.name).symlink_to(f"/system/bin/{command.name}")
        (self._state / "project/tflite").mkdir(parents=True)
        for name in _FOR_BENCHMARK_MODEL:
            shutil.copy(_HERE.parents[1] / "tflite" / name, self._state / "project/tflite")
        adbd = None
        if not self._authorized:
            adbd = base / "adbd"
            adbd.write_bytes(requiring_authorization((self._files / _ADBD).read_bytes()))
            adbd.chmod(0o755)
        phone = {
            "root": str(base / "root"),
            "files": str(self._files),
            "state": str(self._state),
            "data_bytes": self._data_bytes,
            "adbd": adbd and str(adbd),
            "qemu": str(self._toolchain / "qemu-aarch64") if self.abi == "arm64-v8a" else None,
            "adb": str(self._toolchain / "bin/adb"),
            "socket": str(base / "adb"),
            "ports": self._ports,
        }
        variables = {
            "PATH": f"{self._toolchain / 'bin'}:{os.environ['PATH']}",
            "ADB_SERVER_SOCKET": f"localfilesystem:{phone['socket']}",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ADB_", "ANDROID_"))}
        self.environment = kept | variables
        process = subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", str(_HERE / "boot.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"HOME": str(base / "home")},  # the server's keys
            start_new_session=True,  # Ctrl-C is for the process that owns the phone
        )
        stack.callback(_end, process)
        self._process = process
        outer_id = self._order(phone)["id"]
        self.root = Path("/proc", str(outer_id), "root", *base.parts[1:], "root")
        for serial in self.serials:
            self._connect(serial)

    def _order(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the phone has ended"}')
        if "error" in reply:
            raise RuntimeError(f"the emulated phone: {reply['error']}")
        self._daemons = set(reply["daemons"])
        return reply

    def adb(
        self, *arguments: str, serial: int | None = 0, seconds: float = _ADB_SECONDS
    ) -> "subprocess.CompletedProcess[str]":
        """Runs adb on the phone with this number; None: without --serial.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        chosen = [] if serial is None else ["-s", self.serials[serial]]
        return subprocess.run(
            ["adb", *chosen, *arguments], env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def _connect(self, serial: str) -> None:
        said = self.adb("connect", serial, serial=None).stdout.strip()
        if not said.startswith("connected to" if self._authorized else "failed to authenticate to"):
            raise RuntimeError(f"adb connect {serial}: {said}")

    def unplug(self, serial: int = 0) -> None:
        """Breaks the connection at once, as pulling the cable does: adb no longer knows the serial number."""
        self.adb("disconnect", self.serials[serial], serial=None).check_returncode()

    def plug(self, serial: int = 0) -> None:
        """Connects again."""
        self._connect(self.serials[serial])

    def kill_adbd(self, serial: int = 0) -> None:
        """Kills the daemon (SIGKILL); what it had started goes on until it notices."""
        self._order({"do": "SIGKILL", "port": self._ports[serial]})

    def start_adbd(self, serial: int = 0) -> None:
        """Starts the daemon again after `kill_adbd`, and connects."""
        self._order({"do": "start", "port": self._ports[serial]})
        self.unplug(serial)  # the server is still trying
        self._connect(self.serials[serial])

    def signal_adbd(self, number: signal.Signals, serial: int = 0) -> None:
        """Sends the daemon a signal: a stopped one (SIGSTOP) answers nothing until SIGCONT."""
        self._order({"do": number.name, "port": self._ports[serial]})

    @property
    def temporary(self) -> Path:
        """The phone's /data/local/tmp as this process sees it, also while unplugged."""
        return self.root / "data/local/tmp"

    def files(self) -> list[str]:
        """All files and directories below /data/local/tmp."""
        return sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))

    def free_bytes(self) -> int:
        """What is free on /data."""
        found = os.statvfs(self.root / "data")
        return found.f_bavail * found.f_frsize

    def fill(self, free_bytes: int) -> None:
        """Fills /data until about this much is free (whole pages)."""
        filler = self.root / "data/filler"
        filler.unlink(missing_ok=True)
        with filler.open("wb") as file:
            while (needed := self.free_bytes() - free_bytes) > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, needed)
                    return
                except OSError as error:  # a push that goes on was faster
                    if error.errno != errno.ENOSPC:
                        raise

    def processes(self) -> list[str]:
        """The command lines of all processes on the phone but adbd, the adb server and process 1."""
        found = []
        for directory in (self.root / "proc").iterdir():
            if directory.name.isdigit() and int(directory.name) not in self._daemons:
                with contextlib.suppress(OSError):  # ended meanwhile
                    line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if line:  # not a process that has ended and waits to be buried
                        found.append(line)
        return sorted(found)

    def set_property(self, name: str, value: str) -> None:
        """Changes what `getprop` says."""
        self._properties[name] = value
        state.write_properties(self._state, self._properties)

    def set_thermal_status(self, status: int | None, has_driver: bool = True) -> None:
        """Changes what `dumpsys thermalservice` says: 0 none, 1 light, 2 moderate, 3 severe ... 6 shutdown.

        None: the service does not answer. Without a thermal driver, Android says 0 and that it has none.
        """
        state.write_thermal(self._state, status, has_driver)

    def set_wakefulness(self, wakefulness: str | None) -> None:
        """Changes what `dumpsys power` says: Awake, Asleep, Dreaming or Dozing; None: nothing."""
        state.write_wakefulness(self._state, wakefulness)

    def set_allowed_frequency(self, policy: int, kilohertz: int) -> None:
        """Changes scaling_max_freq of cpufreq/policy0 or policy4, as a hot phone does."""
        state.write_allowed(self._state, policy, kilohertz)

    def remove_policy(self, policy: int) -> None:
        """Takes cpufreq/policy0 or policy4 away for good, as if its cores were switched off."""
        state.remove_policy(self._state, policy)

    def set_battery(self, battery: state.Battery) -> None:
        """Changes what `dumpsys battery` says."""
        state.write_battery(self._state, battery)

    def benchmark_model(self, path: Path) -> Path:
        """Writes the stand-in for Google's benchmark_model: a program of the phone's ABI for --benchmark_binary."""
        path.write_bytes(launcher(self.abi, "/fixture/bin/benchmark_model_fixture"))
        path.chmod(0o755)
        return path

    def hold(self, after: int = 0) -> None:
        """The stand-in for benchmark_model waits before its recorded runs, from its start number `after` on (from 0).

        The starts are counted from now on.
        """
        (self._state / "starts").write_text("")
        (self._state / "hold").write_text(str(after))

    def wait_until_held(self, seconds: float = 120) -> None:
        """Waits until the stand-in waits.

        Raises:
            TimeoutError: it does not.
        """
        self._wait(lambda: (self._state / "held").exists(), "the stand-in for benchmark_model does not wait", seconds)

    def release(self) -> None:
        """Lets the stand-in go on, and all later ones."""
        (self._state / "hold").unlink()
        (self._state / "held").unlink()

    def wait_for_thermal_look(self, seconds: float = 60) -> None:
        """Waits until somebody has asked for the phone's thermal status, from now on.

        Raises:
            TimeoutError: nobody has.
        """
        looked = self._state / "asked.thermalservice"
        looked.unlink(missing_ok=True)
        self._wait(looked.exists, "nobody asks for the thermal status", seconds)

    def wait_until_tidy(self, seconds: float = 60) -> None:
        """Waits until no process runs on the phone but its daemons.

        Raises:
            TimeoutError: one does.
        """
        self._wait(lambda: not self.processes(), "processes run on the phone", seconds)

    def _wait(self, happened: Callable[[], bool], otherwise: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > until:
                raise TimeoutError(f"{otherwise} after {seconds:g} s: {self.processes()}")
            time.sleep(0.02)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the phone: the kernel kills its first process with unshare, and all its others with the first."""
    with process:  # closes the pipes, waits
        process.kill()


def requiring_authorization(adbd: bytes) -> bytes:
    """Debian's adbd with authorization as on Android.

    Debian's patch for other systems than Android adds one statement to adbd's main function, `auth_required = false`,
    right before getenv("ADB_EXTERNAL_STORAGE"). In the copy that is made here it says true; the rest is adbd's own.

    Args:
        adbd: the x86-64 program (on the emulated phone, any architecture's adbd speaks the same protocol).

    Raises:
        UserError: it is not where this looks for it.
    """
    # mov byte [rax], 0; lea rdi, [rip + name]; call getenv. Code is mapped one page (0x1000) after its place in the
    # file, constants at their place.
    found = [
        match.start() + 2
        for match in re.finditer(rb"\xc6\x00\x00\x48\x8d\x3d(....)\xe8", adbd, re.DOTALL)
        if adbd[match.start() + 10 + 0x1000 + struct.unpack("<i", match[1])[0] :].startswith(b"ADB_EXTERNAL_STORAGE\0")
    ]
    if len(found) != 1:
        raise UserError("This adbd is not the one whose authorization can be switched on: x86_64, Debian 34.0.5.")
    return adbd[: found[0]] + b"\x01" + adbd[found[0] + 1 :]


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    if reason := unavailable(values.abi):
        raise UserError(f"No phone can be emulated here: {reason}.")
    with EmulatedPhone(values.abi, phones=values.phones, authorized=values.authorized) as phone:
        binary = phone.benchmark_model(Path(values.benchmark_binary).absolute())
        print(f"export PATH='{TOOLCHAIN / 'bin'}':\"$PATH\"")
        print(f"export ADB_SERVER_SOCKET='{phone.environment['ADB_SERVER_SOCKET']}'")
        print(f"export MOBIATT_BENCHMARK_MODEL='{binary}'  # test fixture: runs LiteRT's Python package")
        print(f"# its files: {phone.root}; Ctrl-C ends it", flush=True)
        signal.pause()


if __name__ == "__main__":
    flags.DEFINE_enum("abi", "arm64-v8a", list(ARCHITECTURES), "The phone's ABI.")
    flags.DEFINE_integer("phones", 1, "The number of serial numbers.")
    flags.DEFINE_string("benchmark_binary", "runs/phone/benchmark_model_fixture", "Where the stand-in is written.")
    flags.DEFINE_bool("authorized", True, "False: adb reports the phone as unauthorized (x86_64 only).")
    cli.run(main)
