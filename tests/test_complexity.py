"""Multiply-adds against the published and the derived figures."""

import keras
import pytest

from keras_models import FAMILIES
from mobiatt_tf.complexity import count_macs
from mobiatt_tf.layers import ConvBN
from tests.models.published import size_of

# G multiply-adds of one 224 x 224 image: figure and how many digits it was published with. DeiT and PVTv2 from
# products of the published shapes, PVTv2 B2-Li from its README, EfficientFormerV2 from its README.
SOFTMAX = {
    "deit": {"tiny": (1.254, 3), "small": (4.599, 3), "base": (17.564, 3)},
    "pvt_v2": {
        "b0": (0.566, 3), "b1": (2.108, 3), "b2": (4.027, 3), "b2_li": (3.91, 2), "b3": (6.897, 3), "b4": (10.101, 3),
        "b5": (11.717, 3),
    },
    "efficientformer_v2": {"s0": (0.40, 2), "s1": (0.65, 2), "s2": (1.25, 2), "l": (2.56, 2)},
}  # fmt: skip
MOBILE = {
    "deit": {"tiny": 1.082, "small": 4.256, "base": 16.878},
    "pvt_v2": {"b0": 0.551, "b1": 2.112, "b2": 4.050, "b3": 6.979, "b4": 10.239, "b5": 11.913},
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [(family, row) for family, rows in SOFTMAX.items() for row in rows])
def test_softmax_hosts(family: str, variant: str) -> None:
    figure, digits = SOFTMAX[family][variant]
    macs = size_of(family, variant, "softmax").macs / 1e9
    assert abs(macs - figure) <= 0.01 * figure + 0.5 * 10**-digits


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [(family, row) for family, rows in MOBILE.items() for row in rows])
def test_mobile_models(family: str, variant: str) -> None:
    macs = size_of(family, variant, "mobile").macs / 1e9
    assert macs == pytest.approx(MOBILE[family][variant], rel=1e-3)


def test_by_hand() -> None:
    images = keras.Input((8, 6, 3))
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same")(images)  # [B, 4, 3, 4]
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    x = keras.layers.Dense(5)(x)
    model = keras.Model(images, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    assert count_macs(model) == 12 * 9 * 3 * 4 + 12 * 9 * 4 + 12 * 4 * 5 + 5 * 2


def test_mixing_counts_by_definition() -> None:
    """DeiT: twelve blocks of N = 17 tokens here, with 8 heads of 8 channels against 4 of 16."""
    mobile = FAMILIES["deit"].build("quickstart")
    softmax = FAMILIES["deit"].build("quickstart", attention="softmax")
    projections = count_macs(softmax) - 4 * 2 * 17 * 17 * 64
    assert count_macs(mobile) - projections == 4 * 2 * 17 * 64 * 8


def test_an_unknown_layer_is_not_counted_as_nothing() -> None:
    images = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match="Conv2DTranspose, are not known"):
        count_macs(keras.Model(images, keras.layers.Conv2DTranspose(4, 3)(images)))


def test_an_open_image_size_is_refused() -> None:
    images = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match="build the model at a fixed size"):
        count_macs(keras.Model(images, keras.layers.Conv2D(4, 3)(images)))


def test_a_layer_that_is_called_again_counts_again() -> None:
    images = keras.Input((8, 6, 3))
    shared = keras.layers.Conv2D(3, 3, padding="same")
    x = keras.layers.MaxPooling2D()(shared(shared(images)))
    assert count_macs(keras.Model(images, shared(x))) == (2 * 48 + 12) * 9 * 3 * 3


def test_a_layer_of_layers_that_is_called_again_is_not_known() -> None:
    images = keras.Input((8, 6, 3))
    shared = ConvBN(3, 3)
    with pytest.raises(ValueError, match="holds layers and is called again"):
        count_macs(keras.Model(images, shared(shared(images))))
