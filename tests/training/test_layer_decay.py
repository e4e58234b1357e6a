"""Depths of the families' variables, and AdamW with a learning rate for each layer against PyTorch's groups."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import keras_models
from mobiatt_tf.models import load_trained
from mobiatt_tf.training.layer_decay import layer_depths, layer_scales
from mobiatt_tf.training.optimizer import is_decayed, make_optimizer, make_schedule
from tests.training import small

BUILDERS = {
    "deit": functools.partial(keras_models.DeiTMobiAtt, "quickstart", distilled=True),
    "pvt_v2": functools.partial(keras_models.PVTv2MobiAtt, "quickstart", attention="softmax"),
    "efficientformer_v2": functools.partial(keras_models.EfficientFormerV2MobiAtt, "quickstart", distilled=True),
}

# Variants "quickstart": blocks by stage are 4; 1, 1, 1, 1; and 1, 1, 2, 2.
DEPTHS = {
    "deit": {
        "patch_embedding/projection/kernel": 0,
        "class_token/tokens": 0,
        "position_embedding/embedding": 0,
        "block0_norm1/gamma": 1,
        "block0_attention/query/kernel": 1,
        "block3_mlp/fc2/bias": 4,
        "norm/gamma": 5,
        "head/kernel": 5,
        "head_distillation/bias": 5,
    },
    "pvt_v2": {
        "stage1_patch_embedding/norm/gamma": 0,
        "stage1_block0_reduction/reduction/kernel": 1,
        "stage1_norm/beta": 1,
        "stage2_patch_embedding/projection/kernel": 2,
        "stage2_block0_mlp/dwconv/kernel": 2,
        "stage4_patch_embedding/projection/kernel": 4,
        "stage4_norm/gamma": 4,
        "head/bias": 5,
    },
    "efficientformer_v2": {
        "stem_conv1/conv/kernel": 0,
        "stem_conv2/bn/beta": 0,
        "stage1_block0_scale2/scale": 1,
        "stage2_downsample_conv/conv/kernel": 2,
        "stage3_downsample_conv/bn/gamma": 3,
        "stage3_block0_mlp_fc1/conv/kernel": 3,
        "stage3_block1_attention/value_local/conv/kernel": 4,
        "stage4_downsample_attention/attention_bias": 5,
        "stage4_block1_mlp_fc2/bn/gamma": 6,
        "norm/gamma": 7,
        "head_distillation/kernel": 7,
    },
}


@pytest.mark.parametrize("family", BUILDERS)
def test_depths_of_the_families(family: str) -> None:
    paths = [variable.path for variable in BUILDERS[family](num_classes=3).trainable_variables]
    depths = layer_depths(paths)
    found = dict(zip(paths, depths, strict=True))
    assert {path: found[path] for path in DEPTHS[family]} == DEPTHS[family]
    top = max(depths)
    assert set(depths) == set(range(top + 1))
    scales = dict(zip(paths, layer_scales(paths, 0.5), strict=True))
    assert {path: scales[path] for path in paths} == {path: 0.5 ** (top - found[path]) for path in paths}
    assert scales["head/kernel"] == 1


@pytest.mark.parametrize(("variant", "blocks"), [("b2", 16), ("b5", 52)])
def test_blocks_are_counted_through_the_stages(variant: str, blocks: int) -> None:
    """Block 10 comes after block 9, not after block 1, and the depth never falls from input to output."""
    depths_of_stages = keras_models.pvt_v2.VARIANTS[variant].depths
    paths = [
        f"stage{stage + 1}_block{block}_norm1/gamma"
        for stage, depth in enumerate(depths_of_stages)
        for block in range(depth)
    ]
    assert layer_depths(paths) == list(range(1, blocks + 1))


@pytest.mark.parametrize("family", BUILDERS)
def test_one_step_is_that_of_pytorch_with_groups(family: str) -> None:
    """Three steps of AdamW on all weights of a model, decay and learning rate of each layer in play."""
    model = BUILDERS[family](num_classes=3)
    variables = model.trainable_variables
    recipe = small.recipe(layer_decay=0.6, weight_decay=0.3, warmup_epochs=0.0, learning_rate=1e-2)
    optimizer = make_optimizer(recipe, 6, model)
    generator = np.random.default_rng(0)
    for variable in variables:
        variable.assign(generator.normal(size=variable.shape))
    parameters = [torch.nn.Parameter(torch.tensor(variable.numpy())) for variable in variables]
    scales = layer_scales([variable.path for variable in variables], 0.6)
    groups = [
        {
            "params": [parameter],
            "scale": scale,
            "weight_decay": 0.3 if is_decayed(variable.path, len(variable.shape)) else 0.0,
        }
        for parameter, scale, variable in zip(parameters, scales, variables, strict=True)
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(3):
        for group in reference.param_groups:
            group["lr"] = float(make_schedule(recipe, 6)(step)) * group["scale"]
        # Not near 0, where Keras' epsilon is not PyTorch's (see `make_optimizer`).
        gradients = [np.float32(_away_from_zero(generator, variable.shape)) for variable in variables]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        reference.step()
        optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
    for variable, parameter in zip(variables, parameters, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), parameter.detach().numpy(), rtol=1e-5, atol=2e-6, err_msg=variable.path
        )


def _away_from_zero(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.choice([-1.0, 1.0], shape) * generator.uniform(0.1, 2, shape)


def test_steps_of_the_compiled_step_grow_with_depth() -> None:
    """The same gradient everywhere: the first AdamW step is the learning rate, inside tf.function too."""
    model = BUILDERS["deit"](num_classes=3)
    optimizer = make_optimizer(small.recipe(layer_decay=0.5, weight_decay=0.0, warmup_epochs=0.0), 6, model)
    before = [variable.numpy() for variable in model.trainable_variables]

    @tf.function
    def apply() -> None:
        optimizer.apply([tf.ones(variable.shape) for variable in model.trainable_variables], model.trainable_variables)

    apply()
    depths = layer_depths([variable.path for variable in model.trainable_variables])
    for variable, old, depth in zip(model.trainable_variables, before, depths, strict=True):
        np.testing.assert_allclose(old - variable.numpy(), 1e-2 * 0.5 ** (5 - depth), rtol=1e-3, err_msg=variable.path)


def test_layer_decay_adds_nothing_to_what_is_saved() -> None:
    model = BUILDERS["deit"](num_classes=3)
    plain = make_optimizer(small.recipe(), 6, model)
    scaled = make_optimizer(small.recipe(layer_decay=0.5), 6, model)
    assert [(v.path.split("/")[-1], v.shape) for v in plain.variables] == [
        (v.path.split("/")[-1], v.shape) for v in scaled.variables
    ]
    assert plain.scales is None
    assert scaled.scales is not None


def test_a_loaded_model_has_the_same_depths(tmp_path: object) -> None:
    model = BUILDERS["deit"](num_classes=3)
    path = f"{tmp_path}/model.keras"
    model.save(path)
    paths = [variable.path for variable in load_trained(path).trainable_variables]
    assert layer_depths(paths) == layer_depths([variable.path for variable in model.trainable_variables])


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"convolution/kernel is not known.*layer_decay=1"):
        make_optimizer(small.recipe(layer_decay=0.5), 6, small.make_model())
    with pytest.raises(ValueError, match="stage7_patch_embedding/kernel is not known"):
        layer_depths(["stage1_block0_norm1/gamma", "stage7_patch_embedding/kernel"])
    make_optimizer(small.recipe(), 6, keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
