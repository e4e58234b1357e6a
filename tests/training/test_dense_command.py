"""train_tpu_gpu.py with --task=detection and --task=segmentation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.dense_files import CocoFolder
from tests.training.small import ROOT, read_lines

pytestmark = pytest.mark.slow

# Gives each list of flags of a JSON list on standard input to the program, and prints the line that it ends with.
_MISTAKES = """
import json, sys
from absl import flags
from mobiatt_tf.errors import UserError
import train_tpu_gpu
for given in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for name in {flag.name for module in flags.FLAGS.flags_by_module_dict().values() for flag in module}:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["train_tpu_gpu.py", *given])
    try:
        train_tpu_gpu.main([])
        print("no mistake")
    except UserError as error:
        print(str(error).replace("\\n", " "))
"""


def run(arguments: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_trains_a_detector_by_the_tasks_own_recipe_and_evaluates_it(tmp_path: Path) -> None:
    folder, output = CocoFolder(tmp_path / "coco").root, tmp_path / "run"
    flags = ["--task=detection", f"--dataset={folder}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={output}"]
    model = ["--variant=quickstart", "--image_size=64", "--training_size=64"]
    trained = run(["train_tpu_gpu.py", *flags, *model, "--batch_size=2", "--epochs=2"])
    assert trained.returncode == 0, trained.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["task"] == "detection"
    assert results["model"]["family"] == "pvt_v2"
    assert results["model"]["training_size"] == [64, 64]
    assert results["recipe"]["schedule"] == "cosine"
    assert results["images"] == 1
    assert f"AP {results['ap']:.2%}" in trained.stdout
    assert [line["step"] for line in read_lines(output) if line["kind"] == "evaluation"] == [1, 2]

    of_run = [flag for flag in flags if not flag.startswith("--dataset")]
    evaluated = run(["train_tpu_gpu.py", *of_run, "--evaluate_only"])  # the dataset is that of the run
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"AP {results['ap']:.2%}" in evaluated.stdout
    without_task = run(["train_tpu_gpu.py", f"--output_dir={output}", "--evaluate_only"])
    assert without_task.returncode == 1
    assert f"error: The model in {output} is for detection: add --task=detection." in without_task.stderr

    # Another training_size is another scale of every attention: not the same run.
    other = run(["train_tpu_gpu.py", *flags, *model[:2], "--batch_size=2", "--epochs=2"])
    assert other.returncode == 1
    assert "training_size" in other.stderr
    assert "differs from this one" in other.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = CocoFolder(tmp_path / "coco").root
    detection, data = "--task=detection", [f"--dataset={folder}", f"--cache_dir={tmp_path / 'cache'}"]
    cases = [
        (
            ["--task=segmentation", "--recipe=ade20k", "--epochs=2"],
            "--epochs=2 would be ignored: the recipe has max_steps=40000",
        ),
        ([detection, "--recipe=coco", "--warmup_epochs=1"], "--warmup_epochs=1.0 would be ignored"),
        ([detection, "--recipe=coco", "--epochs=6", "--batch_size=2", *data], "the learning rate would not fall"),
        ([detection, "--recipe=paper"], "take a recipe of detection"),
        ([detection, "--recipe=ade20k"], "--recipe=ade20k is for --task=segmentation"),
        ([detection, "--teacher=x"], "Distillation is for classification"),
        ([detection, "--distilled", "--model=deit"], "Distillation is for classification"),
        (["--recipe=coco"], "--recipe=coco is for --task=detection"),
        (["--flip=0.5"], "which is for detection and segmentation"),
        (["--dataset=scenes"], "scenes is for --task=detection"),
        ([*data], "add --task=detection"),
        (["--training_size=64"], "--training_size is for --task=detection"),
        (["--task=segmentation", *data], "images/training"),
        ([detection, f"--dataset={tmp_path}"], "JSON"),
        ([detection, "--image_size=50", "--variant=quickstart", "--batch_size=2", *data], "multiple of 16"),
    ]
    lists = [[f"--output_dir={tmp_path / 'run'}", *flags] for flags, _ in cases]
    printed = run(["-c", _MISTAKES], json.dumps(lists))
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert len(lines) == len(cases)
    for line, (flags, message) in zip(lines, cases, strict=True):
        assert message in line, flags
    assert not (tmp_path / "run" / "run.json").exists()
