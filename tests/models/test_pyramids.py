"""PVTv2 and EfficientFormerV2: published counts, what Mobile-Attention replaces, sizes, features, saving, errors."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_models
from keras_models import EfficientFormerV2MobiAtt, PVTv2MobiAtt
from mobiatt_tf.introspection import model_flows
from mobiatt_tf.layers import BiasedConvAttention, MobileAttention, MobileConvAttention, SpatialReduction
from tests.models.published import size_of

to_numpy = keras.ops.convert_to_numpy
BUILDERS = {"pvt_v2": PVTv2MobiAtt, "efficientformer_v2": EfficientFormerV2MobiAtt}
PYRAMIDS = pytest.mark.parametrize("family", BUILDERS)

# github.com/whai362/PVT; the second number: without the spatial reductions, which Mobile-Attention does not need.
PVT_V2 = {
    "b0": (3_666_760, 3_198_280),
    "b1": (14_009_000, 12_138_152),
    "b2": (25_362_856, 21_062_376),
    "b3": (45_238_696, 36_011_496),
    "b4": (62_556_072, 48_583_720),
    "b5": (81_956_008, 63_171_432),
}
PVT_V2_LI = 22_553_512
# github.com/snap-research/EfficientFormer: parameters with the distillation head, and attention blocks.
EFFICIENTFORMER_V2 = {"s0": (3_600_256, 4), "s1": (6_185_560, 4), "s2": (12_710_112, 8), "l": (26_322_288, 12)}
DISTILLATION_HEAD = {"s0": 177_000, "s1": 225_000, "s2": 289_000, "l": 385_000}
# Of one attention block with 49 tokens: position biases 8 * 49, and two talking heads of 8 * 8 + 8.
SOFTMAX_ONLY = 8 * 49 + 2 * (8 * 8 + 8)


def toy(family: str, **arguments: Any) -> keras.Model:
    return BUILDERS[family]("quickstart", **{"num_classes": 5, **arguments})


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize("variant", PVT_V2)
def test_pvt_v2_parameter_counts(variant: str) -> None:
    counts = tuple(size_of("pvt_v2", variant, attention).parameters for attention in ("softmax", "mobile"))
    assert counts == PVT_V2[variant]


@pytest.mark.slow
def test_pvt_v2_linear_parameter_count() -> None:
    assert size_of("pvt_v2", "b2_li", "softmax").parameters == PVT_V2_LI


@pytest.mark.slow
@pytest.mark.parametrize("variant", EFFICIENTFORMER_V2)
def test_efficientformer_v2_parameter_counts(variant: str) -> None:
    published, blocks = EFFICIENTFORMER_V2[variant]
    family = "efficientformer_v2"
    assert size_of(family, variant, "softmax", distilled=True).parameters == published
    single = published - DISTILLATION_HEAD[variant]
    assert size_of(family, variant, "softmax").parameters == single
    assert size_of(family, variant, "mobile").parameters == single - blocks * SOFTMAX_ONLY


@pytest.mark.slow
@PYRAMIDS
def test_no_argument_gives_the_smallest_published_model_at_224(family: str) -> None:
    model = BUILDERS[family]()
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)
    assert model.name == f"{family}_{keras_models.FAMILIES[family].default_variant}_mobile"


def test_mobile_pvt_v2_attends_to_all_tokens_in_every_block() -> None:
    model = toy("pvt_v2")
    mixings = [layer for layer in model.layers if isinstance(layer, MobileAttention)]
    assert [layer.key_tokens for layer in mixings] == [256, 64, 16, 4]
    assert [layer.reference_tokens for layer in mixings] == [256, 64, 16, 4]
    assert [layer.num_heads for layer in mixings] == [2, 4, 6, 8]
    assert not any(isinstance(layer, SpatialReduction) for layer in model.layers)
    host = toy("pvt_v2", attention="softmax")
    assert len([layer for layer in host.layers if isinstance(layer, SpatialReduction)]) == 3
    assert [host.get_layer(f"stage{stage}_block0_attention").key_tokens for stage in (1, 2, 3, 4)] == [4, 4, 4, 4]


def test_mobile_efficientformer_v2_replaces_the_attention_blocks_and_nothing_between_the_stages() -> None:
    mobile, host = toy("efficientformer_v2"), toy("efficientformer_v2", attention="softmax")
    kinds = {layer.name: type(layer) for layer in mobile.layers}
    replaced = {layer.name for layer in host.layers if isinstance(layer, BiasedConvAttention)}
    assert replaced == {"stage3_block1_attention", "stage4_block1_attention"}
    for layer in host.layers:
        assert kinds[layer.name] is (MobileConvAttention if layer.name in replaced else type(layer))
    attention = mobile.get_layer("stage3_block1_attention")
    assert (attention.tokens, attention.reference_tokens, attention.num_heads) == (4, 4, 8)


@PYRAMIDS
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
@pytest.mark.parametrize("image_size", [32, (32, 64), [64, 32]])
def test_square_and_other_sizes(family: str, attention: str, image_size: Any) -> None:
    model = toy(family, image_size=image_size, attention=attention)
    assert tuple(model(images(2, *model.input_shape[1:])).shape) == (2, 5)


@PYRAMIDS
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
def test_features_are_the_pyramid_of_the_classifier(family: str, attention: str) -> None:
    arguments = {"image_size": (64, 32), "attention": attention}
    classifier, pyramid = toy(family, **arguments), toy(family, features_only=True, **arguments)
    keras_models.copy_weights(classifier, pyramid)
    x = images(2, 64, 32, 3)
    features = pyramid(x)
    sides = [tuple(feature.shape[1:3]) for feature in features.values()]
    assert list(features) == ["stage1", "stage2", "stage3", "stage4"]
    assert sides == [(32, 16), (16, 8), (8, 4), (4, 2)]
    last = features["stage4"]
    if family == "efficientformer_v2":
        last = classifier.get_layer("norm")(last)
    logits = classifier.get_layer("head")(to_numpy(last).mean(axis=(1, 2)))
    np.testing.assert_allclose(to_numpy(logits), to_numpy(classifier(x)), rtol=1e-4, atol=1e-5)


@PYRAMIDS
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
def test_saved_and_loaded(family: str, attention: str, tmp_path: Path) -> None:
    model = toy(family, attention=attention, image_size=(32, 64), training_size=32)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = images(2, 32, 64, 3)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
    if attention == "mobile":
        layers = [layer for layer in loaded.layers if hasattr(layer, "reference_tokens")]
        assert layers[-1].reference_tokens == 4  # of a 32 x 32 image, not of 32 x 64


@PYRAMIDS
def test_flows_of_a_pyramid_can_be_looked_at(family: str) -> None:
    seen = model_flows(toy(family), images(2, 32, 32, 3))
    assert len(seen) == (4 if family == "pvt_v2" else 2)
    for flows in seen.values():
        np.testing.assert_allclose(flows["competition"].mean(axis=-1), 1, rtol=1e-4)


def test_distilled_returns_the_pair_in_training_and_the_mean_otherwise() -> None:
    model = toy("efficientformer_v2", distilled=True)
    x = images(4, 32, 32, 3)
    pair = model(x, training=True)
    assert [tuple(logits.shape) for logits in pair] == [(4, 5), (4, 5)]
    norm = keras.Model(model.input, model.get_layer("pool").output)(x, training=False)
    mean = (model.get_layer("head")(norm) + model.get_layer("head_distillation")(norm)) / 2
    np.testing.assert_allclose(to_numpy(model(x)), to_numpy(mean), rtol=1e-5, atol=1e-6)


@PYRAMIDS
def test_mixed_precision_stays_near_float32(family: str) -> None:
    full, mixed = toy(family), toy(family, dtype="mixed_bfloat16")
    mixed.set_weights(full.get_weights())
    x = images(2, 32, 32, 3)
    assert keras.backend.standardize_dtype(mixed(x).dtype) == "float32"
    expected = to_numpy(full(x))
    assert np.abs(to_numpy(mixed(x)) - expected).max() < 0.05 * np.abs(expected).max()


@PYRAMIDS
def test_drop_path_rises_linearly_over_all_blocks(family: str) -> None:
    model = toy(family, drop_path=0.3)
    blocks = [name.removesuffix("_add2") for name in (layer.name for layer in model.layers) if name.endswith("_add2")]
    rates = [model.get_layer(f"{block}_drop_path2").rate for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, len(blocks)))


@PYRAMIDS
def test_published_drop_path_is_the_default(family: str) -> None:
    variant, rate = {"pvt_v2": ("b0", 0.1), "efficientformer_v2": ("s2", 0.02)}[family]
    model = BUILDERS[family](variant, image_size=32)
    last = [layer for layer in model.layers if layer.name.endswith("_drop_path2")][-1]
    assert last.rate == pytest.approx(rate)


@PYRAMIDS
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
def test_a_model_moves_to_another_size_with_its_scale(family: str, attention: str) -> None:
    model = toy(family, attention=attention)
    table = "stage4_block1_attention/attention_bias"
    for weight in model.weights:
        if weight.path == table:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    larger = keras_models.resize(model, (64, 96))
    assert larger.input_shape == (None, 64, 96, 3)
    for layer in larger.layers:
        if hasattr(layer, "reference_tokens"):
            assert layer.reference_tokens == model.get_layer(layer.name).reference_tokens
    assert np.isfinite(to_numpy(larger(images(2, 64, 96, 3)))).all()
    if family == "efficientformer_v2" and attention == "softmax":
        old, new = (next(w for w in m.weights if w.path == table) for m in (model, larger))
        assert (tuple(old.shape), tuple(new.shape)) == ((1, 4, 8), (1, 24, 8))
        assert to_numpy(new).std() > 0


@PYRAMIDS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "huge"}, "variant 'huge'. Choose one of"),
        ({"attention": "flash"}, "no attention 'flash'"),
        ({"image_size": 40}, "multiple of 16, but 40"),
        ({"training_size": 40}, "training_size must be .* multiple of 16, but 40"),
        ({"num_heads": 7}, "num_heads=7"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_heads": 2, "head_dim": 8}, "Give num_heads or head_dim"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_wrong_arguments_are_refused(family: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDERS[family](**{"variant": "quickstart", **arguments})


def test_attention_may_differ_by_stage() -> None:
    model = toy("pvt_v2", attention=("mobile", "linear", "mobile", "softmax"))
    kinds = [type(model.get_layer(f"stage{stage}_block0_attention")).__name__ for stage in (1, 2, 3, 4)]
    assert kinds == ["MobileAttention", "LinearAttention", "MobileAttention", "SoftmaxAttention"]
    heads = [model.get_layer(f"stage{stage}_block0_attention").num_heads for stage in (1, 2, 3, 4)]
    assert heads == [2, 2, 6, 4]  # one for 8 channels, and the host's
    assert model.get_layer("stage1_block0_attention").dropout == 0.05
    assert model.get_layer("stage4_block0_attention").dropout == 0
    assert model.name == "pvt_v2_quickstart_mixed"
    assert np.isfinite(to_numpy(model(images(2, 32, 32, 3)))).all()

    model = toy("efficientformer_v2", attention=["mobile", "softmax"])
    kinds = [type(model.get_layer(f"stage{stage}_block1_attention")).__name__ for stage in (3, 4)]
    assert kinds == ["MobileConvAttention", "BiasedConvAttention"]

    with pytest.raises(ValueError, match="one for each of the 4 stages, but 2 were given"):
        toy("pvt_v2", attention=("mobile", "softmax"))
    with pytest.raises(ValueError, match="no attention 'flash'"):
        toy("pvt_v2", attention=("mobile", "mobile", "mobile", "flash"))
    with pytest.raises(ValueError, match="give attention='softmax'"):
        PVTv2MobiAtt("b2_li", attention=("mobile", "mobile", "mobile", "softmax"))


def test_pvt_v2_heads_may_differ_by_stage_and_linear_is_for_softmax() -> None:
    model = toy("pvt_v2", num_heads=(1, 2, 4, 8))
    assert [model.get_layer(f"stage{stage}_block0_attention").num_heads for stage in (1, 2, 3, 4)] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="one for each of the four stages"):
        toy("pvt_v2", num_heads=(1, 2))
    with pytest.raises(ValueError, match="give attention='softmax'"):
        PVTv2MobiAtt("b2_li")
