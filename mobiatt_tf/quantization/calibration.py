"""Start ranges from real images."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from mobiatt_tf import data
from mobiatt_tf.errors import UserError
from mobiatt_tf.quantization.aware import quantize_aware, quantizers
from mobiatt_tf.quantization.fake_quant import Observer
from mobiatt_tf.tasks import task_of
from mobiatt_tf.verification import dense_batches


def calibrate(model: keras.Model, batches: Iterable[Any]) -> int:
    """Sets the range of every quantized tensor to what it spans on real images: the mean of the batches' extremes.

    Args:
        model: of `quantize_aware`. Kernels are rounded while it looks, activations are not.
        batches: images float [B, height, width, 3] as for training, or (images, labels) pairs, such as
            `mobiatt_tf.data.test_batches`. 512 images in batches of 32 are plenty. Use training images: the test images
            are for measuring.

    Returns:
        How many images were seen.

    Raises:
        ValueError: no images, images that are all of one colour or not finite, or a tensor that is 0 everywhere or not
            finite on them; names it. The model is then unchanged.
    """
    found = quantizers(model)
    observers = {id(quantizer): Observer() for quantizer in found}
    seen, lowest, highest = 0, np.inf, -np.inf
    try:
        for quantizer in found:
            quantizer.observer = observers[id(quantizer)]
        for batch in batches:
            images = np.asarray(batch[0] if isinstance(batch, tuple | list) else batch)
            if not images.size:
                continue
            if not np.isfinite(images).all():
                raise ValueError(f"The calibration images {seen} to {seen + len(images) - 1} hold NaN or infinity.")
            lowest, highest = min(lowest, float(images.min())), max(highest, float(images.max()))
            model(images, training=False)
            for observer in observers.values():
                observer.end_batch()
            seen += len(images)
    finally:
        for quantizer in found:
            quantizer.observer = None
    if not seen:
        raise ValueError("There is nothing to calibrate on: the batches hold no images.")
    if lowest == highest:
        raise ValueError("The calibration images are of one and the same colour: ranges need real images.")
    ranges = []
    for quantizer in found:
        low, high = observers[id(quantizer)].range(quantizer.symmetric) if quantizer.fixed_range is None else (0.0, 1.0)
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{quantizer.path} is not finite on the calibration images: the model is damaged.")
        if low == high:
            raise ValueError(f"{quantizer.path} is 0 everywhere on the calibration images: a range needs real images.")
        ranges.append((low, high))
    for quantizer, (low, high) in zip(found, ranges, strict=True):
        if quantizer.fixed_range is None:
            quantizer.set_range(low, high)
    return seen


def calibrated_copy(model: keras.Model, policy: str, dataset: Any, count: int) -> keras.Model:
    """The fake-quantized copy of a float model, calibrated on the first `count` training images of a dataset.

    Args:
        model: a classifier, detector or segmenter.
        policy: see `quantize_aware`.
        dataset: a `data.Dataset`, or the `data.dense.DenseDataset` of a detector or segmenter.
        count: how many images.

    Raises:
        UserError: a layer that cannot be quantized, or images that cannot be calibrated on.
    """
    try:
        copy = quantize_aware(model, policy)
        calibrate(copy, calibration_images(task_of(model), dataset, model.input_shape[1:3], count))
    except ValueError as error:
        raise UserError(str(error)) from error
    return copy


def calibration_images(task: str, dataset: Any, image_size: tuple[int, int], count: int) -> Iterable[Any]:
    """The first `count` training images of a dataset as the models of a task see test images, in batches.

    Returns:
        For classifiers `data.calibration_batches`, otherwise `verification.dense_batches`.
    """
    if task == "classification":
        return data.calibration_batches(dataset, image_size, count)
    return dense_batches(task, dataset.train.take(min(count, len(dataset.train))), image_size)
