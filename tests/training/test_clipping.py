"""Adaptive gradient clipping against timm's, on the same weights and gradients."""

import contextlib
import re
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import keras_models
from mobiatt_tf.interop.pytorch import pytorch_state_dict
from mobiatt_tf.training.clipping import adaptive_clip, unit_axes
from tests.timm_hosts import timm

# A variable's path and shape in Keras, the order of its axes in PyTorch, and its shape there.
KINDS = {
    "scalar": ("layer/temperature", (), (), ()),
    "bias": ("head/bias", (5,), (0,), (5,)),
    "dense": ("block0_mlp/fc1/kernel", (4, 6), (1, 0), (6, 4)),
    "convolution": ("stem_conv1/conv/kernel", (3, 2, 4, 6), (3, 2, 0, 1), (6, 4, 3, 2)),
    "depthwise": ("stage1_block0_mlp/dwconv/kernel", (3, 2, 6, 1), (2, 3, 0, 1), (6, 1, 3, 2)),
    "convolution in one dimension": ("layer/kernel", (3, 4, 6), (2, 1, 0), (6, 4, 3)),
    "attention bias": ("stage4_block1_attention/attention_bias", (1, 16, 8), (2, 0, 1), (8, 16)),
    "position embedding": ("position_embedding/embedding", (1, 7, 6), (0, 1, 2), (1, 7, 6)),
    "layer scale": ("stage1_block0_scale2/scale", (6,), (0,), (6, 1, 1)),
    "class and distillation token": ("class_token/tokens", (1, 2, 6), (1, 0, 2), (2, 1, 6)),  # rows: two parameters
}


def timm_clips(weight: np.ndarray, gradient: np.ndarray, factor: float) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(gradient)
    timm.utils.adaptive_clip_grad(parameter, factor)
    return parameter.grad.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-7])
def test_clips_as_timm_does(kind: str, size: float) -> None:
    """Weights from 0 to 1, so that some units meet epsilon; gradients around the limit, far above and near zero."""
    path, shape, order, torch_shape = KINDS[kind]
    generator = np.random.default_rng(0)
    weight = np.float32(generator.normal(size=shape) * np.linspace(0, 1, shape[-1] if shape else 1).reshape(shape[-1:]))
    gradient = np.float32(generator.normal(size=shape) * size * 10.0 ** generator.uniform(-2, 0, shape))
    with contextlib.ExitStack() as scopes:
        for scope in path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(scope))
        variable = keras.Variable(weight, name=path.split("/")[-1])
    assert variable.path == path
    (ours,) = adaptive_clip([tf.constant(gradient)], [variable], 0.1)
    expected = timm_clips(
        weight.transpose(order).reshape(torch_shape), gradient.transpose(order).reshape(torch_shape), 0.1
    )
    ours_in_torch = ours.numpy().transpose(order).reshape(torch_shape)
    np.testing.assert_allclose(ours_in_torch, expected, rtol=2e-6, atol=1e-12)
    if size == 1.0:
        assert not np.array_equal(ours, gradient)
    if size == 1e-7:
        np.testing.assert_array_equal(ours, gradient)


@pytest.mark.parametrize(
    "build",
    [keras_models.DeiTMobiAtt, keras_models.PVTv2MobiAtt, keras_models.EfficientFormerV2MobiAtt],
    ids=["deit", "pvt_v2", "efficientformer_v2"],
)
def test_clips_every_weight_of_the_families_as_timm_does(build: Callable[..., keras.Model]) -> None:
    """Weights and gradients under the names and in the layout of the published models.

    But for the biases of query, key and value of DeiT and PVTv2, which are one vector there and several here.
    """
    options = {} if build is keras_models.PVTv2MobiAtt else {"distilled": True}
    model = build("quickstart", num_classes=3, attention="softmax", **options)
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(generator.normal(size=variable.shape) * 0.1)
    gradients = [
        np.float32(generator.normal(size=variable.shape) * 10.0 ** generator.uniform(-3, 1, variable.shape[-1:]))
        for variable in model.trainable_variables
    ]
    weights, before = pytorch_state_dict(model), model.trainable_variables
    clipped = adaptive_clip(list(map(tf.constant, gradients)), before, 0.01)
    gradients_in_torch = _in_torch(model, gradients)
    found = _in_torch(model, [gradient.numpy() for gradient in clipped])
    others = re.compile(r"running_|\.(qkv|kv)\.bias$")
    changed = 0
    for name in filter(lambda name: not others.search(name), weights):
        weight, gradient = weights[name], gradients_in_torch[name]
        if ".ls" in name or "layer_scale" in name:  # [D] in timm, [D, 1, 1] in the code that the recipe is from
            weight, gradient = weight[:, None, None], gradient[:, None, None]
        expected = timm_clips(weight, gradient, 0.01).reshape(found[name].shape)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-9, err_msg=name)
        changed += not np.array_equal(found[name], gradients_in_torch[name])
    assert changed > len(before) / 2


def _in_torch(model: keras.Model, values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Values of the trainable variables in PyTorch's layout by PyTorch's names."""
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)
    return pytorch_state_dict(model)


def test_keeps_what_is_missing_and_the_dtype() -> None:
    dense = keras.layers.Dense(2, name="head")
    dense.build((None, 3))
    missing, clipped = adaptive_clip([None, tf.fill((2,), tf.constant(7, tf.bfloat16))], dense.variables, 0.1)
    assert missing is None
    assert clipped.dtype == tf.bfloat16
    # The bias is 0: its norm counts as epsilon.
    np.testing.assert_allclose(np.linalg.norm(np.float32(clipped)), 0.1 * 1e-3, rtol=1e-2)
    assert unit_axes("layer/kernel", (3, 3, 4, 2)) == (0, 1, 2)
