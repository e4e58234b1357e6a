"""What to say of an image that could be read when it was checked and cannot be read now."""

from collections.abc import Iterable

import tensorflow as tf

from mobiatt_tf.data.dataset import Split
from mobiatt_tf.data.decoding import decode_image
from mobiatt_tf.data.records import image_bytes
from mobiatt_tf.errors import first_line


def first_unreadable(split: Split, indices: Iterable[int]) -> tuple[str, str] | None:
    """The first of some examples that cannot be read, and why; None if all can.

    Args:
        split: with files or records; arrays can always be read.
        indices: which examples, in order; what follows the first unreadable one is not looked at.
    """
    if split.images is not None:
        return None
    read = image_bytes(split)
    for index in indices:
        try:
            decode_image(read(tf.constant(index, tf.int64)))
        except tf.errors.OpError as error:
            return split.name_of(index), first_line(error)
    return None
