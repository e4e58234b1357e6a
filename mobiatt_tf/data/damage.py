"""What to say of an image that could be read when it was checked and cannot be read now."""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from mobiatt_tf.data.dataset import Split
from mobiatt_tf.data.decoding import decode_image
from mobiatt_tf.data.dense import SegmentationSplit
from mobiatt_tf.data.reading import image_reader, mask_reader
from mobiatt_tf.data.records import image_bytes
from mobiatt_tf.errors import first_line


def first_unreadable(split: Any, indices: Iterable[int]) -> tuple[str, str] | None:
    """The first of some examples that cannot be read, and why; None if all can.

    Args:
        split: with files or records; arrays can always be read. Of a split with masks both images of an example are
            read as the pipelines do, and must have the same size.
        indices: which examples, in order; what follows the first unreadable one is not looked at.
    """
    if isinstance(split, Split):
        if split.images is not None:
            return None
        read = image_bytes(split)
        parts = [(split, lambda index: decode_image(read(index)))]
    else:
        parts = [(split.images, image_reader(split))]
    if isinstance(split, SegmentationSplit):
        parts.append((split.masks, _in_pipeline(mask_reader(split))))
    for index in indices:
        sizes = []
        for part, read_part in parts:
            try:
                sizes.append(tuple(read_part(tf.constant(index, tf.int64)).shape[:2]))
            except tf.errors.OpError as error:
                return part.name_of(index), _reason(error)
            if sizes[-1] != sizes[0]:
                (height, width), (image_height, image_width) = sizes[-1], sizes[0]
                reason = f"it has {height} x {width} pixels, its image {image_height} x {image_width}"
                return part.name_of(index), reason
    return None


def _in_pipeline(read: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    """The same in a pipeline, where an exception of Python code, as of Pillow, becomes one of `tf.errors`."""
    return lambda index: tf.data.Dataset.from_tensors(index).map(read).get_single_element()


def _reason(error: tf.errors.OpError) -> str:
    """What went wrong; of an exception of Python code what that said, without the places that it came through."""
    return first_line(error).split("ValueError: ")[-1]
