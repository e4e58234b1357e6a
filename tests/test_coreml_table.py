"""The committed measurements of Core ML packages: the documentation shows them, and they keep what it promises."""

import json
from pathlib import Path

import pytest

from benchmarks import coreml_packages

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "docs" / "coreml.json").read_text())
DOCUMENT = (ROOT / "docs" / "coreml.md").read_text()


def test_the_documentation_has_the_tables_of_the_results() -> None:
    assert coreml_packages.variants_table(RESULTS) in DOCUMENT
    assert coreml_packages.conversions_table(RESULTS) in DOCUMENT


def test_every_model_and_variant_was_measured() -> None:
    assert list(RESULTS["trained"]) == list(coreml_packages.TRAINED)
    assert list(RESULTS["full_size"]) == list(coreml_packages.FULL_SIZE)
    for found in RESULTS["trained"].values():
        assert found["refused"] == {}
        assert found["images"] == 1000
        assert list(found["rows"]) == ["float32", "float16", "int8", "palette8", "w8a8", "w8a8_trained"]


@pytest.mark.parametrize("name", list(coreml_packages.TRAINED))
def test_trained_packages_pass_the_gates(name: str) -> None:
    rows = RESULTS["trained"][name]["rows"]
    assert rows["float32"]["max_relative_error"] < 1e-4
    assert rows["float16"]["max_relative_error"] < 1e-2
    assert rows["float16"]["agreement"] >= 0.99
    for row in rows.values():
        assert abs(row["top1"] - row["keras_top1"]) < 0.02
    assert rows["w8a8_trained"]["own_agreement"] >= 0.99  # against the model that was trained so


@pytest.mark.parametrize("title", list(coreml_packages.FULL_SIZE))
def test_our_conversion_has_no_transpose_and_half_the_operators(title: str) -> None:
    own, plain = RESULTS["full_size"][title]["coreml.export"], RESULTS["full_size"][title]["coremltools"]
    assert own["transposes"] == 0 < 46 < plain["transposes"]
    assert own["operators"] < 0.85 * plain["operators"]
    assert max(own["errors"].values()) < 1e-2
    assert not own["constant_in_float16"]
