"""What is drawn: how often, how strong, how large. Seeds are fixed, so that each run gives the same."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mobiatt_tf.augment import Augmentation, color_jitter, erasing, jitter, mix, mixing, rand_augment, random_erasing
from mobiatt_tf.augment.policy import RandAugment, parse_rand_augment
from mobiatt_tf.augment.rand_augment import OPERATIONS, draw
from tests.augment.samples import many

COUNT = 6000
UNLIKELY = 1e-3  # probability below which a test of a distribution fails


def is_binomial(successes: int, count: int, probability: float) -> bool:
    return stats.binomtest(int(successes), count, probability).pvalue > UNLIKELY


def test_rand_augment_draws():
    settings = parse_rand_augment("rand-m9-mstd0.5-inc1")
    choices, applied, levels, signs = many(lambda seed: draw(seed, settings), COUNT)
    for layer in range(2):
        counts = np.bincount(choices[:, layer], minlength=len(OPERATIONS))
        assert len(counts) == len(OPERATIONS)
        assert stats.chisquare(counts).pvalue > UNLIKELY
        assert is_binomial(applied[:, layer].sum(), COUNT, 0.5)
        assert is_binomial((signs[:, layer] > 0).sum(), COUNT, 0.5)
        unclipped = levels[:, layer][levels[:, layer] < 10]
        assert is_binomial(len(unclipped), COUNT, stats.norm.cdf(2))
        assert stats.kstest(unclipped, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > UNLIKELY
    assert set(np.unique(signs)) == {-1, 1}
    pairs = np.bincount(choices[:, 0] * 15 + choices[:, 1], minlength=225)  # independent, with replacement
    assert stats.chisquare(pairs).pvalue > UNLIKELY


def test_mstd_0_is_one_level_and_infinite_uniform():
    levels = many(lambda seed: draw(seed, parse_rand_augment("rand-m7-mstd0"))[2], 50)
    assert (levels == 7).all()
    levels = many(lambda seed: draw(seed, parse_rand_augment("rand-m8-mstd101"))[2], 2000)
    assert stats.kstest(levels[:, 0] / 8, "uniform").pvalue > UNLIKELY


def test_notation():
    assert parse_rand_augment("rand") == RandAugment(10, 0.0, 2, 0.5, False)  # timm's defaults
    assert parse_rand_augment("rand-mstd0.5-m9-inc1") == RandAugment(9, 0.5, 2, 0.5, True)
    assert parse_rand_augment("rand-n3-p.25-m4-inc0-mstd1") == RandAugment(4, 1.0, 3, 0.25, False)
    assert parse_rand_augment("rand-mstdinf").deviation == float("inf")


@pytest.mark.parametrize(
    "text", ["augmix-m3", "rand-m", "rand-m9.5", "rand-m11", "rand-n0", "rand-p1.5", "rand-x3", "rand-m9-m8", "rand-"]
)
def test_mistakes_in_the_notation_are_explained(text):
    with pytest.raises(ValueError, match=f'rand_augment is "{text}"; '):
        Augmentation(rand_augment=text)
    with pytest.raises(ValueError, match=f'rand_augment is "{text}"; '):
        rand_augment(tf.zeros([4, 4, 3], tf.uint8), tf.constant([0, 0], tf.int64), text)


def test_n_and_p_count():
    image = tf.constant(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    untouched = many(lambda seed: rand_augment(image, seed, "rand-m9-p0-inc1"), 30)
    assert (untouched == image.numpy()).all()
    assert many(lambda seed: draw(seed, parse_rand_augment("rand-n4"))[0], 3).shape == (3, 4)


def test_jitter_draws():
    orders, factors = many(lambda seed: jitter.draw(seed, 0.4), COUNT)
    assert (np.sort(orders) == [0, 1, 2]).all()
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > UNLIKELY
    assert len(np.unique(orders, axis=0)) == 6
    for place in range(3):
        assert stats.kstest((factors[:, place] - 0.6) / 0.8, "uniform").pvalue > UNLIKELY
    strong = many(lambda seed: jitter.draw(seed, 1.5)[1], 500)
    assert 0 <= strong.min() < 0.05  # factors are never negative
    assert 2.4 < strong.max() <= 2.5
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        color_jitter(tf.zeros([2, 2, 3], tf.uint8), tf.constant([0, 0], tf.int64), -1)


def boxes_by_definition(height: int, width: int, count: int) -> np.ndarray:
    """Random erasing's boxes, drawn with NumPy from timm's definition: [count, 4], rows of -1 where none fits."""
    generator = np.random.default_rng(5)
    boxes = np.full((count, 4), -1)
    for box in boxes:
        for _ in range(10):
            area = generator.uniform(0.02, 1 / 3) * height * width
            aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
            rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
                box[:] = top, left, rows, columns
                break
    return boxes


@pytest.mark.parametrize("size", [(224, 224), (60, 200)])
def test_erasing_boxes(size):
    boxes, fits = many(lambda seed: erasing.draw_box(*map(tf.constant, size), seed), COUNT)
    boxes = boxes[fits]
    expected = boxes_by_definition(*size, COUNT)
    expected = expected[expected[:, 0] >= 0]
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] / (size[0] - box[:, 2]),
        lambda box: box[:, 1] / (size[1] - box[:, 3]),
    ):
        assert stats.ks_2samp(measure(boxes), measure(expected)).pvalue > UNLIKELY
    if size == (224, 224):  # hardly a draw is refused: area and aspect are uniform as the definition says
        assert fits.all()
        assert stats.kstest((boxes[:, 2] * boxes[:, 3] / 224**2 - 0.02) / (1 / 3 - 0.02), "uniform").statistic < 0.05


def test_erasing_puts_noise_into_the_box_only():
    image = tf.fill([40, 50, 3], 7.0)
    images = many(lambda seed: random_erasing(image, seed, 0.25), 1200)
    touched = (images != 7).any(axis=(1, 2, 3))
    assert is_binomial(touched.sum(), 1200, 0.25)
    noise = []
    for erased in images[touched]:
        rows, columns = (erased != 7).any(axis=(1, 2)), (erased != 7).any(axis=(0, 2))
        box = erased[np.ix_(rows, columns)]
        assert box.shape[0] * box.shape[1] * 3 == (erased != 7).sum()  # one rectangle, all of it
        noise.append(box.ravel()[:50])
    assert stats.kstest(np.concatenate(noise), "norm").pvalue > UNLIKELY
    always = many(lambda seed: random_erasing(image, seed, 1.0), 50)
    assert (always != 7).any(axis=(1, 2, 3)).all()
    assert (many(lambda seed: random_erasing(image, seed, 0.0), 50) == 7).all()
    with pytest.raises(ValueError, match="probability must be from 0 to 1, got 2"):
        random_erasing(image, tf.constant([0, 0], tf.int64), 2)


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(-(2**62), 2**62))
def test_erasing_takes_every_size(height, width, seed):
    image = tf.fill([height, width, 3], 7.0)
    erased = random_erasing(image, tf.constant([seed, seed], tf.int64), 1.0)
    assert erased.shape == image.shape
    if min(height, width) == 1:  # a box is smaller than the image in both directions
        np.testing.assert_array_equal(erased, image)


@pytest.mark.parametrize("parameter", [0.05, 0.8, 1.0, 4.0])
def test_shares_have_a_beta_distribution(parameter):
    shares = many(lambda seed: mixing.draw(seed, Augmentation(mixup=parameter))[1], COUNT).astype(np.float64)
    inner = shares[(shares > 1e-6) & (shares < 1 - 1e-6)]  # of Beta(.05, .05) half is nearer to 0 or 1 than float32
    law = stats.beta(parameter, parameter)
    low, high = law.cdf([1e-6, 1 - 1e-6])
    assert np.isfinite(shares).all()
    assert is_binomial(len(inner), COUNT, min(high - low, 1.0))
    assert stats.kstest((law.cdf(inner) - low) / (high - low), "uniform").pvalue > UNLIKELY


@pytest.mark.parametrize(
    ("augmentation", "probability"),
    [
        (Augmentation(mixup=0.8, cutmix=1.0), 0.5),
        (Augmentation(mixup=0.8, cutmix=1.0, cutmix_share=0.2), 0.2),
        (Augmentation(mixup=0.8), 0.0),
        (Augmentation(cutmix=1.0, cutmix_share=0.2), 1.0),
    ],
)
def test_cutmix_or_mixup(augmentation, probability):
    is_cutmix, shares, positions = many(lambda seed: mixing.draw(seed, augmentation), COUNT)
    assert is_binomial(is_cutmix.sum(), COUNT, probability)
    for chosen, parameter in ((is_cutmix, augmentation.cutmix), (~is_cutmix, augmentation.mixup)):
        if chosen.any():
            assert stats.kstest(shares[chosen], stats.beta(parameter, parameter).cdf).pvalue > UNLIKELY
    assert stats.kstest(positions.ravel(), "uniform").pvalue > UNLIKELY


@given(
    pairs=st.integers(1, 3),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    seed=st.integers(0, 2**62),
    augmentation=st.sampled_from(
        [Augmentation(mixup=0.8), Augmentation(cutmix=1.0), Augmentation(mixup=0.8, cutmix=1.0)]
    ),
)
def test_labels_say_what_is_in_the_images(pairs, height, width, seed, augmentation):
    """Image i has the value i throughout, so that what it became of says which part came from where."""
    count = 2 * pairs
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, height, width, 3))
    labels = np.eye(count, dtype=np.float32)
    mixed, probabilities = mix(
        tf.constant(images.copy()), tf.constant(labels), tf.constant([seed, 1], tf.int64), augmentation
    )
    mixed, probabilities = mixed.numpy(), probabilities.numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities @ np.arange(count), mixed.mean(axis=(1, 2, 3)), atol=1e-4)
    partners = np.arange(count) ^ 1
    np.testing.assert_allclose(np.diag(probabilities), np.diag(probabilities[:, partners][partners]), atol=1e-6)
    assert (np.diag(probabilities) + probabilities[np.arange(count), partners] > 1 - 1e-6).all()
    if not augmentation.mixup:  # every pixel is from one image or the other
        assert np.isin(mixed, np.arange(count)).all()
    elif not augmentation.cutmix:  # every pixel is from both
        np.testing.assert_allclose(mixed, np.broadcast_to(mixed[:, :1, :1], mixed.shape), atol=1e-6)


def test_cutmix_boxes():
    """The box's area is 1 - share before the edges cut it off; the middle is anywhere."""
    height, width = 60, 80
    shares = np.linspace(0.01, 0.99, 50, dtype=np.float32)
    for share in shares:
        box = mixing.cutmix_box(tf.constant(height), tf.constant(width), tf.constant(share), tf.constant([0.5, 0.5]))
        top, left, bottom, right = box.numpy()
        sides = [int(side * np.sqrt(1 - share)) for side in (height, width)]
        assert [bottom - top, right - left] == sides
        assert top == height // 2 - sides[0] // 2
        assert left == width // 2 - sides[1] // 2
    corner = mixing.cutmix_box(tf.constant(height), tf.constant(width), tf.constant(0.75), tf.constant([0.0, 0.9999]))
    np.testing.assert_array_equal(corner, [0, 79 - 20, 15, 80])


def test_a_batch_may_be_mixed_in_parts():
    """Devices that mix their part of a batch with the batch's seed get what mixing all of it gives."""
    generator = np.random.default_rng(0)
    images = tf.constant(generator.normal(size=(8, 12, 10, 3)).astype(np.float32))
    labels = tf.constant(generator.dirichlet(np.ones(5), size=8).astype(np.float32))
    augmentation = Augmentation(mixup=0.8, cutmix=1.0)
    kinds = set()
    for number in range(12):
        seed = tf.constant([number, 3], tf.int64)
        kinds.add(bool(mixing.draw(seed, augmentation)[0]))
        whole = mix(images, labels, seed, augmentation)
        parts = [mix(images[i : i + 4], labels[i : i + 4], seed, augmentation) for i in (0, 4)]
        for index in range(2):
            np.testing.assert_allclose(whole[index], tf.concat([part[index] for part in parts], 0), rtol=1e-6)
    assert kinds == {True, False}


def test_no_mixing_and_odd_batches():
    images, labels, seed = tf.zeros([3, 4, 4, 3]), tf.zeros([3, 2]), tf.constant([0, 0], tf.int64)
    assert mix(images, labels, seed, Augmentation()) == (images, labels)
    with pytest.raises(ValueError, match="even number of them, not 3"):
        mix(images, labels, seed, Augmentation(mixup=1.0))
