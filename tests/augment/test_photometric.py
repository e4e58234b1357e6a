"""Photometric distortion against the formulas of mmsegmentation, computed pixel by pixel."""

import colorsys

import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.augment import photometric
from mobiatt_tf.augment.photometric import photometric_distortion
from tests.augment.samples import many, photographs

HUE = photometric.SEGMENTATION_HUE


def seed_of(number: int) -> tf.Tensor:
    return tf.constant([number, 7 * number + 1], tf.int64)


def in_hsv(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Saturation times a factor, hue plus a share of the circle, by Python's own conversion."""
    result = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
        result[place] = np.multiply(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v), 255)
    return result


def expected(image: np.ndarray, seed: tf.Tensor) -> np.ndarray:
    brightness, contrast, saturation, hue, contrast_first = (draw.numpy() for draw in photometric.draw(seed, HUE))
    image = np.clip(image + brightness, 0, 255)
    if contrast_first:
        image = np.clip(image * contrast, 0, 255)
    image = in_hsv(image, saturation, hue)
    return image if contrast_first else np.clip(image * contrast, 0, 255)


@pytest.mark.parametrize("number", range(24))
def test_distortion_is_that_of_the_formulas(number):
    image = photographs()[number % 2][::8, ::8].astype(np.float32)
    ours = photometric_distortion(tf.constant(image), seed_of(number), HUE).numpy()
    np.testing.assert_allclose(ours, expected(image.astype(np.float64), seed_of(number)), atol=0.05)


@pytest.fixture(scope="module")
def draws() -> dict[str, np.ndarray]:
    names = ("brightness", "contrast", "saturation", "hue", "contrast_first")
    return dict(zip(names, many(lambda seed: photometric.draw(seed, HUE), 4000), strict=True))


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "unchanged"),
    [("brightness", -32, 32, 0), ("contrast", 0.5, 1.5, 1), ("saturation", 0.5, 1.5, 1), ("hue", -0.1, 0.1, 0)],
)
def test_each_change_happens_every_other_time_and_is_uniform(draws, name, lowest, highest, unchanged):
    values = draws[name]
    happens = values != unchanged
    assert happens.mean() == pytest.approx(0.5, abs=0.04)
    shares = (values[happens] - lowest) / (highest - lowest)
    assert 0 <= shares.min() < 0.01
    assert 0.99 < shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.std() == pytest.approx(12**-0.5, abs=0.02)


def test_hues_turn_by_18_of_360_degrees_for_detection_and_by_36_for_segmentation():
    """OpenCV's circle has 360 parts for float32 images (mmdetection) and 180 for uint8 images (mmsegmentation)."""
    for largest, degrees in ((photometric.DETECTION_HUE, 18), (photometric.SEGMENTATION_HUE, 36)):
        turned = 360 * many(lambda seed, largest=largest: photometric.draw(seed, largest), 400)[3]
        assert 0.9 * degrees < np.abs(turned).max() <= degrees * 1.00001


def test_changes_are_independent(draws):
    happens = np.stack([draws["brightness"] != 0, draws["contrast"] != 1, draws["saturation"] != 1, draws["hue"] != 0])
    correlation = np.corrcoef(np.concatenate([happens, draws["contrast_first"][np.newaxis]]))
    assert np.abs(correlation - np.eye(5)).max() < 0.06
    assert draws["contrast_first"].mean() == pytest.approx(0.5, abs=0.04)


def test_one_image_in_sixteen_stays_as_it_is():
    image = tf.constant(photographs()[0][::8, ::8].astype(np.float32))
    distorted = many(lambda seed: photometric_distortion(image, seed, HUE), 800)
    same = (distorted == image.numpy()).all((1, 2, 3)).mean()
    assert same == pytest.approx(1 / 16, abs=0.03)
    assert distorted.min() >= 0
    assert distorted.max() <= 255


def test_each_pixel_is_changed_by_itself():
    image = photographs()[0][::8, ::8].astype(np.float32)
    order = np.random.default_rng(0).permutation(image.shape[0])
    for number in range(6):
        whole = photometric_distortion(tf.constant(image), seed_of(number), HUE).numpy()
        shuffled = photometric_distortion(tf.constant(image[order]), seed_of(number), HUE).numpy()
        np.testing.assert_array_equal(shuffled, whole[order])


def test_grey_stays_grey_and_shapes_are_kept():
    grey = np.full((5, 7, 3), 90, np.float32)
    function = tf.function(
        lambda image, seed: photometric_distortion(image, seed, HUE),
        input_signature=[tf.TensorSpec((5, 7, 3)), tf.TensorSpec(2, tf.int64)],
    )
    assert function.get_concrete_function().output_shapes == (5, 7, 3)
    for number in range(10):
        distorted = function(grey, seed_of(number)).numpy()
        np.testing.assert_allclose(distorted, distorted[0, 0, 0] * np.ones_like(grey), atol=1e-3)
