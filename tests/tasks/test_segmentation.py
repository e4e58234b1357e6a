"""The segmenter's loss, its measure, and inference on images of any size."""

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.tasks import segmenting
from mobiatt_tf.tasks.segmentation import segmentation_losses
from mobiatt_tf.tasks.segmentation_metrics import pixel_confusion, segmentation_result
from mobiatt_tf.tasks.segmenting import Places, classes_at, classes_of, cut, sliding, whole, window_corners


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (3, 4, 6, 5)).astype(np.float32)
    labels = generator.integers(0, 5, (3, 8, 12)).astype(np.int32)
    labels[generator.uniform(size=labels.shape) < 0.3] = 255
    labels[2] = 255
    return logits, labels


def test_loss_is_that_of_the_formula_in_float64() -> None:
    logits, labels = example()
    large = tf.image.resize(logits, (8, 12)).numpy().astype(np.float64)
    expected = []
    for image, own in zip(large, labels, strict=True):
        log_probabilities = image - np.log(np.exp(image).sum(axis=-1, keepdims=True))
        rows, columns = np.nonzero(own != 255)
        expected.append(-log_probabilities[rows, columns, own[rows, columns]].sum() / own.size)
    found = segmentation_losses(tf.constant(logits), tf.constant(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[2] == 0


def test_resizing_is_that_of_the_published_code() -> None:
    """Twice the size with pixel centres at one half (align_corners=False): weights 1/4 and 3/4, the border repeated."""
    large = segmenting.resized(np.array([[[0.0], [4.0]]]), (1, 4))
    np.testing.assert_allclose(large[0, :, 0], [0, 1, 3, 4])


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_gradient_is_finite_and_ignores_what_does_not_count(scale: float) -> None:
    logits, labels = example()
    tensor = tf.constant(logits * np.float32(scale))
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        loss = segmentation_losses(tensor, tf.constant(labels))
        total = tf.reduce_sum(loss)
    gradient = tape.gradient(total, tensor).numpy()
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    assert not gradient[2].any()


def test_loss_of_an_image_does_not_depend_on_the_others() -> None:
    logits, labels = example()
    together = segmentation_losses(tf.constant(logits), tf.constant(labels)).numpy()
    halves = [segmentation_losses(logits[part], tf.constant(labels[part])).numpy() for part in (np.s_[:1], np.s_[1:])]
    np.testing.assert_allclose(together, np.concatenate(halves), rtol=1e-6)


def test_loss_is_float32_in_mixed_precision() -> None:
    logits, labels = example()
    found = segmentation_losses(tf.cast(logits, tf.bfloat16), tf.constant(labels))
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, segmentation_losses(tf.constant(logits), tf.constant(labels)), rtol=0.02)


def test_loss_compiles_with_xla() -> None:
    logits, labels = example()
    compiled = tf.function(segmentation_losses, jit_compile=True)
    np.testing.assert_allclose(
        compiled(tf.constant(logits), tf.constant(labels)), segmentation_losses(logits, tf.constant(labels)), rtol=1e-5
    )


def test_measure_of_a_known_confusion() -> None:
    labels = np.array([[0, 0, 0, 1], [1, 1, 255, 255]])
    predictions = np.array([[0, 0, 1, 1], [1, 3, 0, 2]])
    result = segmentation_result(1, pixel_confusion(labels, predictions, 5))
    np.testing.assert_array_equal(result.confusion[:2, :4], [[2, 1, 0, 0], [0, 2, 0, 1]])
    np.testing.assert_allclose(result.class_iou, [2 / 3, 2 / 4, np.nan, 0, np.nan])  # 3 is found where it is not
    assert result.miou == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert result.pixel_accuracy == pytest.approx(4 / 6)
    content = result.to_json(list("abcde"))
    assert content["per_class"]["b"] == {"pixels": 3, "predicted": 3, "iou": 0.5}
    assert content["per_class"]["c"]["iou"] is None
    assert (content["images"], content["absent_classes"]) == (1, 2)
    assert result.summary() == "mIoU 38.89% (of 3 of 5 classes), pixel accuracy 66.67%"
    assert set(result.to_line()) <= set(content)


def test_perfect_predictions() -> None:
    labels = np.arange(12).reshape(3, 4) % 4
    result = segmentation_result(1, pixel_confusion(labels, labels, 4))
    assert (result.miou, result.pixel_accuracy, result.absent) == (1, 1, 0)
    assert result.summary() == "mIoU 100.00%, pixel accuracy 100.00%"


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="labels run from 0 to 7, but there are 3 classes"):
        pixel_confusion(np.array([[0, 7]]), np.array([[0, 1]]), 3)
    with pytest.raises(ValueError, match="same shape"):
        pixel_confusion(np.zeros((1, 2), int), np.zeros((2, 1), int), 3)
    ignored = pixel_confusion(np.full((2, 2), 255), np.zeros((2, 2), int), 3)
    with pytest.raises(ValueError, match="none of 1 images has a labelled pixel"):
        segmentation_result(1, ignored)


@pytest.mark.parametrize("size", [(5, 5), (8, 12), (9, 12), (31, 17), (8, 100)])
@pytest.mark.parametrize("stride", [(8, 12), (5, 8), (1, 3)])
def test_windows_cover_every_pixel(size: tuple[int, int], stride: tuple[int, int]) -> None:
    seen = np.zeros((max(size[0], 8), max(size[1], 12)), int)
    corners = window_corners(size, (8, 12), stride)
    for top, left in corners:
        assert top + 8 <= seen.shape[0]
        assert left + 12 <= seen.shape[1]
        seen[top : top + 8, left : left + 12] += 1
    assert seen.min() >= 1
    assert len(corners) == len(set(corners))


def test_windows_are_those_of_mmsegmentation() -> None:
    """`slide_inference` at 512 with a stride of 341, written out for an image of 700 x 1000."""
    assert window_corners((700, 1000), (512, 512), (341, 341)) == [
        (top, left) for top in (0, 188) for left in (0, 341, 488)
    ]


def test_a_stride_that_leaves_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="stride must be from 1"):
        window_corners((100, 100), (8, 8), (9, 8))


def pointwise(images: np.ndarray) -> np.ndarray:
    """Logits that depend on the pixel alone."""
    return np.stack([images[..., 0], images[..., 1] ** 2, images.sum(-1)], axis=-1)


@pytest.mark.parametrize("size", [(16, 24), (40, 33), (5, 50), (3, 3)])
def test_sliding_is_whole_inference_for_a_function_of_the_pixel(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).normal(size=(*size, 3)).astype(np.float32)
    expected = whole(lambda size: pointwise, image)
    np.testing.assert_allclose(sliding(pointwise, image, (16, 24)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sliding(pointwise, image, (16, 24), (7, 5)), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (*size, 3)


def test_overlap_is_averaged_and_small_images_are_padded() -> None:
    calls = []

    def numbered(images: np.ndarray) -> np.ndarray:
        calls.append(images)
        return np.broadcast_to(np.arange(len(images), dtype=np.float32)[:, None, None, None], (len(images), 2, 2, 1))

    logits = sliding(numbered, np.ones((4, 6, 3), np.float32), (4, 4), (4, 2))
    np.testing.assert_allclose(logits[0, :, 0], [0, 0, 0.5, 0.5, 1, 1])
    sliding(numbered, np.ones((3, 2, 3), np.float32), (4, 4))
    assert calls[1].shape == (1, 4, 4, 3)
    np.testing.assert_array_equal(calls[1].sum(axis=(0, 3)) > 0, np.pad(np.ones((3, 2), bool), [(0, 1), (0, 2)]))


def test_classes_of_another_size_are_the_largest_resized_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.round(np.random.default_rng(0).normal(size=(5, 7, 9))).astype(np.float32)  # with ties
    expected = segmenting.resized(logits, (11, 13)).argmax(axis=-1)
    np.testing.assert_array_equal(classes_at(logits, (11, 13)), expected)
    monkeypatch.setattr(segmenting, "_CHUNK_VALUES", 2 * 11 * 13)  # two classes at a time
    found = classes_at(logits, (11, 13))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("size", [(16, 24), (40, 33), (5, 50), (3, 3)])
@pytest.mark.parametrize("stride", [None, (7, 5)])
@pytest.mark.parametrize("chunk_values", [1 << 26, 4 * 50 * 60])
def test_classes_of_windows_are_those_of_their_mean_logits(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], stride: tuple[int, int] | None, chunk_values: int
) -> None:
    monkeypatch.setattr(segmenting, "_CHUNK_VALUES", chunk_values)  # the smaller one is four classes at a time
    generator = np.random.default_rng(0)
    image = generator.normal(size=(*size, 3)).astype(np.float32)
    windows, places = cut(image, (16, 24), stride)
    logits = generator.normal(size=(len(windows), 4, 6, 9)).astype(np.float32)
    mean = sliding(lambda given: logits, image, (16, 24), stride)
    for wanted in (size, (50, 60), (7, 5)):
        expected = segmenting.resized(mean, wanted).argmax(axis=-1)
        found = classes_of(logits, places, wanted)
        assert found.dtype == np.uint8
        assert (found == expected).mean() > 0.99  # rounding may turn a tie


def test_images_of_all_sizes_share_one_graph() -> None:
    for size in ((5, 7), (9, 4), (30, 40)):
        for count in (1, 3):
            logits = np.zeros((count, 2, 3, 4 + count), np.float32)
            classes_of(logits, Places(size, (4, 4), ((0, 0),) * count), (size[1], size[0]))
    assert segmenting._largest.experimental_get_tracing_count() == 1


def test_outputs_of_no_segmenter_are_refused() -> None:
    image = np.zeros((4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="not finite"):
        sliding(lambda images: np.full((len(images), 2, 2, 3), np.nan), image, (4, 4))
    with pytest.raises(ValueError, match=r"gives logits \[1, h, w, classes\]"):
        whole(lambda size: lambda images: np.zeros((len(images), 3)), image)
