"""The tables of docs/performance.md are those of the committed results, which say where they were measured."""

import itertools
import json

import pytest

from benchmarks import arm, attention, memory, models, resolution_report, rewrites
from benchmarks.peers import report

DOCUMENT = (attention.ROOT / "docs" / "performance.md").read_text()
ATTENTION = json.loads(attention.RESULTS.read_text())
PEERS = list(json.loads(models.RESULTS.read_text())["cases"].values())
REWRITES = json.loads(rewrites.RESULTS.read_text())
MEMORY = json.loads(memory.RESULTS.read_text())


@pytest.mark.parametrize("format", ["float32", "dynamic"])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention(format: str, threads: int) -> None:
    assert f"\n{attention.table(ATTENTION, format, threads)}\n" in DOCUMENT


def test_memory() -> None:
    assert f"\n{memory.table(MEMORY)}\n" in DOCUMENT


def test_resolution() -> None:
    """Where tokens are many, Mobile-Attention is faster than the host and takes less memory (a segmenter later)."""
    results = json.loads((attention.ROOT / "docs" / "resolution.json").read_text())
    assert f"\n{resolution_report.table(results)}\n" in DOCUMENT
    large = [case for case in results["cases"].values() if case["phase"] == "tflite" and case["tokens"] > 50_000]
    assert large
    for case in large:
        mobile, softmax = (case["rows"][name] for name in ("mobile", "softmax"))
        assert mobile["failure"] is None
        if softmax["failure"] is None:
            assert mobile["to_softmax"]["median"] < 1
            larger = case["subject"].endswith("/segmenter") and case["tokens"] < 100_000  # docs/performance.md says so
            assert (mobile["peak_bytes"] > softmax["peak_bytes"]) == larger


def test_arm() -> None:
    assert f"\n{arm.markdown(arm.from_json(json.loads(arm.BASELINE.read_text())))}\n" in DOCUMENT


def test_peers() -> None:
    assert f"\n{report.summary(PEERS)}\n" in DOCUMENT


def test_rewrites() -> None:
    """Every one that is kept pays, in every format, to what a run can tell (2 %)."""
    assert f"\n{rewrites.table(REWRITES)}\n" in DOCUMENT
    for format in rewrites.FORMATS:
        ratios = [REWRITES["ratios"][f"{format}, {step}"]["median"] for step in rewrites.STEPS]
        assert all(after < before * 1.02 for before, after in itertools.pairwise(ratios))
        assert ratios[-1] < 0.96 * ratios[0]


def test_results_say_where_they_were_measured() -> None:
    for row in (*ATTENTION.values(), *MEMORY.values(), *PEERS, REWRITES):
        assert row["device"]["cpu"]
        assert row["device"]["ai_edge_litert"]
    for row in ATTENTION.values():
        assert row["runs"] >= 50
        mobile, naive = (row["blocks"][f"{kind}_d{row['head_dim']}"] for kind in ("mobile", "naive"))
        if row["head_dim"] <= 8 and row["threads"] == 1:
            assert mobile["to_floor"]["median"] < naive["to_floor"]["median"]
        assert 0 < mobile["share_of_peak"] < 1


def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    rows = {row["tokens"]: row["blocks"]["mobile_d8"] for row in MEMORY.values()}
    assert rows[12544]["peak_bytes"] < 8 * rows[3136]["peak_bytes"]
