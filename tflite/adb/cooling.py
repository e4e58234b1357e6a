"""Measures on a phone only while it is cool: waits before, looks again after, and repeats what heat spoiled."""

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from mobiatt_tf.errors import UserError
from tflite.adb.client import Adb
from tflite.adb.phone import PhoneState, phone_state

T = TypeVar("T")

_ATTEMPTS = 3
_LOOK_EVERY_SECONDS = 2.0


class Cooling:
    """Guards measurements on one phone against throttling.

    A phone throttles if Android's thermal status is above NONE, or if cores are held below the frequency that they
    were allowed when measuring started.
    """

    def __init__(self, adb: Adb, start: PhoneState, most_seconds: float) -> None:
        """Starts with the phone in the state `start`; never waits longer than `most_seconds` at a time."""
        self._adb = adb
        self._start = start
        self._most_seconds = most_seconds
        self.spoiled: Counter[str] = Counter()

    def wait(self, progress: "tqdm[object]") -> None:
        """Waits until the phone does not throttle.

        Raises:
            UserError: it does not cool down in time.
        """
        began = time.monotonic()
        waiting = False
        while reason := phone_state(self._adb).throttling(self._start):
            waited = time.monotonic() - began
            if waited >= self._most_seconds:
                raise UserError(
                    f"The phone throttles ({reason}) and did not cool down within {self._most_seconds:.0f} s, so no "
                    "latency is quoted. Let it rest outside of its case and away from the sun, or allow more time "
                    "with --max_cooldown_seconds."
                )
            progress.set_postfix_str(f"cooling down, {reason}, {waited:.0f} of {self._most_seconds:.0f} s")
            waiting = True
            time.sleep(min(_LOOK_EVERY_SECONDS, max(0.05, self._most_seconds - waited)))
        if waiting:
            progress.set_postfix_str("")

    def measure(self, name: str, measurement: Callable[[], T], progress: "tqdm[object]") -> T:
        """The result of a measurement before and after which the phone did not throttle.

        Args:
            name: what is measured, as the error names it.
            measurement: measures once; repeated where the phone throttled afterwards.
            progress: shows that the phone is waited for.

        Raises:
            UserError: the phone throttles again and again.
        """
        for _ in range(_ATTEMPTS):
            self.wait(progress)
            result = measurement()
            reason = phone_state(self._adb).throttling(self._start)
            if reason is None:
                return result
            self.spoiled[reason] += 1
        raise UserError(
            f"{name}: the phone throttled in {_ATTEMPTS} of {_ATTEMPTS} attempts (last: {reason}), so no latency is "
            "quoted. Shorten the rounds (--runs_per_round), lengthen the pauses (--cooldown_seconds), use fewer "
            "threads, or cool the phone."
        )

    def warnings(self) -> list[str]:
        """What was thrown away, for the report."""
        return [f"{count} rounds were repeated because of {reason}." for reason, count in self.spoiled.items()]
