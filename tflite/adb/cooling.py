"""Measures on a phone only while it is cool: waits before, looks again after, and repeats what heat spoiled.

A latency counts if before and after it Android's thermal status was NONE and no cores were held below the highest
frequency that they were allowed at any look so far. What a phone reported once it must go on to report: silence does
not count as cool.

Cores may be held low from the start, so that nothing shows how much faster they can be but the silicon's maximum, which
many phones never allow: a warning says so (`tflite.adb.phone.doubts`). If the limit rises later, what was measured
until then counts, but a warning says that it was slower; it is not measured anew, because then the rounds of all graphs
would have to be, and rounds compare graphs with each other, which the same limit met.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from mobiatt_tf.errors import UserError
from tflite.adb.client import Adb
from tflite.adb.phone import UNREPORTED, PhoneState, phone_state

T = TypeVar("T")

_ATTEMPTS = 3
_LOOK_EVERY_SECONDS = 2.0


class Cooling:
    """Guards measurements on one phone against throttling."""

    def __init__(self, adb: Adb, first: PhoneState, most_seconds: float) -> None:
        """Starts with the phone in the state `first`; never waits longer than `most_seconds` at a time."""
        self._adb = adb
        self._best = first
        self._most_seconds = most_seconds
        self._measured = False
        self._spoiled: Counter[str] = Counter()
        self._rises: dict[str, tuple[int, int]] = {}  # by cores: MHz at first, MHz later

    def _look(self) -> tuple[PhoneState, str | None]:
        """The phone's state, and why a latency measured now does not count."""
        state = phone_state(self._adb)
        if self._measured:
            self._rises = rises(self._rises, self._best, state)
        reason = state.throttling(self._best)
        self._best = self._best.best_of(state)
        return state, reason

    def wait(self, progress: "tqdm[object]") -> PhoneState:
        """Waits until the phone does not throttle, and returns its state then.

        Raises:
            UserError: it does not cool down in time.
        """
        began = time.monotonic()
        while True:
            state, reason = self._look()
            if reason is None:
                progress.set_postfix_str("")
                return state
            waited = time.monotonic() - began
            if waited >= self._most_seconds:
                raise UserError(given_up(reason, self._most_seconds))
            progress.set_postfix_str(f"cooling down, {reason}, {waited:.0f} of {self._most_seconds:.0f} s")
            time.sleep(min(_LOOK_EVERY_SECONDS, max(0.05, self._most_seconds - waited)))

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
            self._measured = True
            result = measurement()
            _, reason = self._look()
            if reason is None:
                return result
            self._spoiled[reason] += 1
        raise UserError(
            f"{name}: the phone throttled, or no longer reported its heat, in {_ATTEMPTS} of {_ATTEMPTS} attempts "
            f"(last: {reason}), so no latency is quoted. Shorten the rounds (--runs_per_round), lengthen the pauses "
            "(--cooldown_seconds), use fewer threads, or cool the phone."
        )

    def warnings(self) -> list[str]:
        """What was thrown away, and what was measured with slower cores than the rest."""
        repeated = [f"Rounds that were repeated: {count} ({reason})." for reason, count in self._spoiled.items()]
        return repeated + [
            f"Cores {cores} were held at {low} MHz when measuring started and were allowed {high} MHz later: what was "
            "measured until then is slower. Measure again."
            for cores, (low, high) in self._rises.items()
        ]


def rises(known: dict[str, tuple[int, int]], best: PhoneState, now: PhoneState) -> dict[str, tuple[int, int]]:
    """By cores, the highest frequency in MHz that was allowed at first and the one that is allowed later.

    Args:
        known: those found so far.
        best: the best that was seen of the phone so far.
        now: the phone's state now.
    """
    before = best.allowed()
    higher = {cores: high for cores, high in now.allowed().items() if high > before.get(cores, high)}
    return known | {cores: (known.get(cores, (before[cores],))[0], high) for cores, high in higher.items()}


def given_up(reason: str, seconds: float) -> str:
    """What a person reads if the phone could not be measured within this time for this reason."""
    if reason.startswith(UNREPORTED):
        return (
            f"The{reason.removeprefix('the')}, and did not do so again within {seconds:.0f} s, so no latency is "
            "quoted. Restart the phone and run the same command again."
        )
    return (
        f"The phone throttles ({reason}) and did not cool down within {seconds:.0f} s, so no latency is quoted. Let it "
        "rest outside of its case and away from the sun, or allow more time with --max_cooldown_seconds."
    )
