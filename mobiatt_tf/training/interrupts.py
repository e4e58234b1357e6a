"""SIGTERM and Ctrl-C: finish the step, save, say how to go on."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupted(Exception):  # noqa: N818 (like KeyboardInterrupt, it is no error)
    """A signal stopped some work, of which nothing is lost.

    Attributes:
        exit_status: 128 plus the signal's number, the shell's convention: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {text}")
        self.exit_status = 128 + signal_number


class TrainingInterrupted(Interrupted):
    """A signal stopped the training after a checkpoint was written."""

    def __init__(self, signal_number: int, step: int, total_steps: int) -> None:
        super().__init__(signal_number, f"saved at step {step} of {total_steps}. The same command goes on from there.")


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying; a second one ends the process at once.

    A context manager. Outside of the main thread Python allows no handlers, and signals act as before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
