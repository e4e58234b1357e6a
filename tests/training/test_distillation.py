"""Hard distillation: the loss against its definition, teachers, a student that learns, and a real teacher."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from mobiatt_tf import data
from mobiatt_tf.errors import UserError
from mobiatt_tf.models import DistilledModel
from mobiatt_tf.training.distillation import Teacher, load_teacher, make_teacher
from mobiatt_tf.training.losses import classification_loss, distillation_loss
from mobiatt_tf.training.optimizer import make_optimizer
from tests.timm_hosts import timm
from tests.training import small
from tools import efficientnet_lite0

CLASSES = small.CLASSES


def _logits(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, CLASSES)).astype(np.float32) * 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_is_its_definition(share: float, mixed: bool) -> None:
    """(1 - share) CE(class head, smoothed label) + share CE(distillation head, argmax of the teacher)."""
    own, taught, teacher = map(_logits, range(3))
    labels = np.array([0, 2, 1, 0, 2])
    target = np.random.default_rng(3).dirichlet(np.ones(CLASSES), 5).astype(np.float32) if mixed else labels
    given = tf.constant(target if mixed else labels.astype(np.int32))
    found = distillation_loss((tf.constant(own), tf.constant(taught)), given, tf.constant(teacher), share, 0.1)
    of_label = torch.nn.functional.cross_entropy(
        torch.tensor(own), torch.tensor(target), reduction="none", label_smoothing=0.1
    )
    of_teacher = torch.nn.functional.cross_entropy(
        torch.tensor(taught), torch.tensor(teacher).argmax(1), reduction="none"
    )
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, (1 - share) * of_label + share * of_teacher, rtol=1e-5, atol=1e-6)


def test_one_head_learns_from_both() -> None:
    head, teacher, labels = tf.cast(_logits(0), tf.bfloat16), tf.constant(_logits(1)), tf.constant([0, 2, 1, 0, 2])
    found = distillation_loss(head, labels, tf.nn.softmax(teacher), 0.3, 0.1)  # of probabilities the largest counts too
    classes = tf.argmax(teacher, axis=-1)
    expected = 0.7 * classification_loss(head, labels, 0.1) + 0.3 * classification_loss(head, classes)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="3 outputs"):
        distillation_loss((head, head, head), labels, teacher, 0.3)


def test_teacher_runs_as_in_inference_at_its_own_size(tmp_path: Path) -> None:
    """From a run's directory; bilinear resizing; no dropout, no batch statistics, no gradient; float32; under XLA."""
    model = small.make_model(dropout=0.5)
    for weight in model.weights:
        weight.assign(weight + 0.1)
    model.save(tmp_path / "model.keras")
    loaded = load_teacher(tmp_path, CLASSES)
    assert not loaded.trainable_variables
    teacher = make_teacher(loaded)
    images = tf.random.stateless_normal((4, 6, 10, 3), (0, 0))
    expected = model(tf.image.resize(images, (8, 8), method="bilinear"), training=False)
    for function in (teacher, tf.function(teacher), tf.function(teacher, jit_compile=True)):
        np.testing.assert_allclose(function(images), expected, atol=1e-5)
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = teacher(images)
    assert outputs.dtype == tf.float32
    assert tape.gradient(outputs, images) is None
    np.testing.assert_array_equal(loaded.get_weights()[4], model.get_weights()[4])


def test_teacher_of_any_size_and_of_two_heads() -> None:
    images = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    model = DistilledModel(images, (keras.layers.Dense(CLASSES)(pooled), keras.layers.Dense(CLASSES)(pooled)))
    batch = tf.random.stateless_normal((2, 9, 7, 3), (0, 0))
    np.testing.assert_allclose(make_teacher(model)(batch), model(batch, training=False), rtol=1e-6)
    heads = model(batch, training=True)
    np.testing.assert_allclose(make_teacher(model)(batch), (heads[0] + heads[1]) / 2, rtol=1e-6)


def _dense(shape: tuple[int | None, ...], units: int = CLASSES, batch_size: int | None = None) -> keras.Model:
    inputs = keras.Input(shape, batch_size=batch_size)
    return keras.Model(inputs, keras.layers.Dense(units)(keras.layers.Flatten()(inputs)))


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    two = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
    images = keras.Input((4, 4, 3))
    refused = {
        "tells 5 classes apart, the student 3": _dense((4, 4, 3), 5),
        r"takes \[None, 4, 4, 1\]": _dense((4, 4, 1)),
        r"takes \[None, 12\]": _dense((12,)),
        r"takes \[None, 4, 4, 3\] and \[None, 4, 4, 3\]": keras.Model(two, keras.layers.Add()(two)),
        "exactly 2 images at a time": _dense((4, 4, 3), batch_size=2),
        r"returns \[None, 4, 4, 3\]": keras.Model(images, keras.layers.ReLU()(images)),
        r"returns \[None, 4, 4, 3\] and": keras.Model(images, [keras.layers.ReLU()(images), images]),
    }
    for index, (message, model) in enumerate(refused.items()):
        path = tmp_path / f"{index}.keras"
        model.save(path)
        with pytest.raises(UserError, match=message):
            load_teacher(path, CLASSES)
    with pytest.raises(UserError, match="no model at"):
        load_teacher(tmp_path / "missing.keras", CLASSES)


def _train(teacher: Teacher | None, images: tf.Tensor, labels: tf.Tensor) -> tuple[keras.Model, np.ndarray]:
    """A student with two heads after 90 steps on all images, and the loss of every step."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.Dense(32, activation="relu")(keras.layers.Flatten()(inputs))
    student = DistilledModel(inputs, (keras.layers.Dense(CLASSES)(hidden), keras.layers.Dense(CLASSES)(hidden)))
    optimizer = make_optimizer(small.recipe(epochs=6), 15, student)

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = student(images, training=True)
            losses = (
                distillation_loss(outputs, labels, teacher(images), 0.5, 0.1)
                if teacher
                else classification_loss(outputs, labels, 0.1)
            )
            loss = tf.reduce_mean(losses)
        variables = student.trainable_variables
        optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
        return loss

    return student, np.array([step().numpy() for _ in range(90)])


def test_a_student_learns_what_its_teacher_says() -> None:
    """The teacher says something else than the labels: of new images only the head that it taught says the same."""
    dataset = small.make_dataset(train=2048, test=256)
    images, new_images = data.normalize(dataset.train.images), data.normalize(dataset.test.images)
    keras.utils.set_random_seed(1)
    model = _dense((8, 8, 3))
    model.layers[-1].bias.assign(-tf.reduce_mean(model(images), axis=0))  # all classes occur
    model.trainable = False
    teacher = make_teacher(model)
    classes = tf.argmax(teacher(new_images), axis=-1).numpy()
    assert np.bincount(classes, minlength=CLASSES).min() > 256 / 10

    labels = tf.constant(dataset.train.labels)
    with_teacher, losses = _train(teacher, images, labels)
    without, _ = _train(None, images, labels)
    assert losses[-1] < losses[0] / 2

    def agreement(student: keras.Model) -> list[float]:
        heads = student(new_images, training=True)
        return [float(np.mean(tf.argmax(head, axis=-1) == classes)) for head in heads]

    taught, untaught = agreement(with_teacher), agreement(without)
    assert taught[1] > untaught[1] + 0.2
    assert taught[1] > taught[0] + 0.2
    right = tf.argmax(with_teacher(new_images, training=True)[0], axis=-1).numpy() == dataset.test.labels
    assert right.mean() > 0.9  # the class head has learnt the labels meanwhile


@pytest.mark.slow
def test_efficientnet_lite0_is_a_real_teacher(tmp_path: Path) -> None:
    """Two photographs get their right classes; the logits are those of timm's network with the same weights."""
    path = tmp_path / "teacher.keras"
    efficientnet_lite0.pretrained().save(path)
    model = load_teacher(path, 1000)
    assert model.count_params() == 4_694_024
    photographs = np.stack([_centre(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")])
    logits = make_teacher(model)(data.normalize(photographs)).numpy()
    assert logits.argmax(-1).tolist() == [698, 985]  # palace, daisy

    host = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = efficientnet_lite0.checkpoint()
    names = [name for name in host.state_dict() if not name.endswith("num_batches_tracked")]
    host.load_state_dict(dict(zip(names, map(torch.tensor, tensors.values()), strict=True)), strict=False)
    pixels = torch.tensor((photographs.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(logits, host(pixels), atol=1e-4)


def _centre(photograph: np.ndarray) -> np.ndarray:
    """The middle 7/8 of the short side at 224 x 224 pixels, uint8."""
    side = min(photograph.shape[:2])
    top, left = (photograph.shape[0] - side) // 2, (photograph.shape[1] - side) // 2
    square = photograph[top : top + side, left : left + side]
    image = Image.fromarray(square).resize((256, 256), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((16, 16, 240, 240)))
