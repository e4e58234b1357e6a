"""From a detector's outputs to detections: candidates, and of those that overlap the best one.

The steps are those of torchvision's RetinaNet: on each level the (anchor, class) pairs with the largest logits, their
boxes clipped to the image, greedy suppression among those of one class, and the best of all classes.
`decode_detections` does all of it in NumPy for one image and is the reference; on a training device `candidates` does
the first step, which shrinks millions of logits to some thousands, and `suppress` the rest.

Logits are compared in place of scores, which are equal from about 17 on in float32. Of equal logits the one with the
lower place comes first: level, anchor, class.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from mobiatt_tf.tasks import anchors

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5
MAX_DETECTIONS = 100  # COCO counts no more in an image
CANDIDATES = 1000  # on each level


class Detections(NamedTuple):
    """What was found in one image, best first.

    Attributes:
        boxes: float32 [n, 4], xyxy in pixels.
        scores: float32 [n], in (0, 1).
        labels: int32 [n], class indices.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def scaled(self, factor: float) -> "Detections":
        """The same with boxes in pixels of an image that is `factor` times as large."""
        return self._replace(boxes=self.boxes * np.float32(factor))


def decode_detections(
    boxes: np.ndarray,
    logits: np.ndarray,
    image_size: tuple[int, int],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
    candidates: int = CANDIDATES,
    clip_to: tuple[float, float] | None = None,
) -> Detections:
    """The detections in one image.

    Args:
        boxes: float [A, 4], offsets from the anchors, see `anchors.encode`.
        logits: float [A, classes].
        image_size: (height, width) of the detector's input.
        score_threshold: only higher scores count, in [0, 1).
        iou_threshold: of two boxes of a class that overlap by more than this share of their union the better one stays.
        max_detections: how many there are at most.
        candidates: how many (anchor, class) pairs of each level are looked at.
        clip_to: (height, width) of the part of the input that the image fills, from the upper left corner; without it
            all. Boxes are clipped to it, and those that then have no area are left out.

    Raises:
        ValueError: the shapes are not those of a detector for this image size, or values are not finite.
    """
    boxes, logits = np.asarray(boxes, np.float32), np.asarray(logits, np.float32)
    if boxes.ndim != 2 or logits.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(logits):
        raise ValueError(f"boxes must be [A, 4] and logits [A, classes], got {boxes.shape} and {logits.shape}.")
    first_stride = anchors.first_stride(image_size, len(boxes))
    classes = logits.shape[1]
    lowest = _logit(score_threshold)
    chosen, start = [], 0
    for count in anchors.level_counts(image_size, first_stride):
        level = logits[start : start + count].reshape(-1)  # [count * classes]
        chosen.append(_largest(level, candidates, lowest) + start * classes)
        start += count
    places = np.concatenate(chosen)  # [K]
    anchor, label = places // classes, places % classes
    found = anchors.decode(boxes[anchor], anchors.anchors(image_size, first_stride)[anchor])  # [K, 4]
    return suppress(
        found,
        logits[anchor, label],
        label.astype(np.int32),
        clip_to or image_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )


def candidates(
    boxes: tf.Tensor, logits: tf.Tensor, image_size: tuple[int, int], count: int = CANDIDATES
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The first step for a batch, in TensorFlow, with fixed shapes: what `suppress` takes, image by image.

    Args:
        boxes: float [B, A, 4], offsets from the anchors.
        logits: float [B, A, classes].
        image_size: (height, width) of the detector's input.
        count: how many of each level; K is the sum over the levels, whose smallest may have fewer.

    Returns:
        Boxes float32 [B, K, 4], xyxy in pixels of the input and not clipped; logits float32 [B, K]; labels int32
        [B, K].

    Raises:
        ValueError: the number of boxes is not that of a detector for this image size.
    """
    boxes, logits = tf.cast(boxes, tf.float32), tf.cast(logits, tf.float32)
    classes = logits.shape[-1]
    first_stride = anchors.first_stride(image_size, boxes.shape[1])
    counts = anchors.level_counts(image_size, first_stride)
    found, places, start = [], [], 0
    for level, size in zip(tf.split(logits, counts, axis=1), counts, strict=True):
        flat = tf.reshape(level, [-1, size * classes])
        values, indices = tf.math.top_k(flat, min(count, size * classes))  # of equal values the lower index is first
        found.append(values)
        places.append(indices + start * classes)
        start += size
    place = tf.concat(places, axis=1)  # [B, K]
    anchor = place // classes
    anchor_boxes = tf.gather(tf.constant(anchors.anchors(image_size, first_stride)), anchor)  # [B, K, 4]
    decoded = _decode(tf.gather(boxes, anchor, batch_dims=1), anchor_boxes)
    return decoded, tf.concat(found, axis=1), place % classes


def suppress(
    boxes: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    clip_to: tuple[float, float],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
) -> Detections:
    """The second step: of candidates of one class that overlap the best one stays.

    Args:
        boxes: float32 [K, 4], xyxy.
        logits: float32 [K].
        labels: int32 [K].
        clip_to: (height, width).
        score_threshold: see `decode_detections`, as are the others.
        iou_threshold: as above.
        max_detections: as above.

    Raises:
        ValueError: a candidate's logit or box is not a number.
    """
    if np.isnan(logits).any() or np.isnan(boxes).any():
        raise ValueError("The detector's outputs are not finite.")
    height, width = clip_to
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    counts = (logits > _logit(score_threshold)) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    rest = np.flatnonzero(counts)
    rest = rest[np.argsort(-logits[rest], kind="stable")]
    kept: list[int] = []
    # The best of all goes first, whatever its class, so the loop may end with the last detection that counts.
    while len(rest) and len(kept) < max_detections:
        best, others = rest[0], rest[1:]
        kept.append(int(best))
        overlaps = (labels[others] == labels[best]) & (overlap(boxes[best], boxes[others]) > iou_threshold)
        rest = others[~overlaps]
    scores = 1 / (1 + np.exp(-np.clip(logits[kept], -80, 80, dtype=np.float32)))  # exp(-80) is a float32 above 0
    return Detections(boxes[kept], scores.astype(np.float32), labels[kept].astype(np.int32))


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box [4] with others [n, 4], xyxy with areas above 0: float32 [n], in [0, 1]."""
    corners = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.maximum(corners[1] - corners[0], 0).prod(axis=1)
    return common / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - common)


def _decode(deltas: tf.Tensor, anchor_boxes: tf.Tensor) -> tf.Tensor:
    """`anchors.decode` in TensorFlow."""
    sides = anchor_boxes[..., 2:] - anchor_boxes[..., :2]
    centres = (anchor_boxes[..., 2:] + anchor_boxes[..., :2]) / 2 + deltas[..., :2] * sides
    halves = tf.exp(tf.minimum(deltas[..., 2:], anchors.MAX_LOG_SIDE)) * sides / 2
    return tf.concat([centres - halves, centres + halves], axis=-1)


def _logit(score: float) -> float:
    """The logit of a score in [0, 1)."""
    return float(np.log(score / (1 - score))) if score > 0 else -np.inf


def _largest(values: np.ndarray, count: int, lowest: float) -> np.ndarray:
    """Where the `count` largest of those above `lowest` stand, int [at most count]; of equal ones the first.

    Raises:
        ValueError: a value is not a number.
    """
    if np.isnan(values).any():
        raise ValueError("The detector's outputs are not finite.")
    places = np.flatnonzero(values > lowest)
    if len(places) > count:
        found = values[places]
        least = np.partition(found, len(found) - count)[len(found) - count]
        above = places[found > least]
        places = np.concatenate([above, places[found == least][: count - len(above)]])
    return places[np.argsort(-values[places], kind="stable")]
