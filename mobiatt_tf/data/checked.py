"""Files that are looked into once: what was found is kept as long as a file's size and time stay the same."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import write_bytes

_BLOCK = 4096  # files
_PROGRESS_FROM = 1000  # files; fewer are checked in about a second
_NAMES_SHOWN = 10

_Verdict = tuple[int, int, tuple[Any, ...]]  # size and time of the last change, and what was found


def check_files(
    root: Path,
    paths: Sequence[str],
    store_directory: Path,
    *,
    examine: Callable[[str], tuple[Any, ...]],
    kinds: tuple[type, ...],
    rules: int,
    title: str,
) -> dict[str, tuple[Any, ...]]:
    """Examines every file that is new or has changed since the last time; keeps what it found, even if interrupted.

    Args:
        root: the directory that all belongs to; findings are kept for each root.
        paths: the files.
        store_directory: where findings are kept, one JSON file for each root.
        examine: what is found out about a path: a string of what is wrong with the file, "" for nothing, and more. It
            runs in threads.
        kinds: the types of what `examine` returns, str first. They can be called without arguments.
        rules: one more whenever `examine` decides otherwise than before: what older rules found is found out again.
        title: what the progress bar says.

    Returns:
        What was found for each path. A file that is not there has the reason first, then the values of empty `kinds`.
    """
    store = store_directory / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"
    known = _read_verdicts(store, kinds, rules)
    found: dict[str, tuple[Any, ...]] = {}
    states: dict[str, tuple[int, int]] = {}
    unknown: list[str] = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # a dangling link; a name that no file can have
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else "no file can have that name"
            found[path] = (reason, *(kind() for kind in kinds[1:]))
            continue
        states[path] = (status.st_size, status.st_mtime_ns)
        verdict = known.get(path)
        if verdict is not None and verdict[:2] == states[path]:
            found[path] = verdict[2]
        else:
            unknown.append(path)
    if not unknown:
        return found

    done = {path: found[path] for path in states if path in found}
    try:
        for path, result in _examine_all(unknown, examine, title):
            found[path] = done[path] = result
    finally:
        files = {path: [*states[path], *result] for path, result in done.items()}
        try:
            write_bytes(store, json.dumps({"rules": rules, "root": str(root), "files": files}).encode())
        except (UserError, OSError) as error:
            logging.warning("What the check of %s found is not kept: %s", root, error)
    return found


def _read_verdicts(store: Path, kinds: tuple[type, ...], rules: int) -> dict[str, _Verdict]:
    """An unreadable store is no reason to stop: the files are checked again."""
    try:
        content = json.loads(store.read_text())
        files = content["files"] if content["rules"] == rules else {}
        return {
            path: (int(size), int(time), tuple(kind(value) for kind, value in zip(kinds, values, strict=True)))
            for path, (size, time, *values) in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _examine_all(
    paths: list[str], examine: Callable[[str], tuple[Any, ...]], title: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    from tqdm import tqdm

    # TensorFlow decodes without holding Python's lock, so threads use all cores.
    with (
        ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool,
        tqdm(desc=title, total=len(paths), unit=" images", disable=len(paths) < _PROGRESS_FROM) as progress,
    ):
        for start in range(0, len(paths), _BLOCK):  # a pool holds on to all it is given at once
            block = paths[start : start + _BLOCK]
            for path, result in zip(block, pool.map(examine, block), strict=True):
                yield path, result
                progress.update()


def is_utf8(path: str) -> bool:
    """Whether TensorFlow can be given a path. Python marks bytes that are not UTF-8 by code points without a coding."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str) -> str:
    """The path, with bytes that are not UTF-8 as \\xff, so that it can be written anywhere.

    Names that no file can have are written too: NUL, and surrogates that stand for no byte, as JSON may have them.
    """
    path = re.sub("[\0\ud800-\udc7f\udd00-\udfff]", lambda found: ascii(found[0])[1:-1], path)
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def first_names(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are: what an error message can hold."""
    shown = list(map(printable, names))
    more = len(shown) - _NAMES_SHOWN
    return ", ".join(shown[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
