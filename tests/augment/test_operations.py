"""Every operation against the Pillow operation that timm runs under the same name."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mobiatt_tf.augment import color_jitter, colour, geometry, jitter, rand_augment
from mobiatt_tf.augment.policy import parse_rand_augment
from mobiatt_tf.augment.rand_augment import OPERATIONS, draw
from tests.augment.samples import many, photographs
from tests.timm_hosts import timm

TEXT = "rand-m9-mstd0.5-inc1"
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
auto_augment = timm.data.auto_augment


def timm_names(increasing: bool) -> list[str]:
    return auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS


def by_timm(monkeypatch, image: np.ndarray, index: int, level: float, sign: int, increasing: bool = True) -> np.ndarray:
    """timm's operation number `index` at a level, with the sign that it would draw."""
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    settings = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    operation = auto_augment.AugmentOp(timm_names(increasing)[index], 1.0, level, settings)
    return np.asarray(operation(Image.fromarray(image)))


def by_us(image: np.ndarray, index: int, level: float, sign: int, increasing: bool = True) -> np.ndarray:
    operation = OPERATIONS[index]
    argument = operation.argument if increasing else operation.plain_argument
    level, sign = tf.constant(level, tf.float64), tf.constant(sign, tf.float64)
    return operation.apply(tf.constant(image), argument(level, sign)).numpy()


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


def test_the_operations_are_those_of_timm():
    # The recipes' names of the increasing set, without the words that only timm's other sets need.
    names = [name.removesuffix("Increasing").removesuffix("Rel") for name in timm_names(True)]
    assert [operation.name for operation in OPERATIONS] == names


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("index", range(len(OPERATIONS)), ids=[operation.name for operation in OPERATIONS])
def test_operation_equals_pillow(monkeypatch, index, increasing):
    for image in photographs():
        for level in (0.5, 2.6, 5.0, 7.3, 9.0, 9.9):
            if not increasing and index == 4 and level < 2.5:
                continue  # no bits: Pillow 13 refuses what older versions made black
            for sign in (1, -1):
                ours = by_us(image, index, level, sign, increasing)
                off = difference(ours, by_timm(monkeypatch, image, index, level, sign, increasing))
                if OPERATIONS[index].name in GEOMETRIC:
                    assert off.max() <= 1  # float32 against float64, where the fraction is cut off
                    assert np.mean(off > 0) < 0.01
                else:
                    assert off.max() == 0
                if index > 2 and level == 9.0:  # and it did something
                    assert np.mean(difference(ours, image) > 0) > 0.01


def test_posterize_to_no_bits_is_black_and_to_eight_nothing():
    image = photographs()[0]
    assert not colour.posterize(tf.constant(image), tf.constant(0)).numpy().any()
    np.testing.assert_array_equal(colour.posterize(tf.constant(image), tf.constant(8)), image)


def test_what_a_shift_uncovers_has_imagenet_s_mean_colour():
    image = np.zeros((10, 20, 3), np.uint8)
    moved = geometry.translate_x(tf.constant(image), tf.constant(0.25, tf.float64)).numpy()
    assert (moved[:, :15] == 0).all()
    assert (moved[:, 15:] == (124, 116, 104)).all()


@settings(max_examples=25)
@given(
    image=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    level=st.floats(0, 9.99),
    sign=st.sampled_from([1, -1]),
)
def test_small_images_equal_pillow(image, level, sign):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for index, operation in enumerate(OPERATIONS):
            if operation.name == "Sharpness" and min(image.shape[:2]) < 3:
                np.testing.assert_array_equal(by_us(image, index, level, sign), image)  # nothing but edge
                continue
            off = difference(by_us(image, index, level, sign), by_timm(monkeypatch, image, index, level, sign))
            assert off.max() <= (operation.name in GEOMETRIC), operation.name


@settings(max_examples=25)
@given(value=st.integers(0, 255), height=st.integers(1, 40), width=st.integers(1, 40), level=st.floats(0, 10))
def test_grey_images_stay_whole(value, height, width, level):
    """A constant grey image is constant afterwards, apart from what a shift uncovers."""
    image = np.full((height, width, 3), value, np.uint8)
    for index, operation in enumerate(OPERATIONS):
        result = by_us(image, index, level, 1).reshape(-1, 3)
        covered = result[(result != (124, 116, 104)).any(axis=1)]
        assert (covered == covered[:1]).all(), operation.name
        if operation.name in (*GEOMETRIC, "AutoContrast", "Equalize", "Color", "Contrast", "Sharpness"):
            assert (covered == value).all(), operation.name


def test_rand_augment_is_the_drawn_operations_in_a_row(monkeypatch):
    image = photographs()[0]
    seeds = 60
    ours = many(lambda seed: rand_augment(tf.constant(image), seed, TEXT), seeds)
    choices, applied, levels, signs = many(lambda seed: draw(seed, parse_rand_augment(TEXT)), seeds)
    same = 0
    for seed in range(seeds):
        expected = image
        for layer in range(2):
            choice, level = choices[seed, layer], levels[seed, layer]
            if not applied[seed, layer]:
                continue
            if OPERATIONS[choice].name == "Posterize" and level == 10:
                expected = np.zeros_like(image)
                continue
            expected = by_timm(monkeypatch, expected, choice, level, signs[seed, layer])
        # A grey level that the first operation gets wrong, the second may make more of.
        assert np.mean(difference(ours[seed], expected) > 1) < 0.01
        same += np.array_equal(expected, image)
    assert 0 < same < seeds / 2


def test_color_jitter_is_pillow_s_enhancements_in_the_drawn_order():
    from PIL import ImageEnhance

    image = photographs()[1]
    ours = many(lambda seed: color_jitter(tf.constant(image), seed, 0.4), 24)
    orders, factors = many(lambda seed: jitter.draw(seed, 0.4), 24)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for result, order, row in zip(ours, orders, factors, strict=True):
        expected = Image.fromarray(image)
        for operation, factor in zip(order, row, strict=True):
            expected = enhancers[operation](expected).enhance(float(factor))
        np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("threads", [1, 5])
def test_results_depend_on_the_seed_alone(threads):
    image = tf.constant(photographs()[0])

    def both(seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return rand_augment(image, seed, TEXT), color_jitter(image, seed, 0.3)

    parallel = many(both, 20, threads)
    for seed in (0, 7, 19):  # and outside tf.data, without a graph
        one = both(tf.constant([seed, seed % 7], tf.int64))
        for found, expected in zip(one, parallel, strict=True):
            np.testing.assert_array_equal(found, expected[seed])
    assert len({result.tobytes() for result in parallel[1]}) == 20


def test_unknown_sizes_are_taken():
    """In a pipeline the size of an image may be known at run time only."""
    image = photographs()[0]
    traced = tf.function(
        lambda image, seed: rand_augment(image, seed, "rand-m9-p1"),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int64)],
    )
    seed = tf.constant([3, 4], tf.int64)
    assert traced(image, seed).shape == image.shape
    assert traced(image[:1, :1], seed).shape == (1, 1, 3)
