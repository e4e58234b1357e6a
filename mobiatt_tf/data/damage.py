"""What to say of an image that could be read when it was checked and cannot be read now."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from mobiatt_tf.data.dataset import Split
from mobiatt_tf.data.decoding import decode_image
from mobiatt_tf.data.records import image_bytes
from mobiatt_tf.errors import first_line


def first_unreadable(split: Any, indices: Iterable[int]) -> tuple[str, str] | None:
    """The first of some examples that cannot be read, and why; None if all can.

    Args:
        split: with files or records; arrays can always be read. A split with masks has two images for an example.
        indices: which examples, in order; what follows the first unreadable one is not looked at.
    """
    parts = [split] if isinstance(split, Split) else [split.images, *([split.masks] if hasattr(split, "masks") else [])]
    readers = [(part, image_bytes(part)) for part in parts if part.images is None]
    for index in indices if readers else ():
        for part, read in readers:
            try:
                decode_image(read(tf.constant(index, tf.int64)))
            except tf.errors.OpError as error:
                return part.name_of(index), first_line(error)
    return None
