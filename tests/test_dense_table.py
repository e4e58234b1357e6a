"""The table of detectors and segmenters: rendered from the committed results, which are the models' own."""

import json

import pytest

from benchmarks import dense_table

RESULTS = json.loads(dense_table.RESULTS.read_text())


def test_the_document_has_the_table_of_the_results() -> None:
    assert list(RESULTS) == dense_table.PUBLISHED
    assert dense_table.table(RESULTS) in dense_table.DOCUMENT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", dense_table.SIZES)
@pytest.mark.parametrize("name", ["deit/tiny", "pvt_v2/b0", "efficientformer_v2/s0"])
def test_figures_are_those_of_the_models(task: str, name: str) -> None:
    assert dense_table.size_of(task, name, "mobile") == RESULTS[name][task]["mobile"]
