"""tools/quickstart_dense.py: what it makes of results, and all of it once, briefly."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobiatt_tf import data
from mobiatt_tf.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_dense", ROOT / "tools" / "quickstart_dense.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tool: ModuleType) -> dict[str, Any]:
    """Of two tasks that reach .7 and .6, and files that lose a little."""
    found: dict[str, Any] = {}
    for task, key, score, of_class in (("detection", "ap50", 0.7, "ap50"), ("segmentation", "miou", 0.6, "iou")):
        found[task] = {
            "training": {
                key: score,
                "epochs": 3,
                "train_seconds": 12.3,
                "model": {"parameters": 123_456},
                "per_class": {"coin": {of_class: 0.9}, "absent": {of_class: None}},
            },
            "learning_curve": [
                {"kind": "train", "step": 1, "loss": 2.0},
                {"kind": "train", "step": 2, "loss": 1.0},
                {"kind": "evaluation", "step": 2, key: score},
            ],
            "exports": {
                format: {"description": {"size_bytes": 99_000}, "latency": {"median_seconds": 0.0123}}
                for format in tool.FORMATS
            },
            "files": {format: {key: score - 0.05} for format in tool.FORMATS},
        }
    return found


def test_the_table_has_both_tasks_and_all_files(tool: ModuleType, results: dict[str, Any]) -> None:
    table = tool.format_table(results)
    for expected in (
        "123,456",
        "mAP50",
        "70.00%",
        "65.00%",
        "mIoU",
        "60.00%",
        "55.00%",
        "99 kB",
        "12.30 ms",
        "coin 90%",
    ):
        assert expected in table
    assert table.count("TFLite float32") == table.count("TFLite dynamic") == 2
    assert "absent" not in table


def test_a_model_or_file_below_half_is_an_error(tool: ModuleType, results: dict[str, Any]) -> None:
    tool.require_expected(results)
    results["segmentation"]["files"]["dynamic"]["miou"] = 0.49
    with pytest.raises(UserError, match=r"segmentation, dynamic: mIoU is 49\.0%"):
        tool.require_expected(results)
    results["detection"]["training"]["ap50"] = 0.123
    with pytest.raises(UserError, match=r"detection, Keras: mAP50 is 12\.3%"):
        tool.require_expected(results)


def test_the_picture_shows_curves_and_predictions(tool: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    photos = [tmp_path / "a.png", tmp_path / "b.png"]
    for task, suffix in (("detection", "boxes"), ("segmentation", "regions")):
        tool.pictures_path(task, tmp_path).mkdir()
        for photo in photos:
            Image.new("RGB", (40, 30), (200, 30, 30)).save(
                tool.pictures_path(task, tmp_path) / f"{photo.stem}_{suffix}.jpg"
            )
    tool.draw(results, tmp_path, photos, tmp_path / "dense.png")
    with Image.open(tmp_path / "dense.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (abs(pixels - (200, 30, 30)).max(-1) < 20).sum()
    blue = (abs(pixels - (31, 119, 180)).max(-1) < 20).sum()
    assert red > 4 * 1000, "four predictions"
    assert blue > 100, "the measure"


def test_a_run_of_another_recipe_is_moved_aside(tool: ModuleType, tmp_path: Path) -> None:
    import dataclasses

    from mobiatt_tf import training

    def write(recipe: training.Recipe) -> None:
        (tmp_path / "detection").mkdir(exist_ok=True)
        (tmp_path / "detection" / "run.json").write_text(json.dumps({"recipe": dataclasses.asdict(recipe)}))

    directory = tmp_path / "detection"
    tool.move_aside_other_recipe("detection", directory, ())  # nothing there
    write(training.make_recipe("quickstart_detection"))
    tool.move_aside_other_recipe("detection", directory, ())
    assert directory.is_dir(), "the same recipe goes on"
    tool.move_aside_other_recipe("detection", directory, tool.BRIEF_FLAGS)
    assert not directory.exists()
    write(training.make_recipe("quickstart_detection", epochs=1))
    tool.move_aside_other_recipe("detection", directory, tool.BRIEF_FLAGS)
    assert directory.is_dir()
    tool.move_aside_other_recipe("detection", directory, ())
    assert {path.name for path in tmp_path.iterdir()} == {"detection_old1", "detection_old2"}


def test_a_failing_command_says_how_to_go_on(tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"status 3\. Once mended, `make quickstart-dense` goes on"):
        tool.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert "$ python -c" in capfd.readouterr().out


@pytest.mark.slow
def test_all_of_it_briefly(load_scenes: Callable[[], None], tmp_path: Path) -> None:
    load_scenes()
    command = [sys.executable, str(ROOT / "tools" / "quickstart_dense.py"), "--brief", f"--output_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=1500)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for task, key in (("detection", "ap50"), ("segmentation", "miou")):
        assert 0 <= results[task]["training"][key] <= 1
        assert results[task]["learning_curve"]
        for format in ("float32", "dynamic"):
            assert results[task]["exports"][format]["verification"]["passed"]
            assert 0 <= results[task]["files"][format][key] <= 1
        same = abs(results[task]["files"]["float32"][key] - results[task]["training"][key])
        assert same < 0.02, "the file is measured as the model is"
        assert len(list((tmp_path / f"{task}_pictures").glob("*.jpg"))) == 6
    with Image.open(tmp_path / "dense.png") as picture:
        assert picture.size[0] > 1000
    assert "mAP50" in first.stdout


@pytest.fixture
def load_scenes() -> Callable[[], None]:
    """Loads the scenes into the user's cache. Skips the test where they cannot be had."""

    def load() -> None:
        from mobiatt_tf.data import dense

        try:
            data.load("stamps")
            dense.load_detection("scenes")
        except UserError as error:
            pytest.skip(f"the scenes cannot be had: {error}")

    return load
