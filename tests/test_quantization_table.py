"""The committed results of benchmarks/quantization.py: the documents show them, and they meet the promises."""

import json

import pytest

from benchmarks import quantization

RESULTS = json.loads(quantization.RESULTS.read_text())


def test_documents_have_the_tables_of_the_results() -> None:
    text = (quantization.ROOT / "docs" / "quantization.md").read_text()
    assert quantization.accuracy_table(RESULTS) in text
    assert quantization.cost_table(RESULTS) in text


@pytest.mark.parametrize("name", RESULTS["trained"])
def test_trained_models_keep_their_accuracy_in_int8(name: str) -> None:
    report = RESULTS["trained"][name]["qat"]
    rows = {row["name"]: row for row in report["rows"]}
    assert report["test_images"] == 10_000
    assert rows["int8.tflite"]["refused"] is None
    assert rows["int8.tflite"]["top1"] >= rows["Keras float32"]["top1"] - 0.005
    assert abs(rows["int8.tflite"]["top1"] - rows["Keras fake-quant"]["top1"]) <= 0.002
    assert rows["int8.tflite"]["agreement_with_fake_quant"] >= 0.995
    assert rows["int8.tflite"]["partitions"] == 1
    assert rows["int8.tflite"]["undelegated_ops"] == {}


def test_all_families_and_token_counts_are_there() -> None:
    assert {row["family"] for row in RESULTS["trained"].values()} == {"DeiT", "PVTv2", "EfficientFormerV2"}
    assert {49, 196, 784} <= {row["tokens"] for row in RESULTS["trained"].values() if row["family"] == "DeiT"}


@pytest.mark.parametrize("title", quantization.FULL_SIZE)
def test_full_size_files_are_small_fast_and_whole(title: str) -> None:
    row = RESULTS["full_size"][title]
    files = row["files"]
    assert row["device"]["cpu"]
    assert row["device"]["ai_edge_litert"]
    assert row["runs"] >= 30
    assert files["int8"]["partitions"] == files["int8_full"]["partitions"] == 1
    assert files["int8"]["latency_ratio"] <= files["dynamic"]["latency_ratio"]
    if title == "DeiT tiny":
        assert files["int8"]["size_bytes"] <= 0.27 * files["float32"]["size_bytes"]
