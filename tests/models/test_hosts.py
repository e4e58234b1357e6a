"""The softmax hosts against timm: logits and every stage's maps, with timm's weights, square and not."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import torch

from keras_models import FAMILIES, copy_weights, deit, efficientformer_v2, pvt_v2
from mobiatt_tf.interop import load_pytorch, pytorch_state_dict
from tests.timm_hosts import randomized, run, timm

to_numpy = keras.ops.convert_to_numpy
TOLERANCE = 1e-4  # of the largest absolute value; seen: 1e-6, and 1e-5 in one stage of EfficientFormerV2


class Host(NamedTuple):
    """One of our models and the timm model that it must equal."""

    family: str
    variant: str
    timm_name: str
    arguments: Mapping[str, Any] = MappingProxyType({})
    timm_arguments: Mapping[str, Any] = MappingProxyType({})
    sized: bool = True  # timm's model depends on the image size


# Small widths, to be quick; rows of the tables of variants, added for the tests.
TOY_DEIT = deit.Variant(embed_dim=48, depth=2, num_heads=3)
TOY_PVT_V2 = pvt_v2.Variant((8, 16, 24, 32), (1, 2, 1, 1), 0.0, num_heads=(1, 2, 3, 4))
TOY_PVT_V2_LI = pvt_v2.Variant((8, 16, 24, 32), (1, 2, 1, 1), 0.0, num_heads=(1, 2, 3, 4), pool_size=7)
TOY_EFFICIENTFORMER_V2 = efficientformer_v2.Variant((8, 12, 16, 24), (1, 1, 2, 2), 1, 0.0, ((4, 3), (3, 4)))
PVT_V2_WIDTHS = {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4)}
DEIT_WIDTHS = {"embed_dim": 48, "depth": 2, "num_heads": 3}
EFFICIENTFORMER_V2_WIDTHS = {
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 2),
    "num_vit": 1,
    "mlp_ratios": (4, 4, (4, 3), (3, 4)),
}
TOYS = [
    Host("deit", "toy", "deit_tiny_patch16_224", {}, DEIT_WIDTHS),
    Host("deit", "toy", "deit_tiny_distilled_patch16_224", {"distilled": True}, DEIT_WIDTHS),
    Host("pvt_v2", "toy", "pvt_v2_b0", {}, PVT_V2_WIDTHS, sized=False),
    Host("pvt_v2", "toy_li", "pvt_v2_b2_li", {}, PVT_V2_WIDTHS, sized=False),
    Host("efficientformer_v2", "toy", "efficientformerv2_s0", {"distilled": True}, EFFICIENTFORMER_V2_WIDTHS),
    Host("efficientformer_v2", "toy", "efficientformerv2_s0", {}, {**EFFICIENTFORMER_V2_WIDTHS, "distillation": False}),
]
FULL = [
    Host("deit", "tiny", "deit_tiny_distilled_patch16_224", {"distilled": True}),
    Host("pvt_v2", "b0", "pvt_v2_b0", sized=False),
    Host("efficientformer_v2", "s0", "efficientformerv2_s0", {"distilled": True}),
]


@pytest.fixture(autouse=True)
def toy_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deit.VARIANTS, "toy", TOY_DEIT)
    monkeypatch.setitem(pvt_v2.VARIANTS, "toy", TOY_PVT_V2)
    monkeypatch.setitem(pvt_v2.VARIANTS, "toy_li", TOY_PVT_V2_LI)
    monkeypatch.setitem(efficientformer_v2.VARIANTS, "toy", TOY_EFFICIENTFORMER_V2)


def both(host: Host, size: tuple[int, int], classes: int = 1000) -> tuple[torch.nn.Module, keras.Model]:
    """timm's model with random weights, and ours with the same."""
    sized = {"img_size": size} if host.sized else {}
    theirs = randomized(
        timm.create_model(host.timm_name, num_classes=classes, **sized, **host.timm_arguments), image_size=size
    )
    ours = FAMILIES[host.family].build(
        host.variant, image_size=size, num_classes=classes, attention="softmax", **host.arguments
    )
    report = load_pytorch(ours, theirs.state_dict())
    assert len(report.carried) == len(ours.weights)
    assert report.new == report.dropped == report.resized == ()
    return theirs, ours


def relative_error(actual: Any, expected: np.ndarray) -> float:
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(to_numpy(actual) - expected).max() / np.abs(expected).max())


def check_parity(host: Host, size: tuple[int, int], classes: int) -> None:
    theirs, ours = both(host, size, classes)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    logits, maps = run(theirs, images)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2  # the images matter
    assert relative_error(ours(images, training=False), logits) < TOLERANCE
    if host.family == "deit":
        return
    pyramid = FAMILIES[host.family].build(host.variant, image_size=size, attention="softmax", features_only=True)
    copy_weights(ours, pyramid)
    features = pyramid(images, training=False)
    assert list(features) == ["stage1", "stage2", "stage3", "stage4"]
    for index, (name, feature) in enumerate(features.items()):
        assert tuple(feature.shape[1:3]) == (size[0] // (4 * 2**index), size[1] // (4 * 2**index))
        assert relative_error(feature, maps[index]) < TOLERANCE, name


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("host", TOYS, ids=lambda host: f"{host.timm_name}-{len(host.arguments)}")
def test_a_narrow_host_equals_timm(host: Host, size: tuple[int, int]) -> None:
    check_parity(host, size, classes=7)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (256, 192)])
@pytest.mark.parametrize("host", FULL, ids=lambda host: host.timm_name)
def test_a_published_size_equals_timm(host: Host, size: tuple[int, int]) -> None:
    check_parity(host, size, classes=1000)


@pytest.mark.parametrize("host", TOYS, ids=lambda host: f"{host.timm_name}-{len(host.arguments)}")
def test_timm_takes_our_weights_back(host: Host) -> None:
    """timm, filled with our state dict, strictly, computes what our model computes."""
    theirs, ours = both(host, (64, 64), classes=5)
    for weight in ours.weights:
        noise = 1 + 0.1 * np.random.default_rng(1).normal(size=weight.shape)
        weight.assign(to_numpy(weight) * noise.astype("float32") + 0.01)
    state = {name: torch.from_numpy(value) for name, value in pytorch_state_dict(ours).items()}
    counters = {name: value for name, value in theirs.state_dict().items() if name.endswith("num_batches_tracked")}
    theirs.load_state_dict({**state, **counters}, strict=True)
    theirs.eval()
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    assert relative_error(ours(images, training=False), run(theirs, images)[0]) < TOLERANCE
