"""DeiT: published parameter counts, sizes, distillation, features, precision, saving."""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_models
from keras_models import DeiTMobiAtt
from keras_models.deit import VARIANTS
from tests.models.published import size_of

to_numpy = keras.ops.convert_to_numpy

# github.com/facebookresearch/deit; shared by softmax and Mobile-Attention, whose parameters are the same.
PUBLISHED = {
    "tiny": (5_717_416, 5_910_800),
    "small": (22_050_664, 22_436_432),
    "base": (86_567_656, 87_338_192),
}


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def toy(**arguments: object) -> keras.Model:
    return DeiTMobiAtt("quickstart", **{"num_classes": 5, **arguments})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("attention", ["softmax", "mobile"])
def test_parameter_counts_are_the_published_ones(variant: str, attention: str) -> None:
    counts = (
        size_of("deit", variant, attention).parameters,
        size_of("deit", variant, attention, distilled=True).parameters,
    )
    assert counts == PUBLISHED[variant]


@pytest.mark.slow
def test_no_argument_gives_the_tiny_model_at_224() -> None:
    model = DeiTMobiAtt()
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)
    assert model.count_params() == PUBLISHED["tiny"][0]
    assert model.get_layer("block0_attention").num_heads == 24


@pytest.mark.parametrize("attention", ["mobile", "softmax", "linear"])
def test_heads_follow_the_attention(attention: str) -> None:
    heads = toy(attention=attention).get_layer("block0_attention").num_heads
    assert heads == (8 if attention == "mobile" else VARIANTS["quickstart"].num_heads)
    assert toy(attention=attention, num_heads=16).get_layer("block3_attention").num_heads == 16


@pytest.mark.parametrize("image_size", [28, (14, 56), np.int64(28), [28, 14]])
def test_square_and_other_sizes(image_size: int | tuple[int, int]) -> None:
    model = toy(image_size=image_size)
    assert tuple(model(images(2, *model.input_shape[1:])).shape) == (2, 5)


def test_block_is_pre_norm_with_residuals() -> None:
    """Recompute the first block by hand from the model's own layers."""
    model = toy(features_only=True)
    seen = {name: to_numpy(value) for name, value in model(images(2, 28, 28, 3)).items()}
    assert list(seen) == ["embedding", "block0", "block1", "block2", "block3", "norm"]
    assert all(value.shape == (2, 17, 64) for value in seen.values())
    x = seen["embedding"]
    x = x + to_numpy(model.get_layer("block0_attention")(model.get_layer("block0_norm1")(x)))
    x = x + to_numpy(model.get_layer("block0_mlp")(model.get_layer("block0_norm2")(x)))
    np.testing.assert_allclose(seen["block0"], x, rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_classifier() -> None:
    classifier, features = toy(), toy(features_only=True)
    for layer in features.layers:
        layer.set_weights(classifier.get_layer(layer.name).get_weights())
    x = images(2, 28, 28, 3)
    token = features(x)["norm"][:, 0]
    np.testing.assert_allclose(
        to_numpy(classifier.get_layer("head")(token)), to_numpy(classifier(x)), rtol=1e-5, atol=1e-6
    )


def test_distilled_returns_the_pair_in_training_and_the_mean_otherwise() -> None:
    model = toy(distilled=True, drop_path=0.0, attention_dropout=0.0)
    x = images(2, 28, 28, 3)
    class_logits, distillation_logits = (to_numpy(part) for part in model(x, training=True))
    assert np.abs(class_logits - distillation_logits).max() > 1e-3
    np.testing.assert_allclose(to_numpy(model(x)), (class_logits + distillation_logits) / 2, atol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
def test_saved_and_loaded(distilled: bool, tmp_path: Path) -> None:
    model = toy(distilled=distilled, image_size=(14, 28), training_size=28)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(2, 14, 28, 3)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_move_to_another_image_size(distilled: bool) -> None:
    small, large = toy(distilled=distilled), toy(distilled=distilled, image_size=(56, 42), batch_size=1)
    keras_models.copy_weights(small, large)
    x = images(1, 56, 42, 3)
    assert np.isfinite(to_numpy(large(x))).all()
    for layer in small.layers:
        if layer.name != "position_embedding":
            for before, after in zip(layer.get_weights(), large.get_layer(layer.name).get_weights(), strict=True):
                np.testing.assert_array_equal(before, after)
    prefix = 2 if distilled else 1
    before, after = (model.get_layer("position_embedding").embedding for model in (small, large))
    assert tuple(after.shape) == (1, prefix + 8 * 6, 64)
    np.testing.assert_array_equal(to_numpy(before)[:, :prefix], to_numpy(after)[:, :prefix])
    # A resized embedding looks like the old one: the mean over the grid stays.
    np.testing.assert_allclose(
        to_numpy(after)[:, prefix:].mean(axis=1), to_numpy(before)[:, prefix:].mean(axis=1), atol=5e-3
    )


def test_copying_weights_between_different_models_lists_both_sides_and_changes_nothing() -> None:
    plain, distilled = toy(), toy(distilled=True)
    before = [to_numpy(weight).copy() for weight in distilled.weights]
    with pytest.raises(ValueError, match="only in the target: head_distillation/kernel"):
        keras_models.copy_weights(plain, distilled)
    with pytest.raises(ValueError, match=r"head/kernel: \(64, 5\) in the source, \(64, 7\) in the target"):
        keras_models.copy_weights(plain, toy(num_classes=7))
    for old, weight in zip(before, distilled.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(weight))


@pytest.mark.parametrize(("distilled", "prefix"), [(False, 1), (True, 2)])
def test_training_size_sets_the_reference_tokens_of_every_block(distilled: bool, prefix: int) -> None:
    def references(model: keras.Model) -> list[int]:
        return [model.get_layer(f"block{index}_attention").reference_tokens for index in range(4)]

    assert references(toy(distilled=distilled)) == [prefix + 16] * 4
    assert references(toy(distilled=distilled, image_size=56)) == [prefix + 64] * 4
    assert references(toy(distilled=distilled, image_size=56, training_size=(28, 14))) == [prefix + 8] * 4


def test_mixed_precision_logits_are_float32_and_the_global_policy_is_restored() -> None:
    before = keras.config.dtype_policy().name
    model = toy(dtype="mixed_bfloat16")
    assert keras.config.dtype_policy().name == before
    assert model.get_layer("block0_attention").compute_dtype == "bfloat16"
    assert keras.backend.standardize_dtype(model(images(1, 28, 28, 3)).dtype) == "float32"


def test_no_classes_gives_the_class_token() -> None:
    assert toy(num_classes=0).output_shape == (None, 64)


def test_attention_may_differ_by_block() -> None:
    model = toy(attention=("softmax", "mobile", "mobile", "linear"))
    kinds = [type(model.get_layer(f"block{index}_attention")).__name__ for index in range(4)]
    assert kinds == ["SoftmaxAttention", "MobileAttention", "MobileAttention", "LinearAttention"]
    assert [model.get_layer(f"block{index}_attention").num_heads for index in range(4)] == [4, 8, 8, 4]
    with pytest.raises(ValueError, match="one for each of the 4 blocks, but 2 were given"):
        toy(attention=("mobile", "softmax"))


def test_drop_path_rises_linearly() -> None:
    model = toy(drop_path=0.3)
    rates = [model.get_layer(f"block{index}_drop_path2").rate for index in range(4)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "huge"}, "no DeiT variant 'huge'. Choose one of tiny, small, base, quickstart"),
        ({"attention": "flash"}, "no attention 'flash'. Choose one of mobile, softmax, linear"),
        ({"image_size": 30}, "multiple of 7, but 30"),
        ({"image_size": 28.0}, "one side or"),
        ({"image_size": (28, 28, 3)}, "one side or"),
        ({"num_heads": 7}, "num_heads=7 and model_dim=64"),
        ({"head_dim": 7}, "head_dim must divide the width 64, but head_dim=7"),
        ({"head_dim": 8, "num_heads": 8}, "Give num_heads or head_dim"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeiTMobiAtt(**{"variant": "quickstart", **arguments})  # type: ignore[arg-type]
