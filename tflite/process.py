"""Starts `tflite.worker` processes and talks to them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mobiatt_tf.errors import UserError


def signal_name(number: int) -> str:
    """As a person reads it: "SIGSEGV", or "signal 99" where this system knows none."""
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


class Worker:
    """A child process that holds at most one model; a context manager, so that none outlives its use."""

    def __init__(
        self,
        subject: str,
        python: str = sys.executable,
        module: str = "tflite.worker",
        path: Sequence[str] | None = None,
        runtime: str = "LiteRT",
    ) -> None:
        """Starts the process.

        Args:
            subject: what the process works on, as error messages name it: a file's path.
            python: the interpreter; one of another environment has other packages.
            module: what it runs; answers requests as `tflite.worker` does.
            path: where it finds modules; None: where this process does, which Bazel and tests may have arranged.
            runtime: what executes the model, as error messages name it.
        """
        self.subject = subject
        self._runtime = runtime
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in (sys.path if path is None else path))},
            start_new_session=True,  # Ctrl-C is for the parent, which still asks for the results so far
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def request(self, do: str, *, timeout_seconds: float | None = None, **arguments: Any) -> Any:
        """Sends one request and waits for its value.

        Raises:
            UserError: the request failed, the process died on it, or it took longer than `timeout_seconds`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_seconds or 0, self._process.kill)
        timer.daemon = True
        if timeout_seconds is not None:
            timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        late = timer.finished.is_set()
        timer.cancel()
        if not line.endswith(b"\n"):
            reason = f"no answer within {timeout_seconds:g} s" if late and timeout_seconds else self._last_words()
            raise UserError(f"{self.subject}: {reason}")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.subject}: {reply['error']}")
        return reply["value"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        last = f" (last message: {lines[-1]})" if lines else ""
        if code < 0:
            return f"the {self._runtime} runtime ended with {signal_name(-code)}{last}"
        return f"the process that runs the model ended with status {code}{last}"

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that the child did not live to read
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
