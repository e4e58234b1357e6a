"""Checkpoints of timm and of the official repositories: what fits, what does not, and that nothing is half loaded."""

import argparse
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keras_models import FAMILIES
from mobiatt_tf.errors import UserError
from mobiatt_tf.interop import load_pytorch, pytorch_state_dict, save_pytorch, start_from
from mobiatt_tf.interop.names import timm_name

to_numpy = keras.ops.convert_to_numpy
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, seed: int = 0, **arguments: Any) -> keras.Model:
    """A toy model whose weights are all random, biases and statistics too."""
    keras.utils.set_random_seed(seed)
    model = FAMILIES[family].build("quickstart", **{"num_classes": 5, **arguments})
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(to_numpy(weight) + 0.1 * np.abs(generator.normal(size=weight.shape)))
    return model


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: to_numpy(weight).copy() for weight in model.weights}


def assert_same(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)


def tensors(model: keras.Model) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in pytorch_state_dict(model).items()}


# How the official repositories name what timm names otherwise.
OFFICIAL = {
    "deit": (),
    "pvt_v2": (
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.([123])\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}."),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
        (r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}."),
        (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
    ),
    "efficientformer_v2": (
        (r"^head_dist\.", "dist_head."),
        (r"^stem\.conv1\.conv\.", "patch_embed.0."),
        (r"^stem\.conv1\.bn\.", "patch_embed.1."),
        (r"^stem\.conv2\.conv\.", "patch_embed.3."),
        (r"^stem\.conv2\.bn\.", "patch_embed.4."),
        (r"^stages\.3\.downsample\.conv\.conv\.", "network.5.conv."),
        (r"^stages\.3\.downsample\.conv\.bn\.", "network.5.bn."),
        (r"^stages\.([12])\.downsample\.conv\.conv\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj."),
        (r"^stages\.([12])\.downsample\.conv\.bn\.", lambda m: f"network.{2 * int(m[1]) - 1}.norm."),
        (r"^stages\.3\.downsample\.attn\.", "network.5.attn."),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}."),
        (r"\.(attn|token_mixer)\.proj\.conv\.", r".\1.proj.1."),
        (r"\.(attn|token_mixer)\.proj\.bn\.", r".\1.proj.2."),
        (r"\.q\.local\.", ".q.local.0."),
        (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.conv\.", r".\1.0."),
        (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.bn\.", r".\1.1."),
        (r"\.mlp\.(fc1|mid|fc2)\.conv\.", r".mlp.\1."),
        (r"\.mlp\.fc1\.bn\.", ".mlp.norm1."),
        (r"\.mlp\.mid\.bn\.", ".mlp.mid_norm."),
        (r"\.mlp\.fc2\.bn\.", ".mlp.norm2."),
        (r"\.ls([12])\.gamma$", r".layer_scale_\1"),
    ),
}


def official(family: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict as the official repository saves it."""
    renamed = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in OFFICIAL[family]:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value.reshape(-1, 1, 1) if ".layer_scale_" in new else value
        assert timm_name(new) == name
    if family == "efficientformer_v2":
        attention = next(name.removesuffix("attention_biases") for name in renamed if name.endswith("attention_biases"))
        renamed[f"{attention}attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.long)
    return renamed


def written(kind: str, suffix: str, family: str, model: keras.Model, directory: Path) -> Path:
    """A checkpoint file of the model as one of the many programs writes it."""
    path = directory / f"checkpoint{suffix}"
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for name in pytorch_state_dict(model)
        if name.endswith("running_mean")
    }
    state = {**tensors(model), **counters}
    if kind == "official":
        state = official(family, state)
    if kind == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "official":
        torch.save({"model": state, "epoch": 300, "args": argparse.Namespace(lr=1e-3, model=family)}, path)
    else:
        torch.save({"state_dict": state} if kind == "parallel" else state, path)
    return path


@FAMILY
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["timm", "official", "parallel", "legacy"])
def test_a_softmax_host_is_loaded_exactly(family: str, kind: str, suffix: str, tmp_path: Path) -> None:
    source, target = build(family, attention="softmax"), build(family, seed=1, attention="softmax")
    report = load_pytorch(target, written(kind, suffix, family, source, tmp_path))
    assert set(report.carried) == {weight.path for weight in target.weights}
    assert report.new == report.dropped == report.resized == ()
    assert_same(values(source), values(target))


@pytest.mark.parametrize("family", ["deit", "efficientformer_v2"])
def test_distilled_hosts_have_a_second_head_and_token(family: str) -> None:
    source = build(family, attention="softmax", distilled=True)
    target = build(family, seed=1, attention="softmax", distilled=True)
    state = pytorch_state_dict(source)
    assert "head_dist.weight" in state
    assert ("dist_token" in state) == (family == "deit")
    load_pytorch(target, state)
    assert_same(values(source), values(target))


@FAMILY
def test_safetensors_come_back_as_they_went(family: str, tmp_path: Path) -> None:
    source, target = build(family), build(family, seed=1)
    save_pytorch(source, tmp_path / "weights.safetensors")
    load_pytorch(target, tmp_path / "weights.safetensors")
    assert_same(values(source), values(target))
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_pytorch(source, tmp_path / "weights.pth")


@FAMILY
def test_mobile_attention_starts_from_the_projections_of_the_host(family: str) -> None:
    host, mobile = build(family, attention="softmax"), build(family, seed=1)
    report = load_pytorch(mobile, pytorch_state_dict(host))
    assert set(report.carried) == {weight.path for weight in mobile.weights}
    assert report.new == ()
    dropped = {re.sub(r"\d+", "#", name) for name in report.dropped}
    assert (
        dropped
        == {
            "deit": set(),
            "pvt_v2": {
                f"stages.#.blocks.#.attn.{name}" for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")
            },
            "efficientformer_v2": {
                f"stages.#.blocks.#.token_mixer.{name}"
                for name in (
                    "attention_biases",
                    "talking_head#.weight",
                    "talking_head#.bias",
                )
            },
        }[family]
    )
    ours, theirs = values(mobile), values(host)
    assert_same(ours, {path: theirs[path] for path in ours})
    assert f"{len(ours)} weights carried over" in str(report)
    if dropped:
        assert f"{len(report.dropped)} dropped from the checkpoint: {report.dropped[0]}" in str(report)


@FAMILY
def test_new_heads_keep_their_initial_values(family: str) -> None:
    host, model = build(family, attention="softmax"), build(family, seed=1, num_classes=3, attention="softmax")
    before = values(model)
    report = load_pytorch(model, pytorch_state_dict(host), new_heads=True)
    assert set(report.new) == {"head/kernel", "head/bias"}
    assert set(report.dropped) == {"head.weight", "head.bias"}
    headless = {name: value for name, value in pytorch_state_dict(host).items() if not name.startswith("head.")}
    assert load_pytorch(model, headless, new_heads=True).new == report.new
    after = values(model)
    for path in after:
        np.testing.assert_array_equal(after[path], (before if path in report.new else values(host))[path])


@FAMILY
def test_a_mismatch_lists_both_sides_and_changes_nothing(family: str) -> None:
    model = build(family, attention="softmax")
    before = values(model)
    state = pytorch_state_dict(build(family, seed=1, attention="softmax"))
    weight = next(name for name in state if "mlp" in name and name.endswith("weight"))
    state["somewhere.else"] = state.pop(weight)
    with pytest.raises(UserError) as error:
        load_pytorch(model, state)
    assert "nothing was loaded" in str(error.value)
    assert "only in the checkpoint, 1 tensors: somewhere.else" in str(error.value)
    assert "only in the model, 1 weights: " in str(error.value)
    assert f"(wants {weight})" in str(error.value)
    with pytest.raises(UserError, match=r"head\.weight has shape \(\d+, 7\) as Keras counts, head/kernel has shape"):
        load_pytorch(model, pytorch_state_dict(build(family, attention="softmax", num_classes=7)))
    assert_same(before, values(model))


def test_a_checkpoint_of_another_family_or_network_is_refused() -> None:
    model = build("deit", attention="softmax")
    before = values(model)
    for state in (pytorch_state_dict(build("pvt_v2")), {"fc.weight": np.zeros((2, 2))}, {}):
        with pytest.raises(UserError, match="only in the model, "):
            load_pytorch(model, state)
    assert_same(before, values(model))
    foreign = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="no DeiT, PVTv2 or EfficientFormerV2"):
        load_pytorch(foreign, {})


@pytest.mark.parametrize(("family", "table"), [("deit", "pos_embed"), ("efficientformer_v2", "attention_biases")])
def test_tables_are_resized_to_another_image_size(family: str, table: str) -> None:
    small, sides = {"deit": (28, (28, 42)), "efficientformer_v2": (32, (32, 64))}[family]
    host = build(family, attention="softmax", image_size=small)
    larger = build(family, seed=1, attention="softmax", image_size=sides)
    report = load_pytorch(larger, pytorch_state_dict(host))
    assert len(report.resized) == len([name for name in pytorch_state_dict(host) if table in name])
    same = [path for path in values(host) if path not in report.resized]
    ours, theirs = values(larger), values(host)
    assert_same({path: ours[path] for path in same}, {path: theirs[path] for path in same})
    with pytest.raises(UserError, match="are no square: give checkpoint_size"):
        load_pytorch(build(family, attention="softmax", image_size=small), pytorch_state_dict(larger))


@pytest.mark.parametrize("family", ["deit", "efficientformer_v2"])
def test_the_grid_of_a_checkpoint_is_square_or_told(family: str, tmp_path: Path) -> None:
    """16 or 4 places may be a square map or a wide one: taking one for the other would scramble the image."""
    side, wide = {"deit": (28, (14, 56)), "efficientformer_v2": (32, (16, 64))}[family]
    square, source = build(family, attention="softmax", image_size=side), None
    for size in (wide, side):
        source = build(family, seed=1, attention="softmax", image_size=size)
        target = build(family, seed=2, attention="softmax", image_size=side if size == wide else wide)
        told = (size, size) if isinstance(size, int) else size
        assert load_pytorch(target, pytorch_state_dict(source), checkpoint_size=told).resized
        source.save(tmp_path / "model.keras")
        assert start_from(target, tmp_path / "model.keras").resized  # a model of ours tells by itself
    again = build(family, seed=3, attention="softmax", image_size=wide)
    with pytest.raises(UserError, match=r"places may be \d x \d or the model's own grid: give checkpoint_size"):
        load_pytorch(again, pytorch_state_dict(source))
    wide_model = build(family, seed=4, attention="softmax", image_size=wide)
    assert load_pytorch(again, pytorch_state_dict(wide_model), checkpoint_size=wide).resized == ()
    assert_same(values(wide_model), values(again))
    with pytest.raises(UserError, match=r"not \d x \d: give checkpoint_size"):
        load_pytorch(square, pytorch_state_dict(square), checkpoint_size=(side // 2, side))


@FAMILY
def test_a_backbone_takes_a_classifier_without_its_head(family: str) -> None:
    classifier = build(family, attention="softmax")
    keras.utils.set_random_seed(5)
    backbone = FAMILIES[family].build("quickstart", attention="softmax", features_only=True)
    report = load_pytorch(backbone, pytorch_state_dict(classifier))
    assert {"head.weight", "head.bias"} <= set(report.dropped)
    assert all(name.startswith(("head.", "norm.")) for name in report.dropped)
    ours, theirs = values(backbone), values(classifier)
    assert_same(ours, {path: theirs[path] for path in ours})


def test_tensors_of_every_kind_are_read_or_refused_by_name(tmp_path: Path) -> None:
    source = build("deit", attention="softmax")
    state = tensors(source)
    kinds = {
        "half": {key: value.half() for key, value in state.items()},
        "bfloat16": {key: value.bfloat16() for key, value in state.items()},
        "parameters": {key: torch.nn.Parameter(value) for key, value in state.items()},
        "sparse": {key: value.to_sparse() for key, value in state.items()},
        "nested": {"model": {"state_dict": state}},
    }
    for name, kind in kinds.items():
        torch.save(kind, tmp_path / f"{name}.pth")
        for given in (kind, tmp_path / f"{name}.pth"):
            target = build("deit", seed=1, attention="softmax")
            load_pytorch(target, given)
            for path, value in values(source).items():
                np.testing.assert_allclose(values(target)[path], value, rtol=1e-2, atol=1e-3, err_msg=path)
    target = build("deit", seed=1, attention="softmax")
    before = values(target)
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(UserError, match=r"head/bias \(wants head\.bias\)"):
            load_pytorch(target, {**state, "head.bias": state["head.bias"].to(dtype)})
    with pytest.raises(UserError, match=r"The tensor head\.bias cannot be read \(.*meta"):
        load_pytorch(target, {**state, "head.bias": state["head.bias"].to("meta")})
    with pytest.raises(UserError, match=r"attn\.qkv\.weight of shape \(\) does not fit block0_attention/query"):
        load_pytorch(target, {**state, "blocks.0.attn.qkv.weight": np.float32(1)})
    with pytest.raises(UserError, match="only in the model, 72 weights"):
        load_pytorch(target, {0: torch.zeros(2)})
    assert_same(before, values(target))


class Malicious:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def damaged_files(directory: Path, model: keras.Model) -> dict[str, Path]:
    """Files that are no checkpoint, by what is wrong with them."""
    state = tensors(model)
    paths = {
        name: directory / name
        for name in ("truncated.pth", "malicious.pth", "pickle.pth", "text.pth", "empty.pth", "list.pth", "config.pth")
    }
    torch.save(state, directory / "whole.pth")
    whole = (directory / "whole.pth").read_bytes()
    paths["truncated.pth"].write_bytes(whole[: len(whole) // 2])
    torch.save({"model": Malicious(f"touch {directory}/executed")}, paths["malicious.pth"])
    paths["pickle.pth"].write_bytes(pickle.dumps(Malicious(f"touch {directory}/executed")))
    paths["text.pth"].write_text("<html>404</html>")
    paths["empty.pth"].write_bytes(b"")
    torch.save([1, 2], paths["list.pth"])
    torch.save({"epoch": 3}, paths["config.pth"])
    save_file(state, directory / "whole.safetensors")
    whole = (directory / "whole.safetensors").read_bytes()
    for name, content in (
        ("truncated", whole[: len(whole) // 2]),
        ("header", whole[:4]),
        ("text", b"<html>404</html>"),
    ):
        paths[name] = directory / f"{name}.safetensors"
        paths[name].write_bytes(content)
    return paths


def test_damaged_and_malicious_files_are_one_error_and_change_nothing(tmp_path: Path) -> None:
    model = build("pvt_v2", attention="softmax")
    before = values(model)
    for name, path in damaged_files(tmp_path, model).items():
        with pytest.raises(UserError, match=r"cannot be read as|holds no state dict") as error:
            load_pytorch(model, path)
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_pytorch(model, tmp_path / "absent.pth")
    assert_same(before, values(model))
    # The same malicious file would have been executed by an unsafe reader: the test can fail.
    torch.load(tmp_path / "malicious.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_without_torch_the_error_says_what_to_install(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "checkpoint.pth")
    program = (
        "import sys\n"
        "class WithoutTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, WithoutTorch())\n"
        "from mobiatt_tf.interop.pytorch import read_checkpoint\n"
        "from mobiatt_tf.errors import UserError\n"
        "try: read_checkpoint(sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "checkpoint.pth"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install torch" in result.stdout
    assert ".safetensors" in result.stdout


@pytest.mark.parametrize("family", ["deit", "efficientformer_v2"])
def test_heads_are_decided_one_by_one(family: str, tmp_path: Path) -> None:
    """EfficientFormerV2 is published with two heads; most users want one."""
    one, two = (build(family, attention="softmax", distilled=distilled) for distilled in (False, True))
    for model, name in ((one, "one"), (two, "two")):
        save_pytorch(model, tmp_path / f"{name}.safetensors")
    if family == "efficientformer_v2":
        report = start_from(one, tmp_path / "two.safetensors")
        assert set(report.dropped) == {"head_dist.weight", "head_dist.bias"}
        assert report.new == ()
        report = start_from(two, tmp_path / "one.safetensors")
        assert set(report.new) == {"head_distillation/kernel", "head_distillation/bias"}
    else:  # DeiT's second head has a token of its own
        with pytest.raises(UserError, match="dist_token"):
            start_from(two, tmp_path / "one.safetensors")


@FAMILY
def test_fine_tuning_starts_from_any_kind_of_file(family: str, tmp_path: Path) -> None:
    host = build(family, attention="softmax")
    host.save(tmp_path / "model.keras")
    save_pytorch(host, tmp_path / "weights.safetensors")
    torch.save(tensors(host), tmp_path / "weights.pth")
    for source in ("model.keras", ".", "weights.safetensors", "weights.pth"):
        same, other = build(family, seed=1), build(family, seed=1, num_classes=3)
        assert start_from(same, tmp_path / source).new == ()
        assert set(start_from(other, tmp_path / source).new) == {"head/kernel", "head/bias"}
        np.testing.assert_array_equal(values(same)["head/kernel"], values(host)["head/kernel"])
