"""The loop in this process, on one device."""

import dataclasses
import json
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf import data, training
from mobiatt_tf.errors import UserError
from mobiatt_tf.training.checkpoints import locked
from tests.training import small


def run(directory: Path, **changes: int | float | bool | str) -> dict[str, object]:
    return training.train(
        small.make_model,
        small.make_dataset(),
        small.recipe(**changes),
        directory,
        training.make_strategy("one"),
        cadence=training.Cadence(log_every=4),
        show_progress=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


def test_leaves_what_it_promises(finished: Path) -> None:
    lines = small.read_lines(finished)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [4, 6, 8, 12, 16, 18, 20, 24]
    tests = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["epoch"] for line in tests] == [1, 2, 3, 4]
    assert tests[-1]["loss"] < tests[0]["loss"]
    assert tests[-1]["top5"] is None  # there are three classes
    results = json.loads((finished / "results.json").read_text())
    assert results["step"] == 24
    assert results["images"] == 23 == np.sum(results["confusion_matrix"])
    assert results["top1"] == np.trace(results["confusion_matrix"]) / 23
    assert results["recipe"] == dataclasses.asdict(small.recipe())
    assert results["versions"]["keras"] == keras.__version__
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (finished / "checkpoints").glob("*.json"))
    assert kept == ["step_000000012.json", "step_000000018.json", "step_000000024.json"]
    assert not list(finished.rglob("*partial*"))


def test_saved_model_is_the_evaluated_one(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    model = keras.saving.load_model(finished / "model.keras")
    evaluator = training.Evaluator(model, training.make_strategy("one"), 5)
    again = evaluator(small.make_dataset().test)
    assert again.confusion.tolist() == results["confusion_matrix"]
    assert again.loss == pytest.approx(results["loss"], abs=1e-6)


def test_tensorboard_events_repeat_the_log(finished: Path) -> None:
    values = {}
    for file in (finished / "tensorboard").iterdir():
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                values[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
                assert value.metadata.plugin_data.plugin_name == "scalars"
    for line in small.read_lines(finished):
        assert values[f"{line['kind']}/loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)


def test_finished_run_is_not_run_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir() if path.is_file() and path.name != ".lock"}
    results = run(finished)
    assert results == json.loads((finished / "results.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_recipe_is_refused_with_the_difference(finished: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.learning_rate: 0\.01 there, 0\.02 now"):
        run(finished, learning_rate=2e-2)


def test_another_dataset_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.fingerprint"):
        training.train(
            small.make_model,
            small.make_dataset(seed=1),
            small.recipe(),
            finished,
            training.make_strategy("one"),
            show_progress=False,
        )


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path)
    (tmp_path / "results.json").unlink()
    newest = tmp_path / "checkpoints" / "step_000000024.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[:-7])
    with caplog.at_level("WARNING", logger="absl"):
        run(tmp_path)
    assert "step_000000024 is damaged" in caplog.text
    resumed, whole = small.read_lines(tmp_path), small.read_lines(finished)
    assert [line.keys() for line in resumed] == [line.keys() for line in whole]
    np.testing.assert_allclose([line["loss"] for line in resumed], [line["loss"] for line in whole], rtol=1e-5)
    assert len(list((tmp_path / "checkpoints").glob("*.json"))) == 3


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, epochs=1, warmup_epochs=0.5)
    (tmp_path / "results.json").unlink()
    for manifest in (tmp_path / "checkpoints").glob("*.json"):
        manifest.write_text("{}")
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        run(tmp_path, epochs=1, warmup_epochs=0.5)


def test_diverging_run_names_step_and_checkpoint(tmp_path: Path) -> None:
    dataset = small.make_dataset()
    model_with_poison = _poisoned_after(9)
    with pytest.raises(UserError, match=r"loss of step 10 is nan.*last good checkpoint is .*step_000000006"):
        training.train(
            model_with_poison, dataset, small.recipe(), tmp_path, training.make_strategy("one"), show_progress=False
        )
    assert not list((tmp_path / "checkpoints").glob("*12*"))


@keras.saving.register_keras_serializable(package="tests")
class _NaNAfter(keras.layers.Layer):
    """Passes its input on; from training call number `steps` + 1 on it is NaN."""

    def __init__(self, steps: int, **arguments: object) -> None:
        super().__init__(**arguments)
        self.steps = steps
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if training:
            self.calls.assign_add(1.0)
            return keras.ops.where(self.calls > self.steps, float("nan"), inputs)
        return inputs

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "steps": self.steps}


def _poisoned_after(steps: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        model = small.make_model()
        return keras.Model(model.input, _NaNAfter(steps)(model.output))

    return build


@pytest.mark.slow
def test_second_process_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold_lock, args=(str(tmp_path), held, done))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(UserError, match=f"Process {process.pid} is already training"):
            run(tmp_path)
    finally:
        done.set()
        process.join(30)
    with locked(tmp_path):  # free again once the process is gone
        pass


def _hold_lock(directory: str, held: Event, done: Event) -> None:
    with locked(Path(directory)):
        held.set()
        done.wait(60)


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint of step 6 cannot be written"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "checkpoints").glob("*.json"))
    assert run(tmp_path)["step"] == 24


def test_mixed_bfloat16_keeps_weights_and_loss_in_float32(tmp_path: Path, finished: Path) -> None:
    run(tmp_path, precision="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model.get_layer("convolution").compute_dtype == "bfloat16"
    loss = [small.read_lines(directory)[-2]["loss"] for directory in (tmp_path, finished)]
    assert loss[0] == pytest.approx(loss[1], abs=0.05)
    assert loss[0] != loss[1]


def test_wrong_batch_and_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="96 training images"):
        run(tmp_path, batch_size=200)
    dataset = dataclasses.replace(small.make_dataset(), class_names=("one", "two", "three", "four"))
    with pytest.raises(ValueError, match="3 classes, the dataset colours has 4"):
        training.train(small.make_model, dataset, small.recipe(), tmp_path, training.make_strategy("one"))


def test_labels_beyond_the_classes_are_refused() -> None:
    split = data.Split(labels=np.array([0, 3], np.int32), images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="knows 3 classes, but the data have label 3"):
        training.Evaluator(small.make_model(), training.make_strategy("one"), 2)(split)


def test_evaluation_of_short_batches_matches_numpy() -> None:
    keras.utils.set_random_seed(0)
    model = small.make_model()
    test = small.make_dataset().test
    logits = np.concatenate(
        [model(images).numpy() for images, _ in data.test_batches(test, image_size=(8, 8), batch_size=23)]
    )
    result = training.Evaluator(model, training.make_strategy("one"), 7)(test)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert result.count == 23
    assert result.loss == pytest.approx(-log_softmax[np.arange(23), test.labels].mean(), rel=1e-5)
    assert result.top1 == (logits.argmax(1) == test.labels).mean()
