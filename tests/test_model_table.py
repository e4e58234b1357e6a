"""The table of models in README.md and docs/: rendered from the committed results, whose shapes are the models'."""

import json
from pathlib import Path

import pytest

from benchmarks import model_table
from mobiatt_tf.errors import UserError
from tests.models.published import size_of

RESULTS = json.loads(model_table.RESULTS.read_text())


def test_documents_have_the_table_of_the_results() -> None:
    assert model_table.table(RESULTS) in (model_table.ROOT / "docs" / "models.md").read_text()
    assert model_table.short_table(RESULTS) in (model_table.ROOT / "README.md").read_text()


def test_every_published_variant_is_there_and_says_where_it_was_measured() -> None:
    assert list(RESULTS["models"]) == model_table.PUBLISHED
    for row in RESULTS["models"].values():
        assert row["runs"] >= 30
        assert row["threads"] == 1
        assert row["device"]["cpu"]
        assert row["device"]["ai_edge_litert"]
        assert row["partitions"]["float32"] == row["partitions"]["softmax"] == 1
        sizes = row["size_bytes"]
        assert sizes["dynamic"] < 0.6 * sizes["float16"] < 0.36 * sizes["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", model_table.PUBLISHED)
def test_shapes_are_those_of_the_models(name: str) -> None:
    family, variant = name.split("/")
    row = RESULTS["models"][name]
    mobile, softmax = size_of(family, variant, "mobile"), size_of(family, variant, "softmax")
    assert (row["parameters"], row["softmax_parameters"]) == (mobile.parameters, softmax.parameters)
    assert (row["macs"], row["softmax_macs"]) == (mobile.macs, softmax.macs)
    assert row["attention"] == mobile.attention


def test_a_document_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    for old in ("", "| old |\n| older |\n"):
        document.write_text(f"before\n<!-- model table -->\n{old}<!-- end of model table -->\nafter\n")
        model_table.put_into(document, "| new |")
        assert document.read_text() == "before\n<!-- model table -->\n| new |\n<!-- end of model table -->\nafter\n"
    document.write_text("nothing\n")
    with pytest.raises(UserError, match="has no place for the table"):
        model_table.put_into(document, "| new |")
