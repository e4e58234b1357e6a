"""Drop path, MLP, tokens and embeddings."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiatt_tf.layers import (
    MLP,
    ClassToken,
    DropPath,
    PatchEmbedding,
    PositionEmbedding,
    SelectToken,
    resize_position_embedding,
)

to_numpy = keras.ops.convert_to_numpy


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    layer = DropPath(0.25, seed=1)
    x = np.ones((2000, 3, 2), "float32")
    np.testing.assert_array_equal(to_numpy(layer(x, training=False)), x)
    output = to_numpy(layer(x, training=True))
    assert set(np.unique(output)) == {0.0, np.float32(4 / 3)}
    assert np.all(output == output[:, :1, :1])
    assert abs(output.mean() - 1) < 0.05


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_refuses_impossible_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        DropPath(rate)


def test_mlp_equals_its_definition() -> None:
    layer = MLP(12)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    hidden = keras.ops.gelu(keras.ops.matmul(x, layer(x) is not None and layer.fc1.kernel) + layer.fc1.bias, False)
    expected = to_numpy(keras.ops.matmul(hidden, layer.fc2.kernel) + layer.fc2.bias)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-6)


def test_patches_are_read_row_by_row() -> None:
    layer = PatchEmbedding(2, 3, kernel_initializer="ones")
    image = np.zeros((1, 4, 6, 1), "float32")
    image[0, 0:2, 4:6] = 1.0  # the third patch of the first row
    output = to_numpy(layer(image))
    assert output.shape == (1, 6, 3) == layer.compute_output_shape((1, 4, 6, 1))
    np.testing.assert_array_equal(output[0, :, 0], [0, 0, 4, 0, 0, 0])


@pytest.mark.parametrize("shape", [(1, 5, 6, 3), (1, None, 6, 3)])
def test_patch_embedding_refuses_sides_that_do_not_fit(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 2"):
        PatchEmbedding(2, 3).build(shape)


@pytest.mark.parametrize("batch", [1, 3])
def test_class_tokens_come_first(batch: int) -> None:
    layer = ClassToken(2, initializer="ones")
    x = np.zeros((batch, 4, 5), "float32")
    output = to_numpy(layer(x))
    assert output.shape == (batch, 6, 5)
    assert np.all(output[:, :2] == 1)
    assert np.all(output[:, 2:] == 0)
    np.testing.assert_array_equal(to_numpy(SelectToken(1)(output)), output[:, 1])


def test_position_embedding_refuses_another_grid() -> None:
    with pytest.raises(ValueError, match="2 x 3 with 1 tokens in front has 7 tokens"):
        PositionEmbedding((2, 3), prefix=1)(np.zeros((1, 8, 4), "float32"))


@settings(deadline=None, max_examples=15)
@given(height=st.integers(1, 6), width=st.integers(1, 6), prefix=st.integers(0, 2))
def test_resizing_to_the_same_grid_changes_nothing(height: int, width: int, prefix: int) -> None:
    embedding = np.random.default_rng(0).normal(size=(1, prefix + height * width, 3)).astype("float32")
    same = resize_position_embedding(embedding, (height, width), (height, width), prefix)
    np.testing.assert_array_equal(same, embedding)


def test_resizing_keeps_prefix_constants_and_orientation() -> None:
    rows = np.repeat(np.arange(4.0), 4).reshape(1, 16, 1)  # each row of the grid has its own value
    embedding = np.concatenate([np.full((1, 1, 1), 9.0), rows], axis=1).astype("float32")
    resized = resize_position_embedding(embedding, (4, 4), (6, 8), prefix=1)
    assert resized.shape == (1, 1 + 48, 1)
    assert resized[0, 0, 0] == 9
    grid = resized[0, 1:, 0].reshape(6, 8)
    np.testing.assert_allclose(grid, grid[:, :1].repeat(8, axis=1), atol=1e-5)
    assert np.all(np.diff(grid[:, 0]) > 0)


def test_resizing_refuses_a_wrong_token_count() -> None:
    with pytest.raises(ValueError, match=r"needs an embedding of shape \(1, 5, D\), but \(1, 4, 3\)"):
        resize_position_embedding(np.zeros((1, 4, 3), "float32"), (2, 2), (4, 4), prefix=1)
