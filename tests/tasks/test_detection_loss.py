"""RetinaNet's loss: against a formula in float64 and Keras, and its gradient where there is little to learn."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.tasks.anchors import anchors
from mobiatt_tf.tasks.detection import detection_losses, focal_loss
from mobiatt_tf.tasks.matching import IGNORED, anchor_targets

SIZE, CLASSES = (32, 48), 3
ANCHORS = anchors(SIZE, 8)


def example(images: int = 3, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random outputs, and boxes of which the second image has none."""
    generator = np.random.default_rng(seed)
    outputs = {
        "boxes": generator.normal(0, 0.5, (images, len(ANCHORS), 4)).astype(np.float32),
        "logits": generator.normal(-2, 2, (images, len(ANCHORS), CLASSES)).astype(np.float32),
    }
    boxes, labels = np.zeros((images, 4, 4), np.float32), np.full((images, 4), -1, np.int32)
    boxes[0, :2], labels[0, :2] = [[2, 2, 30, 28], [20, 10, 46, 30]], [1, 0]
    boxes[2, 1], labels[2, 1] = [0, 0, 12, 12], 2
    return outputs, {"boxes": boxes, "labels": labels}


def losses(outputs: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> np.ndarray:
    return detection_losses(
        {name: tf.constant(values) for name, values in outputs.items()},
        {name: tf.constant(values) for name, values in targets.items()},
        tf.constant(ANCHORS),
    ).numpy()


def test_loss_is_that_of_the_formula_in_float64() -> None:
    outputs, targets = example()
    deltas, classes = (
        tensor.numpy()
        for tensor in anchor_targets(
            tf.constant(targets["boxes"]), tf.constant(targets["labels"]), tf.constant(ANCHORS)
        )
    )
    assert (classes == IGNORED).any()
    expected = []
    for image in range(3):
        logits = outputs["logits"][image].astype(np.float64)
        truth = classes[image][:, None] == np.arange(CLASSES)
        p = 1 / (1 + np.exp(-logits))
        p_t, alpha_t = np.where(truth, p, 1 - p), np.where(truth, 0.25, 0.75)
        focal = (-alpha_t * (1 - p_t) ** 2 * np.log(p_t))[classes[image] != IGNORED].sum()
        own = classes[image] >= 0
        distance = np.abs(outputs["boxes"][image].astype(np.float64) - deltas[image])[own].sum()
        expected.append((focal + distance) / max(1, own.sum()))
    np.testing.assert_allclose(losses(outputs, targets), expected, rtol=1e-5)


def test_focal_loss_is_that_of_keras() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 4, (2, 7, 5)).astype(np.float32)
    classes = generator.integers(-1, 5, (2, 7)).astype(np.int32)
    theirs = keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=0.25, gamma=2.0, from_logits=True, reduction=None
    )(keras.ops.one_hot(np.maximum(classes, 0), 5) * (classes >= 0)[..., None], logits)
    found = focal_loss(tf.constant(logits), tf.constant(classes))
    np.testing.assert_allclose(found, 5 * keras.ops.convert_to_numpy(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("boxes", ["some", "none", "no_rows"])
def test_loss_and_gradient_are_finite(boxes: str, scale: float) -> None:
    outputs, targets = example()
    if boxes == "none":
        targets["labels"][:] = -1
    if boxes == "no_rows":
        targets = {name: values[:, :0] for name, values in targets.items()}
    tensors = {"boxes": tf.constant(outputs["boxes"]), "logits": tf.constant(outputs["logits"] * np.float32(scale))}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        loss = detection_losses(
            tensors, {name: tf.constant(values) for name, values in targets.items()}, tf.constant(ANCHORS)
        )
        total = tf.reduce_sum(loss)
    assert np.isfinite(loss).all()
    for gradient in tape.gradient(total, tensors).values():
        assert np.isfinite(gradient).all()


def test_images_without_boxes_only_lower_the_logits() -> None:
    outputs, targets = example()
    targets["labels"][:] = -1
    tensors = {name: tf.constant(values) for name, values in outputs.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        total = tf.reduce_sum(
            detection_losses(
                tensors, {name: tf.constant(values) for name, values in targets.items()}, tf.constant(ANCHORS)
            )
        )
    gradients = tape.gradient(total, tensors)
    assert not gradients["boxes"].numpy().any()
    assert (gradients["logits"].numpy() > 0).all()


def test_loss_of_an_image_does_not_depend_on_the_others() -> None:
    """So that it does not depend on how images are spread over devices either."""
    outputs, targets = example()
    together = losses(outputs, targets)
    alone = [
        losses(
            {name: values[image : image + 1] for name, values in outputs.items()},
            {name: values[image : image + 1] for name, values in targets.items()},
        )[0]
        for image in range(3)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_loss_is_float32_in_mixed_precision() -> None:
    outputs, targets = example()
    halves = {name: tf.cast(values, tf.bfloat16) for name, values in outputs.items()}
    found = detection_losses(
        halves, {name: tf.constant(values) for name, values in targets.items()}, tf.constant(ANCHORS)
    )
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, losses(outputs, targets), rtol=0.02)


def test_loss_compiles_with_xla() -> None:
    outputs, targets = example()

    @tf.function(jit_compile=True)
    def compiled(outputs: dict[str, tf.Tensor], targets: dict[str, tf.Tensor]) -> tf.Tensor:
        return detection_losses(outputs, targets, tf.constant(ANCHORS))

    found = compiled(
        {name: tf.constant(values) for name, values in outputs.items()},
        {name: tf.constant(values) for name, values in targets.items()},
    )
    np.testing.assert_allclose(found, losses(outputs, targets), rtol=1e-5)
