"""The benchmark app as far as it goes without a Mac: the script's refusals, and that both sides agree on the files."""

import json
import platform
import re
import subprocess
from pathlib import Path

import pytest

from coreml import export
from mobiatt_tf.verification import photographs
from tests.quantization.small import make_model

IOS = Path(__file__).parents[2] / "coreml" / "ios"


def test_the_script_is_valid_shell_and_says_what_is_missing() -> None:
    subprocess.run(["sh", "-n", str(IOS / "run.sh")], check=True)
    arguments = ["sh", str(IOS / "run.sh"), "TEAM", "iPhone", "model.mlpackage"]
    if platform.system() == "Darwin":
        pytest.skip("on a Mac it would build")
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "this needs a Mac with Xcode" in result.stderr
    usage = subprocess.run(arguments[:2], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "usage: run.sh" in usage.stderr


def test_the_app_reads_the_golden_vectors_that_export_writes(tmp_path: Path) -> None:
    """Every stored property of the Swift type is a key of golden.json, and the other way round."""
    export.export(make_model("deit"), tmp_path / "model.mlpackage", photographs((28, 28), 4), least_agreement=0.0)
    golden = json.loads((tmp_path / "model.golden" / "golden.json").read_text())
    source = (IOS / "Sources" / "BenchmarkProtocol" / "Golden.swift").read_text()
    body = source[source.index("struct Golden") :].split("\n}\n")[0]
    properties = re.findall(r"^    public let (\w+): ", body, flags=re.MULTILINE)
    assert set(properties) == set(golden)
    assert len(golden["logits"]) == len(golden["images"]) == 4
