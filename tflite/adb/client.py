"""Talks to one phone through the `adb` program, and says in a person's words what is wrong with the connection."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobiatt_tf import files
from mobiatt_tf.errors import UserError

_CALL_SECONDS = 60.0  # anything but transfers and measurements; a phone that is awake answers within a second
_PUSH_SECONDS_PER_MEGABYTE = 2.0  # USB 2 moves some 30 MB a second, a poor wireless connection 1
_NO_SERIAL = "(no serial number)"  # as `adb devices` prints it
_END = "mobiatt-end:"  # a connection that breaks can look like success: what ends without this line was cut off
_INSTALL = "Install it (Debian: apt-get install adb; elsewhere: Android's SDK Platform Tools) or give --adb=PATH."
_SWITCH_ON = "Connect a phone on which USB debugging is switched on (Settings, Developer options)"


@dataclass(frozen=True)
class Connected:
    """One line of `adb devices`: `state` is "device" where the phone can be used; `model` may be empty.

    A phone without a serial number has the one that adb prints, "(no serial number)".
    """

    serial: str
    state: str
    model: str


@dataclass(frozen=True)
class Output:
    """What a command on the phone printed, both streams, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output, then standard error."""
        return self.out + ("\n" if self.out and not self.out.endswith("\n") else "") + self.err


class LostPhoneError(UserError):
    """The phone went away, so nothing can be asked of it any more."""


def find_adb(given: str | None) -> str:
    """The path of the adb program: the given one, or that on PATH.

    Raises:
        UserError: there is none.
    """
    # A name without a slash is looked for on PATH. `user_path` drops the "./" that says that a name is none of these.
    wanted = str(files.user_path(given).absolute()) if given and "/" in given else given
    found = shutil.which(wanted or "adb")
    if found is None:
        what = f"--adb={given} is no program that can be run" if given else "The program adb is not on PATH"
        raise UserError(f"{what}. {_INSTALL}")
    return found


def parse_devices(text: str) -> list[Connected]:
    """The phones that `adb devices -l` lists."""
    lines = text.partition("List of devices attached")[2].splitlines()
    found = []
    for line in lines:
        # No other serial has a space; a state may have: "no permissions (user in plugdev group ...)".
        match = re.match(rf"({re.escape(_NO_SERIAL)}|\S+)\s+(no permissions|\S+)(.*)", line)
        if match and not line.startswith("*"):
            model = re.search(r"\bmodel:(\S+)", match[3])
            found.append(Connected(match[1], match[2], model[1].replace("_", " ") if model else ""))
    return found


def choose(connected: Sequence[Connected], serial: str | None) -> Connected:
    """The phone to use.

    Args:
        connected: what adb sees.
        serial: the one that is asked for; None: the only one there is.

    Raises:
        UserError: it is not there, cannot be used, or there are several and none is asked for.
    """
    if not connected:
        asked = f" with serial {serial}" if serial else ""
        raise UserError(f"No phone{asked} is connected. {_SWITCH_ON}, and look at the output of `adb devices`.")
    listed = ", ".join(f"{one.serial} ({one.model or one.state})" for one in connected)
    if serial is None and len(connected) > 1:
        raise UserError(f"{len(connected)} phones are connected: {listed}. Say which one with --serial=SERIAL.")
    chosen = connected[0] if serial is None else next((one for one in connected if one.serial == serial), None)
    if chosen is None:
        raise UserError(f"No phone with serial {serial} is connected. Connected: {listed}.")
    if chosen.serial == _NO_SERIAL:
        model = f" ({chosen.model})" if chosen.model else ""
        raise UserError(
            f"The connected phone{model} has no serial number, so adb cannot be told to use it. Connect it without a "
            "cable (`adb tcpip 5555`, then `adb connect ADDRESS`): then its address stands for one."
        )
    if chosen.state != "device":
        raise UserError(_unusable(chosen.serial, chosen.state))
    return chosen


def _unusable(serial: str, state: str) -> str:
    """Why a phone in this state of `adb devices` cannot be used, and what helps."""
    if state in ("unauthorized", "authorizing"):
        return (
            f"The phone {serial} does not trust this computer yet (adb: unauthorized). Unlock it, confirm the dialog "
            '"Allow USB debugging?", and run the same command again.'
        )
    if state == "offline":
        return f"The phone {serial} does not answer (adb: offline). Unlock it, plug it in again, and run this again."
    if state == "no permissions":
        return (
            f"This user may not open the phone {serial} (adb: no permissions). Install udev rules (Debian: apt-get "
            "install android-sdk-platform-tools-common), then plug the phone in again."
        )
    return f"The phone {serial} is in state {state}. Start Android on it, and run the same command again."


class Adb:
    """Runs adb for one phone. Every call has a time limit; the environment (ADB_SERVER_SOCKET ...) is adb's own."""

    def __init__(self, program: str, serial: str) -> None:
        self.program = program
        self.serial = serial

    @classmethod
    def connect(cls, program: str, serial: str | None) -> "Adb":
        """The phone with this serial (or with ANDROID_SERIAL, or the only one).

        Raises:
            UserError: it is not there or cannot be used, or there are several.
        """
        listed = _run([program, "devices", "-l"], _CALL_SECONDS)
        if listed.status != 0:
            raise UserError(f"`adb devices` failed: {_last_line(listed.text)}.")
        chosen = choose(parse_devices(listed.out), serial or os.environ.get("ANDROID_SERIAL") or None)
        adb = cls(program, chosen.serial)
        if "shell_v2" not in _run(adb.command("features"), _CALL_SECONDS).out.split():
            raise UserError(f"The phone {chosen.serial} is too old: its adb reports no exit status (Android 7 does).")
        return adb

    def command(self, *arguments: str) -> list[str]:
        """The command line of adb for this phone."""
        return [self.program, "-s", self.serial, *arguments]

    def state(self) -> str:
        """The phone's state as `adb devices` names it; "absent" where adb does not see it."""
        listed = _run([self.program, "devices"], _CALL_SECONDS)
        return next((one.state for one in parse_devices(listed.out) if one.serial == self.serial), "absent")

    def shell(self, script: str | Sequence[str], seconds: float = _CALL_SECONDS, what: str | None = None) -> Output:
        """Runs a script of the phone's shell, or one command given as its words.

        Args:
            script: the script or the words.
            seconds: how long it may take.
            what: names it where it may take long; None: the phone answers at once, unless something is wrong with it.

        Raises:
            LostPhoneError: the connection broke, or it took longer than `seconds`.
        """
        text = script if isinstance(script, str) else shlex.join(script)
        # In a subshell, so that an `exit` of the script does not skip the line that says that all of it arrived.
        output = _run(self.command("shell", "-n", f"({text}\n); s=$?; echo; echo {_END}$s"), seconds, what)
        body, mark, status = output.out.rpartition(f"\n{_END}")
        if not mark or not status.strip().isdecimal():
            self.explain_loss(output)
        return Output(int(status), body, output.err)

    def push(self, local: Path, remote: str) -> None:
        """Copies a file to the phone.

        Raises:
            LostPhoneError: the connection broke, or the phone does not answer.
            UserError: the phone has no room or does not take the file.
        """
        seconds = _CALL_SECONDS + local.stat().st_size / 1e6 * _PUSH_SECONDS_PER_MEGABYTE
        # Absolute: adb takes a name that begins with a dash for an option.
        output = _run(self.command("push", str(local.absolute()), remote), seconds, f"Copying {local}")
        if output.status == 0:
            return
        if "No space left on device" in output.text:
            raise UserError(f"The phone's storage is full: {local.name} did not fit. Free some space on the phone.")
        if self.state() != "device":
            self.explain_loss(output)
        raise UserError(f"{local} could not be copied to the phone: {_last_line(output.text)}.")

    def explain_loss(self, output: Output) -> None:
        """Raises the error that says what became of the phone; `output` is that of the call that noticed."""
        state = self.state()
        if state in ("unauthorized", "authorizing", "no permissions"):
            raise LostPhoneError(_unusable(self.serial, state))
        # Beside adb's own words, standard error has those of the program on the phone.
        own = [line for line in output.err.splitlines() if line.startswith(("error: ", "adb: "))]
        said = own[-1].removeprefix("adb: ").removeprefix("error: ").rstrip(".") if own else "the connection broke"
        raise LostPhoneError(
            f"The phone {self.serial} went away in the middle (adb: {said}): unplugged, switched off or asleep? "
            "Connect it again and run the same command."
        )


def _run(command: list[str], seconds: float, what: str | None = None) -> Output:
    try:
        # A session of its own: Ctrl-C is for the parent, which has something to tidy up on the phone first.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        if what is None:
            message = f"The phone did not answer within {seconds:.0f} s. Unlock it and plug it in again."
        else:
            message = f"{what} took longer than {seconds:.0f} s, so it was given up."
        raise LostPhoneError(message) from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror}. {_INSTALL}") from None
    return Output(done.returncode, done.stdout.replace("\r\n", "\n"), done.stderr.replace("\r\n", "\n"))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no message"
