"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), one draw for a batch, as timm's `Mixup` in mode "batch".

timm mixes image i with image B - 1 - i; here the partner of i is its neighbour i XOR 1, so that both are on the same
device however a global batch is split.
"""

import tensorflow as tf

from mobiatt_tf.augment.policy import Augmentation

_STREAM = 0x4D495855  # sets the random numbers apart from those that others draw from the same seed


def mix(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, augmentation: Augmentation
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes neighbours in a batch, by mixup or CutMix as `augmentation` has it; with neither on, nothing happens.

    Args:
        images: float32 [B, H, W, 3], B even.
        labels: float32 [B, classes], probabilities.
        seed: int64 [2], one for a global batch; parts of it that get the same seed are mixed in the same way.
        augmentation: its `mixup`, `cutmix` and `cutmix_share` count.

    Returns:
        Images and labels of the same shapes.

    Raises:
        ValueError: B is odd.
    """
    if not augmentation.mixes:
        return images, labels
    if images.shape[0] is not None and images.shape[0] % 2:
        raise ValueError(
            f"Images are mixed in pairs, so a batch must have an even number of them, not {images.shape[0]}."
        )
    is_cutmix, share, position = draw(seed, augmentation)
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    box = cutmix_box(height, width, share, position)
    kept = 1 - tf.cast((box[2] - box[0]) * (box[3] - box[1]), tf.float32) / tf.cast(height * width, tf.float32)
    share = tf.where(is_cutmix, kept, share)
    mixed = tf.cond(is_cutmix, lambda: _paste(images, box), lambda: _average(images, share))
    return tf.ensure_shape(mixed, images.shape), tf.ensure_shape(_average(labels, share), labels.shape)


def draw(seed: tf.Tensor, augmentation: Augmentation) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The random numbers of one batch.

    Returns:
        Whether it is CutMix, bool []; the share of the first image, float32 [] from Beta(a, a); where the middle of
        CutMix's box is, float32 [2] in [0, 1) of height and width.
    """
    seed = seed + tf.constant([0, _STREAM], tf.int64)
    numbers = tf.random.stateless_uniform([3], seed, alg="philox")
    both = augmentation.mixup > 0 and augmentation.cutmix > 0
    is_cutmix = numbers[0] < augmentation.cutmix_share if both else tf.constant(augmentation.cutmix > 0)
    parameter = tf.where(is_cutmix, augmentation.cutmix, augmentation.mixup)
    return is_cutmix, _symmetric_beta(parameter, seed + tf.constant([1, 0], tf.int64)), numbers[1:]


def cutmix_box(height: tf.Tensor, width: tf.Tensor, share: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """The box that comes from the other image: sides of sqrt(1 - share) of the image's, cut off at its edges.

    Args:
        height: int32 [], rows of the images.
        width: int32 [], columns of the images.
        share: float32 [], what is kept.
        position: float32 [2] in [0, 1): the middle.

    Returns:
        int32 [4]: top, left, bottom, right.
    """
    size = tf.stack([height, width])
    sides = tf.cast(tf.cast(size, tf.float32) * tf.sqrt(1 - share), tf.int32)
    middle = tf.minimum(tf.cast(tf.cast(size, tf.float32) * position, tf.int32), size - 1)
    return tf.concat([tf.maximum(middle - sides // 2, 0), tf.minimum(middle + (sides + 1) // 2, size)], 0)


def _symmetric_beta(parameter: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """float32 [] from Beta(a, a): of two gamma variables the first's share of the sum.

    Gamma(a) is Gamma(a + 1) U^(1/a) with U uniform (Marsaglia and Tsang, 2000, section 6); in logarithms, small `a`
    give no 0 / 0.
    """
    gamma = tf.random.stateless_gamma([2], seed, parameter + 1)
    uniform = tf.random.stateless_uniform([2], seed + tf.constant([1, 0], tf.int64), alg="philox")
    logarithms = tf.math.log(gamma) + tf.math.log1p(-uniform) / parameter  # 1 - uniform is never 0
    return tf.sigmoid(logarithms[0] - logarithms[1])


def _pairs(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """[B, ...] to the first and the second of each pair, [B/2, ...]."""
    pairs = tf.reshape(batch, tf.concat([[-1, 2], tf.shape(batch)[1:]], 0))
    return pairs[:, 0], pairs[:, 1]


def _average(batch: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """`share` of itself and the rest of its neighbour; one matrix product reads and writes each value once."""
    weights = tf.reshape(tf.stack([share, 1 - share, 1 - share, share]), [2, 2])
    pairs = tf.reshape(batch, [tf.shape(batch)[0] // 2, 2, tf.reduce_prod(tf.shape(batch)[1:])])
    return tf.reshape(tf.matmul(weights, pairs), tf.shape(batch))


def _paste(images: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Images with a box from their neighbours."""
    patch = images[:, box[0] : box[2], box[1] : box[3]]
    first, second = _pairs(patch)
    patch = tf.reshape(tf.stack([second, first], axis=1), tf.shape(patch))
    zero, count = tf.constant(0), tf.shape(images)[0]
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=images,
        begin=tf.stack([zero, box[0], box[1]]),
        end=tf.stack([count, box[2], box[3]]),
        strides=[1, 1, 1],
        value=patch,
    )
