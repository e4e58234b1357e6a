"""What a benchmark puts on the phone, and that it is gone afterwards.

`/data/local/tmp/mobiatt/cache/<SHA-256>` holds models and programs that were verified there; it stays, unless the
caller wants it gone. `run.<random>` beside it belongs to one benchmark: half-pushed files and the number of the running
process. A keeper, one more shell on the phone, waits for the end of its input, then kills what still runs and removes
the directory. Its input ends with the benchmark, however that ends: Ctrl-C, a kill, or the cable pulled out.
"""

import contextlib
import re
import secrets
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite.adb.client import Adb, Output

ROOT = "/data/local/tmp/mobiatt"  # Android's shell may write and run programs in /data/local/tmp
CACHE = f"{ROOT}/cache"
_SWEEPS = 3
_MISSING = 127  # a shell's status for a command that is not there
_CHECKSUM_SECONDS = 300.0
_READY_SECONDS = 30.0
_CLOSE_SECONDS = 30.0
_SPARE_BYTES = 4 << 20  # beside the files: for the file system's own needs and the keeper's

# `pid` holds the number of the running process and that of its group, whose leader is the shell that adbd started.
# The process is looked at before anything is killed: numbers are used again.
_KILL = (
    "f={directory}/pid; p= g=; [ -f $f ] && read p g <$f; "
    'case "$(cat /proc/${{p:-none}}/cmdline 2>/dev/null)" in *mobiatt*) kill -9 -$g; kill -9 $p;; esac'
)


class PhoneStorage:
    """The directories of one benchmark on a phone; a context manager, so that they are gone at its end."""

    def __init__(self, adb: Adb, clean: bool = False) -> None:
        """Prepares; nothing is on the phone before the block is entered.

        Args:
            adb: the phone.
            clean: at the end remove the cache, too.
        """
        self._adb = adb
        self._clean = clean
        self.directory = f"{ROOT}/run.{secrets.token_hex(4)}"
        self._keeper: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Removes what benchmarks that died left there, then makes the directory.

        Raises:
            UserError: another benchmark is running on the phone, or its storage is full or cannot be written.
        """
        self._sweep()  # first, because what was left may be what fills the storage
        self._keeper = subprocess.Popen(
            self._adb.command("shell", self._keeper_script()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which closes the keeper's input
        )
        try:
            answer = self._read_answer()
            if answer != "ready":
                if "No space left" in answer:
                    raise UserError(f"The phone's storage is full: {ROOT} cannot be written. Free some space there.")
                raise UserError(f"{ROOT} on the phone cannot be written: {answer or 'the phone went away'}.")
            self._sweep()  # again, for one that started at the same time
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _sweep(self) -> None:
        """Removes the directories of benchmarks that died.

        Raises:
            UserError: one is alive.
        """
        script = (
            f"for d in {ROOT}/run.*; do [ -d $d ] && [ $d != {self.directory} ] || continue; "
            "[ -f $d/keeper ] || sleep 1; p=$(cat $d/keeper); "  # its keeper may be about to note its number
            'case "$(cat /proc/${p:-none}/cmdline)" in *$(basename $d)*) echo busy;; '
            f"*) {_KILL.format(directory='$d')}; rm -rf $d;; esac; done 2>/dev/null"
        )
        for attempt in range(_SWEEPS):  # one that has just ended is tidied up within moments
            if "busy" not in self._adb.shell(script).out.split():
                return
            if attempt + 1 < _SWEEPS:
                time.sleep(1)
        raise UserError("Another benchmark is running on this phone. Wait until it has ended: both would be slowed.")

    def _keeper_script(self) -> str:
        """First the trap: adbd sends SIGHUP when the connection breaks, which must not end the tidying."""
        gone = f"{self.directory}.gone"  # renamed first, so that nothing new is noted in it
        return (
            f"trap '' HUP INT TERM; mkdir -p {CACHE} {self.directory} && echo $$ >{self.directory}/keeper "
            f"&& echo ready && cat >/dev/null; mv {self.directory} {gone} 2>/dev/null; "
            f"{_KILL.format(directory=gone)} 2>/dev/null; rm -rf {gone} {self.directory}; "
            f"{f'rm -rf {CACHE}; ' if self._clean else ''}rmdir {CACHE} {ROOT} 2>/dev/null; exit 0"
        )

    def _read_answer(self) -> str:
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        until = time.monotonic() + _READY_SECONDS
        while (left := until - time.monotonic()) > 0:
            if select.select([self._keeper.stdout], [], [], left)[0]:
                return self._keeper.stdout.readline().strip()
        return f"no answer within {_READY_SECONDS:.0f} s"

    def close(self) -> None:
        """Ends what runs on the phone and removes the directory; waits until that is done."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with contextlib.suppress(OSError):  # a phone that went away: the keeper's input ended there, too
            keeper.stdin.close()
        try:
            keeper.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
            print(
                f"The phone does not answer. What is left in {self.directory} goes when it does, or with the next run.",
                file=sys.stderr,
            )
        finally:
            keeper.stdout.close()

    def provide(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Puts files into the cache, unless they are there already and whole.

        Returns:
            Each file's path on the phone.

        Raises:
            UserError: the phone has no room, cannot make checksums, or the files do not arrive whole.
        """
        hashes = {path: files.sha256(path) for path in dict.fromkeys(paths)}
        found = self._cached(sorted(set(hashes.values())))
        missing = {digest: path for path, digest in hashes.items() if digest not in found}
        if missing:
            total = sum(path.stat().st_size for path in missing.values())
            self._check_room(total)
            with tqdm(desc="push", total=total, unit="B", unit_scale=True, leave=False) as progress:
                for digest, path in missing.items():
                    self._push(path, digest)
                    progress.update(path.stat().st_size)
        return {path: f"{CACHE}/{digest}" for path, digest in hashes.items()}

    def _cached(self, digests: Sequence[str]) -> set[str]:
        """Those of the digests whose file is in the cache and whole; damaged ones are removed."""
        names = " ".join(digests)
        listed = self._adb.shell(
            f"command -v sha256sum >/dev/null || exit {_MISSING}; "
            f"cd {CACHE} && for n in {names}; do [ -f $n ] && sha256sum $n; done",
            _CHECKSUM_SECONDS,
            f"Looking through {CACHE} on the phone",
        )
        if listed.status == _MISSING:
            raise UserError(
                "The phone lacks the command sha256sum (its Android is too old), so nothing tells whether files arrive "
                "whole there. Take a phone with a newer Android."
            )
        found = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64}) +(\S+)$", listed.out, re.MULTILINE)}
        if damaged := [name for name, digest in found.items() if name != digest]:
            self._adb.shell(["rm", "-f", *(f"{CACHE}/{name}" for name in damaged)])
        return {name for name, digest in found.items() if name == digest}

    def _check_room(self, needed: int) -> None:
        free = parse_free(self._adb.shell(["df", "-k", CACHE]).out)
        if free is not None and free < needed + _SPARE_BYTES:
            raise UserError(
                f"The phone's storage is full: {(needed + _SPARE_BYTES) / 1e6:.1f} MB are needed in {ROOT}, "
                f"{free / 1e6:.1f} MB are free. Free {(needed + _SPARE_BYTES - free) / 1e6:.1f} MB on the phone."
            )

    def _push(self, path: Path, digest: str) -> None:
        partial = f"{self.directory}/partial"
        self._adb.push(path, partial)
        listed = self._adb.shell(["sha256sum", partial], _CHECKSUM_SECONDS, f"The checksum of {path} on the phone")
        if listed.out.split()[:1] != [digest]:
            raise UserError(f"{path} did not arrive whole on the phone ({listed.text.strip() or 'no checksum'}).")
        moved = self._adb.shell(f"chmod 755 {partial} && mv {partial} {CACHE}/{digest}")
        if moved.status != 0:
            raise UserError(f"{path} could not be kept on the phone: {moved.text.strip()}.")

    def execute(self, command: Sequence[str], seconds: float, what: str) -> Output:
        """Runs a program in the directory; it is killed if this benchmark ends first.

        Args:
            command: the program and its arguments.
            seconds: how long it may take.
            what: names it if it takes longer.

        Raises:
            LostPhoneError: the phone went away, or it takes longer than `seconds`.
        """
        note = f"{self.directory}/pid"
        script = (
            "read a b c d group rest </proc/$$/stat; "  # the fifth field of proc(5)'s stat is the process group
            f"echo $$ $group >{note} && cd {self.directory} && exec {shlex.join(command)}"
        )
        return self._adb.shell(f"sh -c {shlex.quote(script)}; s=$?; rm -f {note}; exit $s", seconds, what)


def parse_free(text: str) -> int | None:
    """Free bytes, of the output of `df -k`; None if it has another form."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    with contextlib.suppress(ValueError, IndexError):
        return int(lines[-1][lines[0].index("Available")]) * 1024
    return None
