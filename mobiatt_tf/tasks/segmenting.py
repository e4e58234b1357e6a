"""A segmenter on images of any size: in windows, or with a model of the image's own size.

Both are mmsegmentation's (`slide_inference`, `whole_inference`). Resizing is bilinear with pixel centres at one half,
in TensorFlow, on an accelerator where there is one. Who wants classes alone takes `cut` and `classes_of`: logits of all
classes at the size of an image, hundreds of MB, then never leave the accelerator. `sliding` and `whole` return them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

# float32 [n, h, w, 3], normalised, to logits float [n, h / s, w / s, classes], in NumPy.
Run = Callable[[np.ndarray], np.ndarray]
# (h, w) to a `Run` for images of that size.
RunOfSize = Callable[[tuple[int, int]], Run]

_CHUNK_VALUES = 1 << 26  # 256 MiB of float32: what is resized at a time, see `classes_of`


@dataclass(frozen=True)
class Places:
    """Where the windows of an image lie.

    Attributes:
        size: (height, width) of the image.
        window: (height, width) of each.
        corners: (top, left) of each.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def seen(self) -> np.ndarray:
        """How many windows see each pixel, float32 [h, w, 1]: of the image, or the window where that is larger."""
        seen = np.zeros((*np.maximum(self.size, self.window), 1), np.float32)
        for top, left in self.corners:
            seen[top : top + self.window[0], left : left + self.window[1]] += 1
        return seen


def window_corners(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, int]]:
    """(top, left) of windows that cover all of an image, row by row; the last ones end at its border.

    Args:
        size: (height, width) of the image.
        window: (height, width); where it is larger than the image there is one, at 0.
        stride: from one window to the next, down and to the right.

    Raises:
        ValueError: a stride is not from 1 to the side of the window, so that there would be gaps.
    """
    if any(not 1 <= step <= side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"stride must be from 1 to the window's side, got {stride} for a window of {window}.")
    tops, lefts = (
        [min(start, max(length - side, 0)) for start in range(0, max(length - side, 0) + step, step)]
        for length, side, step in zip(size, window, stride, strict=True)
    )
    return [(top, left) for top in dict.fromkeys(tops) for left in dict.fromkeys(lefts)]


def sliding(run: Run, image: np.ndarray, window: tuple[int, int], stride: tuple[int, int] | None = None) -> np.ndarray:
    """The logits of an image, each the mean over the windows that see the pixel.

    Args:
        run: takes all windows of the image at a time, [n, *window, 3].
        image: float32 [h, w, 3], normalised. Where it is smaller than the window it is filled up with 0 at the right
            and bottom.
        window: (height, width) of the model's input.
        stride: from one window to the next; without it two thirds of the window (mmsegmentation's 341 of 512).

    Returns:
        float32 [h, w, classes].

    Raises:
        ValueError: the stride leaves gaps, or the logits have another shape or are not finite.
    """
    windows, places = cut(image, window, stride)
    logits = checked_logits(run(windows), len(windows))
    seen = places.seen()
    total = np.zeros((*seen.shape[:2], logits.shape[-1]), np.float32)
    for (top, left), of_window in zip(places.corners, logits, strict=True):
        total[top : top + window[0], left : left + window[1]] += resized(of_window, window)
    total /= seen
    return total[: image.shape[0], : image.shape[1]]


def cut(image: np.ndarray, window: tuple[int, int], stride: tuple[int, int] | None = None) -> tuple[np.ndarray, Places]:
    """The windows of an image, float32 [n, *window, 3], and where they lie; arguments and errors as of `sliding`."""
    size = (image.shape[0], image.shape[1])
    stride = stride or (max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1))
    corners = window_corners(size, window, stride)
    missing = [(0, max(side - length, 0)) for side, length in zip(window, size, strict=True)]
    filled = np.pad(image, [*missing, (0, 0)])
    windows = np.stack([filled[top : top + window[0], left : left + window[1]] for top, left in corners])
    return windows, Places(size, window, tuple(corners))


def whole(run_of_size: RunOfSize, image: np.ndarray) -> np.ndarray:
    """The logits of an image, float32 [h, w, classes], by a model of its own size.

    Args:
        run_of_size: makes or finds what runs images of a size.
        image: float32 [h, w, 3], normalised; its sides must suit the model (multiples of 32, most often).

    Raises:
        ValueError: the logits have another shape or are not finite.
    """
    height, width = image.shape[:2]
    return resized(checked_logits(run_of_size((height, width))(image[None]), 1)[0], (height, width))


def resized(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits float32 [h, w, classes] at another size (height, width), bilinear."""
    if logits.shape[:2] == tuple(size):
        return np.asarray(logits, np.float32)
    return tf.image.resize(tf.constant(logits, tf.float32), size).numpy()


def classes_at(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class with the largest logit at every pixel of an image of another size; of equal ones the lowest.

    Args:
        logits: float32 [h, w, classes], resized bilinearly.
        size: (height, width).

    Returns:
        uint8 [height, width].
    """
    own = (logits.shape[0], logits.shape[1])
    return classes_of(logits[None], Places(own, own, ((0, 0),)), size)


def classes_of(logits: np.ndarray, places: Places, size: tuple[int, int]) -> np.ndarray:
    """What `classes_at` says of the logits that `sliding` would return, without returning those.

    Args:
        logits: float32 [n, h, w, classes] of the windows.
        places: where these lie in the image.
        size: (height, width) of the result, whatever the size of the image.

    Returns:
        uint8 [height, width].
    """
    # Some classes at a time where there are many pixels: 150 classes at 20 megapixels would be 12 GB.
    seen = places.seen()
    chunk = max(_CHUNK_VALUES // max(size[0] * size[1], seen.size), 1)
    return _largest(logits, places.corners, places.window, seen, places.size, size, chunk).numpy()


_PAIR = tf.TensorSpec([2], tf.int32)


# One signature for all images, so that it is traced once.
@tf.function(
    autograph=False,
    input_signature=[
        tf.TensorSpec([None, None, None, None]),
        tf.TensorSpec([None, 2], tf.int32),
        _PAIR,
        tf.TensorSpec([None, None, 1]),
        _PAIR,
        _PAIR,
        tf.TensorSpec([], tf.int32),
    ],
)
def _largest(
    logits: tf.Tensor,
    corners: tf.Tensor,
    window: tf.Tensor,
    seen: tf.Tensor,
    size: tf.Tensor,
    wanted: tf.Tensor,
    chunk: tf.Tensor,
) -> tf.Tensor:
    """The class of each pixel, uint8 [*wanted], from the logits of the windows, `chunk` classes at a time."""
    classes, full = tf.shape(logits)[-1], tf.shape(seen)[:2]

    def mean(of_windows: tf.Tensor) -> tf.Tensor:
        """The mean over the windows that see a pixel, [*size, c]."""

        def large(index: tf.Tensor) -> tf.Tensor:
            after = full - window - corners[index]
            margins = tf.concat([tf.stack([corners[index], after], axis=1), [[0, 0]]], axis=0)  # [3, 2]
            return tf.pad(tf.image.resize(of_windows[index], window), margins)  # [*full, c]

        count = tf.shape(corners)[0]
        _, total = tf.while_loop(
            lambda index, _: index < count,
            lambda index, total: (index + 1, total + large(index)),
            (1, large(tf.constant(0))),
            parallel_iterations=1,
        )
        total = tf.cond(count > 1, lambda: total / seen, lambda: total)
        return total[: size[0], : size[1]]

    def better(first: tf.Tensor, best: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """After these classes too: the largest logit of each pixel, and its class."""
        values = mean(logits[..., first : first + chunk])  # [*size, c]
        is_fit = tf.reduce_all(size == wanted)
        values = tf.cond(is_fit, lambda: values, lambda: tf.image.resize(values, wanted))  # [*wanted, c]
        largest = tf.reduce_max(values, axis=-1)
        index = first + tf.argmax(values, axis=-1, output_type=tf.int32)
        return first + chunk, tf.maximum(best, largest), tf.where(largest > best, index, found)

    start = (0, tf.fill(wanted, -np.inf), tf.zeros(wanted, tf.int32))
    _, _, found = tf.while_loop(
        lambda first, *_: first < classes,
        better,
        start,
        parallel_iterations=1,
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None]), tf.TensorShape([None, None])),
    )
    return tf.cast(found, tf.uint8)


def checked_logits(logits: np.ndarray, count: int) -> np.ndarray:
    """The logits of `count` images as float32 [count, h, w, classes].

    Raises:
        ValueError: they have another shape, or are not finite.
    """
    logits = checked_shape(logits, count)
    if not np.isfinite(logits).all():
        raise ValueError("The segmenter's outputs are not finite.")
    return logits


def checked_shape(logits: np.ndarray, count: int) -> np.ndarray:
    """The same without looking at the values."""
    logits = np.asarray(logits, np.float32)
    if logits.ndim != 4 or len(logits) != count:
        raise ValueError(f"A segmenter gives logits [{count}, h, w, classes] for {count} images, got {logits.shape}.")
    return logits
