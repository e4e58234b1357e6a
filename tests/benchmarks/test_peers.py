"""What the peers run equals what we run; what cannot be installed, converted or kept alive is said plainly."""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

from benchmarks.peers import environment, hosts, measurement, ours
from benchmarks.peers.preparation import Prepared
from benchmarks.peers.programs import PEERS, PROGRAMS, Variant, variants
from benchmarks.peers.published import PublishedMobileAttention
from benchmarks.peers.worker import RUNTIMES
from keras_models import FAMILIES
from mobiatt_tf.complexity import count_macs
from mobiatt_tf.errors import UserError
from mobiatt_tf.interop import save_pytorch
from mobiatt_tf.verification import photographs
from tflite.process import Worker

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
# Small images: the networks are those that are measured.
NETWORKS = [
    ("deit", "tiny", 32, None),
    ("deit", "tiny", 32, 8),
    ("deit", "tiny", 32, 64),
    ("pvt_v2", "b0", 64, None),
    ("pvt_v2", "b0", 64, 8),
    ("efficientformer_v2", "s0", 64, None),
]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_published_module_computes_what_the_authors_code_computed(path: Path) -> None:
    with np.load(path) as golden:
        widths = [golden[f"{name}_kernel"].shape for name in ("query", "out")]
        module = PublishedMobileAttention(widths[0][0], widths[0][1], widths[1][1], int(golden["num_heads"])).eval()
        state = {
            f"{name}_projection.{leaf}": torch.from_numpy(golden[f"{name}_{ours_leaf}"].T.copy())
            for name in ("query", "key", "value", "out")
            for leaf, ours_leaf in (("weight", "kernel"), ("bias", "bias"))
        }
        module.load_state_dict(state, strict=True)
        with torch.no_grad():
            y = module(torch.from_numpy(golden["x"])).numpy()
        assert np.abs(y - golden["y"]).max() < 1e-5 * np.abs(golden["y"]).max()


@pytest.mark.parametrize(("family", "variant", "size", "head_dim"), NETWORKS)
def test_a_peers_network_has_our_logits(
    family: str, variant: str, size: int, head_dim: int | None, tmp_path: Path
) -> None:
    model = ours.build(family, variant, size, head_dim)
    save_pytorch(model, tmp_path / "weights.safetensors")
    network = hosts.build(family, variant, size, head_dim, str(tmp_path / "weights.safetensors"))
    published = [module for module in network.modules() if isinstance(module, PublishedMobileAttention)]
    assert bool(published) == (head_dim is not None)
    images = photographs((size, size), 2)
    with torch.no_grad():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # the images matter
    assert measurement.difference(logits, expected) < 1e-4


def test_a_host_of_convolutions_has_no_place_for_the_published_module(tmp_path: Path) -> None:
    save_pytorch(ours.build("efficientformer_v2", "s0", 64, 8), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="takes tokens"):
        hosts.build("efficientformer_v2", "s0", 64, 8, str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_has_all_products_but_those_of_attention(family: str) -> None:
    model = ours.build(family, "quickstart", FAMILIES[family].build("quickstart").input_shape[1], 8)
    mixing = sum(
        layer.mixing_macs() for layer in model._flatten_layers(include_self=False) if hasattr(layer, "mixing_macs")
    )
    products = ours.products(model)
    assert mixing > 0
    assert count_macs(products) == count_macs(model) - mixing
    assert products.output_shape == (1, 1)


def test_the_table_of_programs_is_whole() -> None:
    assert PEERS == ("litert_torch", "torch", "onnxruntime", "executorch")
    for program in PROGRAMS.values():
        assert program.runtime in RUNTIMES
        for name in filter(None, (program.environment, program.converter and program.converter[0])):
            lines = environment.requirements(name).read_text().splitlines()
            assert all("==" in line for line in lines if not line.startswith("#"))
        if program.converter:
            assert (environment.DIRECTORY / f"{program.converter[1].rpartition('.')[2]}.py").is_file()
        if program.packages:
            home = program.converter[0] if program.converter else str(program.environment)
            assert set(environment.versions(home, program.packages)) == set(program.packages)
    alone = variants(["softmax", "mobile d=8"], ["float32"], [])
    assert [str(variant) for variant in alone] == [
        "mobiatt_tf (LiteRT), softmax, float32",
        "mobiatt_tf (LiteRT), mobile d=8, float32",
        "its matrix products alone (LiteRT), floor, float32",
    ]


@pytest.mark.slow
def test_an_environment_is_installed_once_and_anew_when_its_requirements_change(tmp_path: Path) -> None:
    required = tmp_path / "requirements.txt"
    required.write_text("# nothing\n")
    python = environment.python_of("empty", tmp_path / "peers", required)
    mark = python.parent.parent / "mark"
    mark.touch()
    assert environment.python_of("empty", tmp_path / "peers", required) == python
    assert mark.exists()
    required.write_text("# still nothing\n")
    environment.python_of("empty", tmp_path / "peers", required)
    assert not mark.exists()
    required.write_text("./there_is_no_such_package\n")
    for _attempt in range(2):  # what failed is not taken for whole
        with pytest.raises(UserError, match=r"requirements.txt cannot be installed: ERROR: .*there_is_no_such_package"):
            environment.python_of("empty", tmp_path / "peers", required)
    assert "there_is_no_such_package" in (tmp_path / "peers" / "empty.log").read_text()


def test_the_reason_in_a_report_is_found() -> None:
    report = "Collecting a\nERROR: first\nERROR: No matching distribution found for a\n[notice] new release\n"
    assert environment.error_in(report) == "ERROR: No matching distribution found for a"
    assert environment.error_in("Traceback\n\nValueError: too large\n\n") == "ValueError: too large"
    assert environment.error_in("") == "it says nothing"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """Our smallest model ready to be measured, and its image."""
    directory = tmp_path_factory.mktemp("small")
    model = ours.build("deit", "quickstart", 28, 8)
    image = photographs((28, 28), 1)
    np.save(directory / "image.npy", image)
    (directory / "model.tflite").write_bytes(ours.tflite_file(model, "float32", image))
    logits = keras.ops.convert_to_numpy(model(image, training=False))[0]
    source = {"path": str(directory / "model.tflite")}
    return Prepared(Variant("ours", "mobile d=8", "float32"), source, None, logits), directory / "image.npy"


def test_what_has_other_logits_is_not_timed(small: tuple[Prepared, Path]) -> None:
    right, image = small
    assert right.reference is not None
    wrong = Prepared(right.variant, right.source, None, right.reference + 0.1)
    missing = Prepared(Variant("ours", "softmax", "float32"), {"path": "/there/is/none.tflite"}, None, right.reference)
    rows, skipped = measurement.measure([wrong, missing, right], image, [1], 4)
    assert [row.variant for row in rows] == [right.variant]
    assert [len(latencies) for latencies in rows[0].measurement.rounds] == [3, 1]
    assert rows[0].difference is not None
    assert rows[0].difference < 1e-4
    assert "0.001 is allowed" in skipped[wrong.variant, 1]
    assert "none.tflite" in skipped[missing.variant, 1]


def test_the_clocks_enclose_the_recorded_runs(small: tuple[Prepared, Path]) -> None:
    (row,), _skipped = measurement.measure([small[0]], small[1], [1], 1000)  # CPU clocks may tick every 10 ms
    latencies = [latency for one_round in row.measurement.rounds for latency in one_round]
    assert len(latencies) == 1000
    assert 0 < sum(latencies) <= row.wall_seconds
    assert row.cpu_seconds > 0


def test_a_process_that_ends_in_the_middle_is_named(small: tuple[Prepared, Path]) -> None:
    prepared, image = small
    with Worker("the fast one, 2 threads", module="benchmarks.peers.worker", runtime="litert") as worker:
        worker.request("load", runtime="litert", source=prepared.source, images=str(image), num_threads=2)
        assert len(worker.request("invoke", unrecorded=0, recorded=2)["latencies"]) == 2
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"^the fast one, 2 threads: the litert runtime ended with SIGKILL"):
            worker.request("invoke", unrecorded=0, recorded=2)


def test_a_package_that_the_environment_lacks_is_named(small: tuple[Prepared, Path], tmp_path: Path) -> None:
    prepared, image = small
    with (
        Worker("a peer", sys.executable, "benchmarks.peers.worker", runtime="executorch") as worker,
        pytest.raises(UserError, match="a peer: No module named 'executorch'"),
    ):
        worker.request("load", runtime="executorch", source=prepared.source, images=str(image), num_threads=1)
