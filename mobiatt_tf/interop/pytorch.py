"""Published weights: official and timm checkpoints into our models, and our weights out under timm's names.

A softmax host takes a checkpoint exactly or not at all. A Mobile-Attention model takes it as an initialisation: its
projections have the same shapes, and what only softmax attention needs (spatial reductions, position biases, talking
heads) is dropped.
"""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mobiatt_tf import files
from mobiatt_tf.errors import UserError, first_line
from mobiatt_tf.interop.names import Tensor, pytorch_tensors, timm_name
from mobiatt_tf.layers import (
    GridTable,
    LinearAttention,
    MobileAttention,
    MobileConvAttention,
    grid_tables,
    resize_position_embedding,
)
from mobiatt_tf.models import check_reference_tokens, is_dense, load_trained

# Counters and index tables, which carry no weights.
_BOOKKEEPING = re.compile(r"num_batches_tracked$|attention_bias_idxs$|\.ab$")
# What softmax attention has and Mobile-Attention has not.
_SOFTMAX_ONLY = re.compile(r"\.attn\.(sr|norm)\.|\.token_mixer\.(talking_head[12]\.|attention_biases$)")
_HEADS = re.compile(r"head(_dist)?\.")
_CLASSIFIER = re.compile(r"(head(_dist)?|norm)\.")  # what stands behind the last stage of a pyramid
_LINEAR_ATTENTIONS = (MobileAttention, MobileConvAttention, LinearAttention)
_WRAPPERS = ("model", "state_dict", "module")  # keys of training checkpoints under which the weights lie
_TELL_SIZE = "give checkpoint_size=(height, width), the size of the images it was trained on"
_SHOWN = 12  # names listed on each side of a mismatch


@dataclass(frozen=True)
class LoadReport:
    """What `load_pytorch` did.

    Attributes:
        carried: paths of the Keras weights that came from the checkpoint.
        resized: those among them that were resized to another image size.
        new: paths of the Keras weights that kept their initial values.
        dropped: tensors of the checkpoint that the model has no place for.
    """

    carried: tuple[str, ...]
    resized: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.carried)} weights carried over, {len(self.resized)} of them resized"]
        for verb, names in (("new (initial values kept)", self.new), ("dropped from the checkpoint", self.dropped)):
            if names:
                lines.append(f"{len(names)} {verb}: {_listed(names)}")
        return "\n".join(lines)


def load_pytorch(
    model: keras.Model,
    source: str | os.PathLike[str] | Mapping[str, Any],
    new_heads: bool = False,
    checkpoint_size: tuple[int, int] | None = None,
) -> LoadReport:
    """Loads an official or timm checkpoint of DeiT, PVTv2 or EfficientFormerV2 into a model of `keras_models`.

    With softmax attention every weight and every tensor must have its counterpart. With Mobile-Attention the tensors
    that only softmax attention needs are dropped, in a model with `features_only` those of the classifier. Position
    embeddings and position biases of another image size are resized (bicubic).

    Args:
        model: built with the variant and `distilled` of the checkpoint.
        source: a .pth, .pt, .bin or .safetensors file, or a state dict (tensors or arrays by name). PyTorch files are
            read with `weights_only=True`: no code in them is run.
        new_heads: leave the classifier heads at their initial values, for other classes.
        checkpoint_size: (height, width) of the images the checkpoint was trained on; None: square, as all published
            ones are.

    Returns:
        What was carried, resized, left new and dropped.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors, or the checkpoint does not fit (both
            sides are listed). The model is then unchanged.
        ValueError: the model is not one of `keras_models`.
    """
    state = _named(_state_dict_in(source)) if isinstance(source, Mapping) else read_checkpoint(source)
    skipped = set(filter(_HEADS.match, state)) if new_heads else set()
    return _load(model, state, skipped, new_heads, checkpoint_size)


def _load(
    model: keras.Model,
    state: dict[str, np.ndarray],
    skipped: set[str],
    new_heads: bool,
    checkpoint_size: tuple[int, int] | None,
) -> LoadReport:
    """`load_pytorch` of all tensors but `skipped`; with `new_heads`, heads that find no tensor stay as they are."""
    wanted = pytorch_tensors(model)
    weights = {weight.path: weight for weight in model.weights}
    new = [path for path in weights if path not in wanted]  # what a detector or a segmenter adds to its backbone
    tables = grid_tables(model)
    used: set[str] = set()
    values: dict[str, np.ndarray] = {}
    resized, missing, problems = [], [], []
    for path, tensor in wanted.items():
        shape = tuple(weights[path].shape)
        absent = [key for key in tensor.keys if key not in state or key in skipped]
        if absent and new_heads and _HEADS.match(absent[0]):
            new.append(path)
            continue
        if absent:
            missing += [f"{path} (wants {', '.join(absent)})"]
            continue
        used.update(tensor.keys)
        try:
            value = _to_keras(tensor, [state[key] for key in tensor.keys])
            if path in tables:
                grid = _grid_of(value, tables[path], model, checkpoint_size)
                if grid != tables[path].grid:
                    value = resize_position_embedding(value, grid, tables[path].grid, tables[path].prefix)
                    resized.append(path)
        except (ValueError, IndexError) as error:
            shapes = ", ".join(str(state[key].shape) for key in tensor.keys)
            problems.append(f"{', '.join(tensor.keys)} of shape {shapes} does not fit {path}: {error}")
            continue
        if value.shape != shape:
            problems.append(
                f"{', '.join(tensor.keys)} has shape {value.shape} as Keras counts, {path} has shape {shape}"
            )
        values[path] = value
    left = [key for key in state if key not in used]
    dropped = [key for key in left if key in skipped or _may_be_dropped(key, model, wanted)]
    if unexpected := [key for key in left if key not in dropped]:
        problems.append(f"only in the checkpoint, {len(unexpected)} tensors: {_listed(unexpected)}")
    if missing:
        problems.append(f"only in the model, {len(missing)} weights: {_listed(missing)}")
    if not values or problems:
        advice = "Take the family, variant, `distilled` and number of classes of the checkpoint, or new_heads=True."
        lines = "\n  ".join(problems[:_SHOWN] + [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN))
        raise UserError(f"The checkpoint does not fit {model.name}; nothing was loaded.\n  {lines}\n{advice}")
    for path, value in values.items():
        weights[path].assign(value)
    return LoadReport(tuple(values), tuple(resized), tuple(new), tuple(dropped))


def _may_be_dropped(key: str, model: keras.Model, wanted: dict[str, Tensor]) -> bool:
    """Whether the model is of a kind that has no use for a tensor, rather than of another shape."""
    if _SOFTMAX_ONLY.search(key):
        return any(isinstance(layer, _LINEAR_ATTENTIONS) for layer in model.layers)
    if _CLASSIFIER.match(key):
        return not any(_HEADS.match(tensor.keys[0]) for tensor in wanted.values())
    return False


def _grid_of(
    value: np.ndarray, table: GridTable, model: keras.Model, checkpoint_size: tuple[int, int] | None
) -> tuple[int, int]:
    """The grid of a checkpoint's table [1, prefix + places, C].

    Raises:
        ValueError: no grid has that many places.
    """
    places = value.shape[1] - table.prefix if value.ndim == 3 else 0
    if checkpoint_size is not None:
        height, width = (
            ours * theirs // side
            for ours, theirs, side in zip(table.grid, checkpoint_size, model.inputs[0].shape[1:3], strict=True)
        )
    else:
        height = width = math.isqrt(max(places, 0))
        if places == math.prod(table.grid):
            if height * width == places and table.grid[0] != table.grid[1]:
                raise ValueError(f"its {places} places may be {height} x {width} or the model's own grid: {_TELL_SIZE}")
            return table.grid
    if not places or height * width != places:
        expected = "no square" if checkpoint_size is None else f"not {height} x {width}"
        raise ValueError(f"the {places} places of the checkpoint's grid are {expected}: {_TELL_SIZE}")
    return height, width


def start_from(model: keras.Model, path: str | os.PathLike[str]) -> LoadReport:
    """Initialises a model for fine-tuning from a PyTorch checkpoint or from a model of ours.

    A detector or a segmenter takes the backbone of either, whatever it was trained for; its own layers stay new.

    Each classifier head is carried over where both sides have it with as many classes; else the model's stays at its
    initial values and the checkpoint's is dropped.

    Args:
        model: a model of `keras_models`; see `load_pytorch` for what fits.
        path: a .pth, .pt, .bin or .safetensors file, a .keras file, or the output directory of a training run.

    Raises:
        UserError: as `load_pytorch`, or the .keras file cannot be read.
        ValueError: one of the two models is not of `keras_models`, or a detector or a segmenter was built for other
            `reference_tokens` than the backbone was trained with: give it that `training_size`.
    """
    size = None
    if files.user_path(path).is_dir() or Path(path).suffix == ".keras":
        trained = load_trained(path)
        if is_dense(model):
            check_reference_tokens(trained, model)
        state, size = pytorch_state_dict(trained), tuple(trained.inputs[0].shape[1:3])
    else:
        state = read_checkpoint(path)
    heads = {key: value.shape for key, value in pytorch_state_dict(model).items() if _HEADS.match(key)}
    skipped = {key for key, value in state.items() if _HEADS.match(key) and value.shape != heads.get(key)}
    return _load(model, state, skipped, new_heads=True, checkpoint_size=size)


def pytorch_state_dict(model: keras.Model) -> dict[str, np.ndarray]:
    """All weights of a model of `keras_models` under timm's names and in PyTorch's layouts, float32.

    Of a detector or a segmenter these are the weights of its backbone.

    A table over a grid that is not square does not tell its sides: loading it again wants `checkpoint_size`.

    For a softmax host timm's `load_state_dict(strict=True)` takes the result.

    Raises:
        ValueError: the model is not one of `keras_models`.
    """
    weights = {weight.path: weight for weight in model.weights}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, tensor in pytorch_tensors(model).items():
        value = _to_pytorch(tensor, np.asarray(keras.ops.convert_to_numpy(weights[path]), "float32"))
        pieces = np.split(value, len(tensor.keys), axis=1) if len(tensor.keys) > 1 else [value]
        for key, piece in zip(tensor.keys, pieces, strict=True):
            parts.setdefault(key, {})[tensor.part[0] if tensor.part else 0] = piece
    return {
        key: np.ascontiguousarray(np.concatenate([pieces[index] for index in sorted(pieces)]))
        for key, pieces in parts.items()
    }


def save_pytorch(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Writes `pytorch_state_dict(model)` to a .safetensors file, whole or not at all.

    Raises:
        UserError: the file cannot be written, or safetensors is not installed.
        ValueError: another suffix, or the model is not one of `keras_models`.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors.")
    with _needs("safetensors", "to write .safetensors files"):
        from safetensors.numpy import save
    files.write_bytes(files.user_path(path), save(pytorch_state_dict(model)))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors or PyTorch file by name; the model inside a training checkpoint is found.

    Raises:
        UserError: there is no such file, it is damaged, or it holds anything but tensors and plain values.
    """
    path = files.user_path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}. Give a .pth or .safetensors file.")
    if path.suffix == ".safetensors":
        with _needs("safetensors", "to read .safetensors files"):
            from safetensors import SafetensorError
            from safetensors.numpy import load_file
        try:
            loaded = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({first_line(error)}).") from error
        return _named(loaded)
    with _needs("torch", "to read PyTorch files (or convert the checkpoint to .safetensors)"):
        import torch
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what training scripts save beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each raise their own
        raise UserError(
            f"{path} cannot be read as a PyTorch checkpoint of weights ({first_line(error)}). It is damaged, or holds "
            "more than tensors and plain values; code in a checkpoint is never run."
        ) from error
    state = _state_dict_in(content)
    if not state:
        found = f"the keys {_listed(list(map(str, content)))}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds no state dict, but {found}.")
    return _named(state)


def _state_dict_in(content: Any) -> dict[str, Any]:
    """The state dict itself, or the one inside a training checkpoint; empty if there is none."""
    for _ in range(2):  # training scripts nest it once, some twice
        if isinstance(content, Mapping):
            content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if hasattr(value, "shape")}


def _named(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """float32 arrays under timm's names, without bookkeeping and without the prefix of data-parallel training.

    Tensors of anything but floating point numbers are left out: no weight of the families is one.

    Raises:
        UserError: a tensor without values.
    """
    named: dict[str, np.ndarray] = {}
    for key, value in state.items():
        is_tensor = hasattr(value, "detach")
        if _BOOKKEEPING.search(key) or not (value.is_floating_point() if is_tensor else _is_floating(value)):
            continue
        try:
            array = value.detach().to_dense().float().cpu().numpy() if is_tensor else np.asarray(value, "float32")
        except Exception as error:  # a tensor on the meta device, say: torch raises what it likes
            raise UserError(f"The tensor {key} cannot be read ({first_line(error)}). Nothing was loaded.") from error
        named[timm_name(key.removeprefix("module."))] = array
    return named


def _is_floating(array: Any) -> bool:
    """Of NumPy's own kinds or bfloat16, which NumPy knows through ml_dtypes only."""
    dtype = np.asarray(array).dtype
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _to_keras(tensor: Tensor, arrays: list[np.ndarray]) -> np.ndarray:
    """A Keras weight from its PyTorch tensors.

    Raises:
        ValueError: a rank or a number of rows that cannot be.
    """
    value = np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]
    if tensor.part:
        index, count = tensor.part
        value = np.split(value, count)[index]
    if tensor.layout == "vector":
        return value.reshape(-1)  # the official layer scales are [C, 1, 1]
    if tensor.layout == "tokens":
        return value
    if tensor.layout == "biases":
        return value.T[None]  # [1, N, heads]
    if tensor.layout == "talking_head":
        return value.reshape(value.shape[:2]).T  # [in, out]
    return value.transpose(_TO_KERAS[tensor.layout])


_TO_KERAS = {"linear": (1, 0), "conv": (2, 3, 1, 0), "depthwise": (2, 3, 0, 1)}
_TO_PYTORCH = {"linear": (1, 0), "conv": (3, 2, 0, 1), "depthwise": (2, 3, 0, 1)}


def _to_pytorch(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    """The inverse of `_to_keras`, before parts are joined."""
    if tensor.layout in ("vector", "tokens"):
        return value
    if tensor.layout == "biases":
        return value[0].T  # [heads, N]
    if tensor.layout == "talking_head":
        return value.T[:, :, None, None]  # [out, in, 1, 1]
    return value.transpose(_TO_PYTORCH[tensor.layout])


@contextlib.contextmanager
def _needs(package: str, purpose: str) -> Any:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{package} is needed {purpose}: pip install {package}.") from error


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
