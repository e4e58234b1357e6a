"""What a disk that refuses a write looks like to the user."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from mobiatt_tf.errors import UserError


@contextlib.contextmanager
def disk_errors(what: str, directory: Path) -> Iterator[None]:
    """Turns the errors of Python's and TensorFlow's writers into one `UserError`.

    Args:
        what: is being written, as the subject of a sentence.
        directory: where to.

    Raises:
        UserError: the disk is full, or the directory cannot be written.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        message = error.message if isinstance(error, tf.errors.OpError) else error.strerror or str(error)
        message = re.sub(r"^\{\{.*?\}\}", "", message)  # TensorFlow starts with {{function_node ...}}
        reason = (message.strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} cannot be written to {directory} ({reason}). Make room or give permission there, then run the "
            "same command again: it goes on from the last whole checkpoint."
        ) from error
