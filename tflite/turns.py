"""Rounds over several turns (graphs, thread counts), with a progress line: the same on every device."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from tflite.measurements import Plan, rotated

T = TypeVar("T")


def progress(items: Sequence[Any], name: str) -> "tqdm[Any]":
    """A progress line with the time left, on standard error; rarely refreshed where nobody watches."""
    return tqdm(items, desc=name, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30)


def in_turns(plan: Plan, turns: Sequence[T]) -> Iterator[tuple[int, T, "tqdm[Any]"]]:
    """Goes over the turns round by round, each round from another one on; pauses after each round but the last.

    Yields:
        Recorded runs of the round, the turn, and the progress line.
    """
    schedule = [(runs, turn) for number, runs in enumerate(plan.rounds) for turn in rotated(list(turns), number)]
    bar = progress(schedule, "measure")
    for position, (runs, turn) in enumerate(bar):
        yield runs, turn, bar
        end_of_round = (position + 1) % len(turns) == 0
        if end_of_round and position + 1 < len(schedule):
            time.sleep(plan.cooldown_seconds)
