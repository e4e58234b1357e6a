"""The anchors of a RetinaNet, and boxes as offsets from them, in NumPy.

Anchors stand on a pyramid of levels, each with twice the stride of the one before it. At every place of a level there
are 9: 3 sizes (4 strides times 1, 2^(1/3) and 2^(2/3)) in 3 shapes (Lin et al., "Focal Loss for Dense Object
Detection", ICCV 2017, section 4). Numbers, order and rounding are those of `keras_hub.layers.AnchorGenerator` and of
torchvision.
"""

import functools

import numpy as np

LEVELS = 5
SIZES = 3  # on each level
SHAPES = (0.5, 1.0, 2.0)  # height / width
PER_PLACE = SIZES * len(SHAPES)
ANCHOR_SIZE = 4  # the smallest size on a level, in strides of that level
STRIDES = (2, 4, 8, 16)  # what the first level may have
# Largest logarithm of a side over the anchor's side, as torchvision and Detectron clip it: exp() stays finite.
MAX_LOG_SIDE = float(np.log(1000.0 / 16.0))


def level_shapes(image_size: tuple[int, int], first_stride: int = 8, levels: int = LEVELS) -> list[tuple[int, int]]:
    """(height, width) of the feature map on each level: sides of the image over the stride, rounded up."""
    strides = [first_stride * 2**level for level in range(levels)]
    return [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides]


def level_counts(image_size: tuple[int, int], first_stride: int = 8, levels: int = LEVELS) -> list[int]:
    """How many anchors each level has."""
    return [height * width * PER_PLACE for height, width in level_shapes(image_size, first_stride, levels)]


@functools.lru_cache(maxsize=8)
def anchors(image_size: tuple[int, int], first_stride: int = 8, levels: int = LEVELS) -> np.ndarray:
    """The anchors of an image, level by level, row by row, place by place, shape by shape, size by size.

    Args:
        image_size: (height, width) in pixels.
        first_stride: pixels from one place of the first level to the next, a power of two.
        levels: how many; each has twice the stride of the one before it.

    Returns:
        float32 [A, 4], xyxy in pixels; corners are rounded and may lie outside the image. Do not write to it: later
        calls return the same array.

    Raises:
        ValueError: an argument is outside what is allowed.
    """
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), each at least 1, got {image_size}.")
    if first_stride < 1 or first_stride & (first_stride - 1) or levels < 1:
        raise ValueError(f"first_stride must be a power of two and levels at least 1, got {first_stride} and {levels}.")
    found = []
    for level, (rows, columns) in enumerate(level_shapes(image_size, first_stride, levels)):
        stride = first_stride * 2**level
        sizes = np.array([int(stride * ANCHOR_SIZE * 2 ** (step / SIZES)) for step in range(SIZES)], np.float32)
        height_factors = np.sqrt(np.array(SHAPES, np.float32))
        widths = ((1 / height_factors)[:, None] * sizes).reshape(-1)  # [9]
        heights = (height_factors[:, None] * sizes).reshape(-1)  # [9]
        around = np.round(np.stack([-widths, -heights, widths, heights], axis=1) / 2)  # [9, 4]
        # Not the stride itself where it does not divide the image: both libraries spread the places that way.
        x, y = np.meshgrid(
            np.arange(columns, dtype=np.float32) * (image_size[1] // columns),
            np.arange(rows, dtype=np.float32) * (image_size[0] // rows),
        )
        centres = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)  # [places, 1, 4]
        found.append((centres + around).reshape(-1, 4))  # [places * 9, 4]
    result = np.concatenate(found).astype(np.float32)
    result.flags.writeable = False
    return result


def first_stride(image_size: tuple[int, int], count: int, levels: int = LEVELS) -> int:
    """The stride of the first level of a detector that gives `count` boxes for an image (height, width).

    Raises:
        ValueError: no stride of 2, 4, 8 and 16 gives that many.
    """
    counts = {sum(level_counts(image_size, stride, levels)): stride for stride in reversed(STRIDES)}
    if count not in counts:
        allowed = ", ".join(f"{boxes} (stride {stride})" for boxes, stride in reversed(counts.items()))
        raise ValueError(
            f"{count} boxes for an image of {image_size[0]} x {image_size[1]} are not those of a detector with "
            f"{levels} levels and {PER_PLACE} anchors at every place: allowed are {allowed}."
        )
    return counts[count]


def encode(boxes: np.ndarray, anchor_boxes: np.ndarray) -> np.ndarray:
    """Boxes as offsets (dx, dy, dw, dh) from their anchors: R-CNN's (Girshick et al., CVPR 2014, appendix C).

    dx = (x of box - x of anchor) / width of anchor, with the centres; dw = log(width of box / width of anchor).

    Args:
        boxes: float [..., 4], xyxy in pixels; a side below a millionth of a pixel counts as that.
        anchor_boxes: float [..., 4], xyxy; their sides are above 0.

    Returns:
        float32 [..., 4].
    """
    boxes, anchor_boxes = np.asarray(boxes, np.float32), np.asarray(anchor_boxes, np.float32)
    anchor_sides = anchor_boxes[..., 2:] - anchor_boxes[..., :2]
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], np.float32(1e-6))
    moved = ((boxes[..., 2:] + boxes[..., :2]) / 2 - (anchor_boxes[..., 2:] + anchor_boxes[..., :2]) / 2) / anchor_sides
    return np.concatenate([moved, np.log(sides / anchor_sides)], axis=-1)


def decode(deltas: np.ndarray, anchor_boxes: np.ndarray) -> np.ndarray:
    """The boxes that `encode` has turned into offsets; sides are at most 62.5 times those of their anchors.

    Args:
        deltas: float [..., 4].
        anchor_boxes: float [..., 4], xyxy in pixels.

    Returns:
        float32 [..., 4], xyxy in pixels; may lie outside the image.
    """
    deltas, anchor_boxes = np.asarray(deltas, np.float32), np.asarray(anchor_boxes, np.float32)
    anchor_sides = anchor_boxes[..., 2:] - anchor_boxes[..., :2]
    centres = (anchor_boxes[..., 2:] + anchor_boxes[..., :2]) / 2 + deltas[..., :2] * anchor_sides
    halves = np.exp(np.minimum(deltas[..., 2:], np.float32(MAX_LOG_SIDE))) * anchor_sides / 2
    return np.concatenate([centres - halves, centres + halves], axis=-1)
