"""The one place that imports coremltools: late, and without its warnings about versions that it was not tested with."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from mobiatt_tf.errors import UserError, first_line

# Specification version of each deployment target (coremltools/__init__.py), by the major version of iOS.
SPECIFICATION_VERSIONS = {15: 6, 16: 7, 17: 8, 18: 9}


def coremltools() -> Any:
    """The package coremltools.

    Raises:
        UserError: it is not installed.
    """
    with quiet():
        try:
            import coremltools
        except ImportError as error:
            raise UserError("Core ML needs coremltools: pip install mobiatt-tf[coreml].") from error
    return coremltools


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silences coremltools' log and, unless `bars`, its progress bars; errors are raised all the same."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        # Its progress bars and notes of scikit-learn's version; and it leaves temporary directories to the collector.
        hidden = contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO())
        with hidden, warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Explains what coremltools' writer of weights raises where it cannot write, to a temporary directory too.

    Raises:
        UserError: `what` cannot be written.
    """
    try:
        yield
    except RuntimeError as error:
        if "MIL FileWriter" not in str(error):
            raise
        raise UserError(f"{what} cannot be written ({first_line(error)}). Is the disk full?") from error


def target(ios: int) -> Any:
    """coremltools' deployment target for a major version of iOS.

    Raises:
        ValueError: another version than those of `SPECIFICATION_VERSIONS`.
    """
    if ios not in SPECIFICATION_VERSIONS:
        allowed = ", ".join(map(str, SPECIFICATION_VERSIONS))
        raise ValueError(f"There is no deployment target iOS {ios} here. Choose one of {allowed}.")
    return getattr(coremltools().target, f"iOS{ios}")
