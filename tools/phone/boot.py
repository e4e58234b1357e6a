"""The first process of an emulated phone: mounts its files, starts its daemons, obeys EmulatedPhone.

Run by `tools.phone.emulated` in user, network, mount and process namespaces of its own, where it is root and process 1.
The first line of standard input describes the phone (JSON), every further line is an order; each is answered by a line
of JSON on standard output. When it ends, the kernel ends every process of the phone and drops all mounts.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_START_SECONDS = 30
_ADBD = "/usr/lib/android-sdk/platform-tools/adbd"
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # linux/mount.h
_DEVICES = ("null", "zero", "random", "urandom")

# A 64-bit little-endian ELF executable or shared object (e_type 2 or 3) for AArch64 (e_machine 183); the fields that
# vary are masked. https://docs.kernel.org/admin-guide/binfmt-misc.html
_MAGIC = bytes.fromhex("7f454c460201010000000000000000000200b700")
_MASK = bytes.fromhex("ffffffffffffff00fffffffffffffffffeffffff")


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2).

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {kind or 'bind'} on {target}: {os.strerror(number)}")


def bind(source: str | Path, target: str | Path) -> None:
    """Shows a file or directory at a second place."""
    mount(str(source), target, flags=_MS_BIND | _MS_REC)


def start_loopback() -> None:
    """Switches the network namespace's loopback interface on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", request)[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | 1))


def emulate_aarch64(qemu: str) -> None:
    """Lets the kernel start AArch64 programs through QEMU, in this user namespace only (Linux 6.7 and newer)."""
    directory = Path("/proc/sys/fs/binfmt_misc")
    mount("binfmt_misc", directory, "binfmt_misc")
    if (directory / "phone-aarch64").exists():
        raise OSError("this kernel has one binfmt_misc for all namespaces; Linux 6.7 and newer have one for each")
    magic, mask = ("".join(f"\\x{byte:02x}" for byte in value) for value in (_MAGIC, _MASK))
    # P: QEMU is told the program's own argv[0]; F: QEMU is opened now, so that it need not be among the phone's files.
    (directory / "register").write_text(f":phone-aarch64:M::{magic}:{mask}:{qemu}:PF")


def mount_phone(phone: dict[str, Any]) -> None:
    """The phone's file system at phone["root"]: Debian's files read-only, /data, /proc, /sys, /dev and /fixture."""
    root = Path(phone["root"])
    mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    bind(phone["files"], root)
    mount("none", root, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY)
    mount("tmpfs", root / "data", "tmpfs", data=f"size={phone['data_bytes']},mode=771")
    (root / "data/local/tmp").mkdir(parents=True)
    bind(phone["state"], root / "fixture")
    bind(Path(phone["state"], "sys"), root / "sys")
    mount("proc", root / "proc", "proc")
    bind(Path(phone["state"], "cpuinfo"), root / "proc/cpuinfo")
    mount("tmpfs", root / "dev", "tmpfs", data="mode=755")
    for name in _DEVICES:
        (root / "dev" / name).touch()
        bind(Path("/dev", name), root / "dev" / name)
    (root / "dev/pts").mkdir()
    mount("devpts", root / "dev/pts", "devpts", data="newinstance,ptmxmode=666")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    if phone["adbd"] is not None:
        bind(phone["adbd"], root / _ADBD.lstrip("/"))


def enter(root: str) -> None:
    """Makes the directory this process's "/"."""
    os.chroot(root)
    os.chdir("/")


def start_adbd(phone: dict[str, Any], port: int) -> subprocess.Popen[bytes]:
    """Starts adbd in the phone's files and waits until it listens."""
    environment = {
        "ADBD_PORT": str(port),
        "PATH": "/fixture/bin:/fixture/commands",  # links to those of /system/bin that the phone has
        "HOME": "/data/local/tmp",
        "TMPDIR": "/data/local/tmp",
        "ANDROID_DATA": "/data",
        "QEMU_CPU": "cortex-a76",
    }
    with Path(phone["state"], f"adbd-{port}.log").open("ab") as log:
        process = subprocess.Popen(
            [_ADBD],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: enter(phone["root"]),
        )
    wait_until(lambda: listens(port), process, f"adbd on port {port}")
    return process


def start_server(phone: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Starts the adb server on its UNIX socket."""
    path = phone["socket"]
    with Path(phone["state"], "server.log").open("ab") as log:
        process = subprocess.Popen(
            [phone["adb"], "-L", f"localfilesystem:{path}", "server", "nodaemon"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_until(lambda: os.path.exists(path), process, "the adb server")
    return process


def listens(port: int) -> bool:
    """Whether a process of this network namespace listens on the TCP port (state 0A in Linux's tables)."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return any(row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows)


def wait_until(happened: Any, process: subprocess.Popen[bytes], name: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not happened():
        if process.poll() is not None:
            raise OSError(f"{name} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise OSError(f"{name} is not ready after {_START_SECONDS} s")
        time.sleep(0.01)


def reap(known: list[subprocess.Popen[bytes]]) -> None:
    """Buries orphans, as process 1 must; the daemons that are known are left to their objects."""
    known_ids = {process.pid for process in known}
    # A signal may come while another is handled: then somebody else has buried the child, or all of them.
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in known_ids:
                return
            os.waitpid(ended.si_pid, 0)


def main() -> None:
    phone = json.loads(sys.stdin.readline())
    outer_id = int(os.readlink("/proc/self"))  # the process's number where /proc was mounted: outside
    try:
        start_loopback()
        if phone["qemu"] is not None:
            emulate_aarch64(phone["qemu"])
        mount_phone(phone)
        daemons = {port: start_adbd(phone, port) for port in phone["ports"]}
        server = start_server(phone)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return

    def answer(**values: Any) -> None:
        numbers = [os.getpid(), server.pid, *(daemon.pid for daemon in daemons.values())]
        print(json.dumps(values | {"daemons": numbers}), flush=True)

    answer(id=outer_id)
    signal.signal(signal.SIGCHLD, lambda *_: reap([server, *daemons.values()]))
    for line in sys.stdin:
        order = json.loads(line)
        port = order["port"]
        if order["do"] == "start":
            daemons[port] = start_adbd(phone, port)
        else:  # the name of a signal for adbd
            daemons[port].send_signal(signal.Signals[order["do"]])
            if order["do"] == "SIGKILL":
                daemons[port].wait()
        answer()


if __name__ == "__main__":
    main()
