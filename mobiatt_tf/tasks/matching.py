"""Which anchor learns which box: by their overlap, on the device.

The rule is that of the published recipes (mmdet's MaxIoUAssigner with .5, .4 and min_pos_iou 0; Lin et al., "Focal Loss
for Dense Object Detection", ICCV 2017, section 4). keras_hub's RetinaNetLabelEncoder does the same but for the boxes
that no anchor overlaps by half: with `box_matcher_force_match_for_each_col` it also gives the first anchor to the
padding, so this is ours.
"""

import tensorflow as tf

POSITIVE_IOU = 0.5
NEGATIVE_IOU = 0.4
BACKGROUND = -1
IGNORED = -2
BLOCK = 64  # boxes at a time: with 200,000 anchors (800 x 1344 pixels) 51 MB for every array


def match(boxes: tf.Tensor, labels: tf.Tensor, anchors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Assigns the boxes of one image to anchors.

    An anchor learns the box that it overlaps most, if by POSITIVE_IOU or more; it is background below NEGATIVE_IOU;
    between the two it learns nothing. The anchors that overlap a box most (several, where they are equal) learn it
    however little that is, if at all, so that no box is lost; where they do so for several boxes, the last one.

    Args:
        boxes: float32 [N, 4], xyxy in pixels.
        labels: int32 [N], classes, below 0 where there is no box.
        anchors: float32 [A, 4].

    Returns:
        The box of each anchor, float32 [A, 4] (any, where it learns none), and the class, int32 [A], or BACKGROUND or
        IGNORED.
    """
    size = BLOCK if boxes.shape[0] is None else _equal_blocks(boxes.shape[0])
    count = tf.shape(boxes)[0]
    blocks = tf.maximum(-(-count // size), 1)
    missing = blocks * size - count
    boxes, labels = tf.pad(boxes, [[0, missing], [0, 0]]), tf.pad(labels, [[0, missing]], constant_values=-1)
    nothing = tf.fill([tf.shape(anchors)[0]], -1)  # [A]

    def with_block(
        block: tf.Tensor, largest: tf.Tensor, overlapped: tf.Tensor, forced: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """What is known of each anchor after this block too, [A]: the largest overlap, its box, the forced box."""
        rows = block * size + tf.range(size)
        overlap = tf.where(tf.gather(labels, rows) >= 0, _overlap(anchors, tf.gather(boxes, rows)), -1.0)  # [A, size]
        of_anchor = tf.reduce_max(overlap, axis=1)  # [A]
        of_box = tf.reduce_max(overlap, axis=0)  # [size]
        is_best = (overlap == of_box) & (of_box > 0)  # [A, size]
        # Of equal overlaps the first box counts, so a later block must have more; of forced boxes the last one.
        first = block * size + tf.argmax(overlap, axis=1, output_type=tf.int32)  # [A]
        overlapped = tf.where(of_anchor > largest, first, overlapped)
        forced = tf.maximum(forced, tf.reduce_max(tf.where(is_best, rows, -1), axis=1))
        return block + 1, tf.maximum(largest, of_anchor), overlapped, forced

    _, of_anchor, overlapped, forced = tf.while_loop(
        lambda block, *_: block < blocks,
        with_block,
        (tf.constant(0), tf.cast(nothing, tf.float32), tf.zeros_like(nothing), nothing),
        parallel_iterations=1,
    )
    chosen = tf.where(forced >= 0, forced, overlapped)  # [A]
    classes = tf.where(
        (forced >= 0) | (of_anchor >= POSITIVE_IOU),
        tf.gather(labels, chosen),
        tf.where(of_anchor >= NEGATIVE_IOU, IGNORED, BACKGROUND),
    )
    return tf.gather(boxes, chosen), classes


def anchor_targets(boxes: tf.Tensor, labels: tf.Tensor, anchors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What each anchor of a batch learns.

    Args:
        boxes: float32 [B, N, 4], xyxy in pixels.
        labels: int32 [B, N], below 0 where there is no box.
        anchors: float32 [A, 4].

    Returns:
        Offsets of the box from the anchor (see `anchors.encode`; finite everywhere), float32 [B, A, 4], and classes,
        int32 [B, A], BACKGROUND or IGNORED where there is none. No gradient flows through them.
    """

    # One image at a time, and in it a block of boxes: a crowded image needs no more memory than another.
    matched, classes = tf.map_fn(
        lambda image: match(image[0], image[1], anchors),
        (boxes, labels),
        parallel_iterations=1,
        fn_output_signature=(tf.float32, tf.int32),
    )
    sides = anchors[:, 2:] - anchors[:, :2]  # [A, 2]
    moved = ((matched[..., 2:] + matched[..., :2]) / 2 - (anchors[:, 2:] + anchors[:, :2]) / 2) / sides
    scaled = tf.math.log(tf.maximum(matched[..., 2:] - matched[..., :2], 1e-6) / sides)
    return tf.stop_gradient(tf.concat([moved, scaled], axis=-1)), classes


def _equal_blocks(count: int) -> int:
    """How many boxes of `count` each block has, so that all blocks are about as full: 93 are two of 47."""
    return max(-(-count // max(-(-count // BLOCK), 1)), 1)


def _overlap(anchors: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """Intersection over union, float32 [A, N]; anchors [A, 4] have areas above 0."""
    # Axis by axis, [A, N]: arrays [A, N, 2] would be the largest of all.
    width, height = (
        tf.maximum(
            tf.minimum(anchors[:, 2 + axis, None], boxes[:, 2 + axis])
            - tf.maximum(anchors[:, axis, None], boxes[:, axis]),
            0.0,
        )
        for axis in range(2)
    )
    common = width * height
    areas = tf.reduce_prod(anchors[:, 2:] - anchors[:, :2], axis=-1)[:, None]  # [A, 1]
    return common / (areas + tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1) - common)
