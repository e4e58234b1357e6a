"""The loop in this process, on one device."""

import dataclasses
import json
import multiprocessing
import shutil
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
from mobiatt_tf.training.logs import RunLog
from tests.processes import largest_file
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


@pytest.mark.parametrize("damage", ["model_missing", "model_cut", "model_changed", "results_cut", "results_empty"])
def test_finished_run_with_damaged_results_is_evaluated_again(damage: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    model, results = tmp_path / "run" / "model.keras", tmp_path / "run" / "results.json"
    if damage == "model_missing":
        model.unlink()
    elif damage == "model_cut":
        model.write_bytes(model.read_bytes()[:-100])
    elif damage == "model_changed":
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 255
        model.write_bytes(content)
    else:
        results.write_bytes(results.read_bytes()[:-100] if damage == "results_cut" else b"[]")
    again = run(tmp_path / "run")
    expected = json.loads((finished / "results.json").read_text())
    assert again["confusion_matrix"] == expected["confusion_matrix"]
    assert json.loads(results.read_text()) == again
    for left, right in zip(
        keras.saving.load_model(model).weights, keras.saving.load_model(finished / "model.keras").weights, strict=True
    ):
        np.testing.assert_array_equal(left.numpy(), right.numpy())
    assert small.read_lines(tmp_path / "run")[:-1] == small.read_lines(finished)[:-1]


@pytest.mark.parametrize("name", ["log.jsonl", "tensorboard/notes.txt", "checkpoints/best.h5", "model.keras"])
def test_directory_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]} but no run.json"):
        run(tmp_path)
    assert file.read_text() == "mine"
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([file, tmp_path / ".lock"])


def test_empty_directories_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert run(tmp_path, epochs=1)["step"] == 6


def test_only_left_overs_of_checkpoints_are_removed(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (directory / "results.json").unlink()
    checkpoints = directory / "checkpoints"
    whole = {path.name for path in checkpoints.iterdir()}
    mine = {"best.h5", "step_last.json", "step_1.index", "notes.json", "tensorboard"}
    left_over = {"step_000000021.index", "step_000000021.data-00000-of-00001", ".step_000000021.77.partial.json"}
    for name in mine | left_over:
        (checkpoints / name).write_text(name)
    (checkpoints / "step_000000021_temp").mkdir()
    (checkpoints / "step_000000021_temp" / "part-00000-of-00001.index").touch()
    (directory / "tensorboard" / "notes.txt").write_text("mine")
    run(directory)
    assert {path.name for path in checkpoints.iterdir()} == whole | mine
    assert (directory / "tensorboard" / "notes.txt").read_text() == "mine"


def test_failed_first_start_gives_way_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of step 1 is nan.*There is no checkpoint yet"):
        training.train(
            _poisoned_after(0),
            small.make_dataset(),
            small.recipe(),
            tmp_path,
            training.make_strategy("one"),
            show_progress=False,
        )
    assert run(tmp_path, epochs=1, learning_rate=2e-2)["step"] == 6
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["learning_rate"] == 2e-2


def test_another_programs_run_json_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"recipe": "cake"}')
    with pytest.raises(UserError, match="recipe: cake there, absent now"):
        run(tmp_path)
    assert (tmp_path / "run.json").read_text() == '{"recipe": "cake"}'


def test_other_name_of_the_same_data_resumes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    results = training.train(
        small.make_model,
        dataclasses.replace(small.make_dataset(), name="colours/"),
        small.recipe(),
        tmp_path / "run",
        training.make_strategy("one"),
        show_progress=False,
    )
    assert results["step"] == 24
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]["name"] == "colours/"


def _files_dataset(root: Path, classes: tuple[str, ...], extra: bytes = b"") -> data.Dataset:
    """Two PNG files in each class, one of them to train on; `extra` follows the image data in every file."""

    def split(number: int) -> data.Split:
        names = [root / name / f"{number}.png" for name in classes]
        for path in names:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(np.full((8, 8, 3), 100, np.uint8)).numpy() + extra)
        return data.Split(labels=np.arange(len(names), dtype=np.int32), files=tuple(map(str, names)))

    return data.Dataset(str(root), classes, split(0), split(1))


def test_folders_are_told_apart_by_classes_and_files_not_by_path(tmp_path: Path) -> None:
    def train(dataset: data.Dataset) -> dict[str, object]:
        return training.train(
            small.make_model,
            dataset,
            small.recipe(epochs=1, batch_size=3),
            tmp_path / "run",
            training.make_strategy("one"),
            show_progress=False,
        )

    first = train(_files_dataset(tmp_path / "one", ("a", "b", "c")))
    assert train(_files_dataset(tmp_path / "moved", ("a", "b", "c")))["confusion_matrix"] == first["confusion_matrix"]
    for dataset in (
        _files_dataset(tmp_path / "classes", ("a", "b", "d")),
        _files_dataset(tmp_path / "sizes", ("a", "b", "c"), extra=b"more"),
    ):
        with pytest.raises(UserError, match=r"dataset\.fingerprint: \w+ there, \w+ now\)"):
            train(dataset)


def test_skipped_files_are_listed(tmp_path: Path) -> None:
    skipped = ("red/1.png: is empty", "green/\udcff.png: is no image")  # a name that is not UTF-8
    results = training.train(
        small.make_model,
        dataclasses.replace(small.make_dataset(), skipped=skipped),
        small.recipe(epochs=1),
        tmp_path,
        training.make_strategy("one"),
        show_progress=False,
    )
    assert results["skipped_files"] == 2
    listed = tmp_path / str(results["skipped_files_list"])
    assert listed.name == "skipped_files.txt"
    assert tuple(listed.read_text(errors="surrogateescape").splitlines()) == skipped


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


def test_the_images_of_a_failed_step_are_named(tmp_path: Path) -> None:
    """Steps of 16 images, shown twice each: step 10 is the fourth of the second epoch."""
    dataset, recipe = small.make_dataset(), small.recipe(repeats=2)
    with pytest.raises(UserError, match=r"loss of step 10 is nan; its images are image \d+, .* and 11 more \(all in "):
        training.train(
            _poisoned_after(9), dataset, recipe, tmp_path, training.make_strategy("one"), show_progress=False
        )
    failed = json.loads((tmp_path / "failed_step.json").read_text())
    assert (failed["step"], failed["loss"], len(failed["images"]), len(set(failed["images"]))) == (10, "nan", 16, 8)
    batches = data.train_batches(
        dataset.train,
        image_size=(8, 8),
        batch_size=16,
        seed=recipe.seed,
        epoch=1,
        augmentation=recipe.image_augmentation(),
    )
    _, labels = list(batches)[3]
    numbers = [int(name.removeprefix("image ")) for name in failed["images"]]
    assert dataset.train.labels[numbers].tolist() == labels.numpy().tolist()


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its recipe lacks the fields that were added since; off, they change nothing."""
    run(tmp_path, epochs=1, warmup_epochs=0.5)
    known = json.loads((tmp_path / "run.json").read_text())
    for added in ("mixup", "layer_decay", "distillation"):
        del known["recipe"][added]
    (tmp_path / "run.json").write_text(json.dumps(known))
    run(tmp_path, epochs=1, warmup_epochs=0.5)
    (tmp_path / "run.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"recipe.mixup: absent there, 0.5 now"):
        run(tmp_path, epochs=1, warmup_epochs=0.5, mixup=0.5)


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
    with largest_file(4000), pytest.raises(UserError, match=r"checkpoint of step 6 cannot be written"):
        run(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.json"))
    assert run(tmp_path)["step"] == 24


def test_disk_that_fills_up_under_the_log(tmp_path: Path) -> None:
    """Whichever of the log and the TensorBoard events is refused first."""
    with largest_file(1500), pytest.raises(UserError, match=r"The log cannot be written to .*\(.+\)\. Make room"):
        training.train(
            small.make_model,
            small.make_dataset(),
            small.recipe(batch_size=2),
            tmp_path,
            training.make_strategy("one"),
            cadence=training.Cadence(log_every=1),
            show_progress=False,
        )


_LINE = {"kind": "train", "step": 1, "loss": 1.0, "learning_rate": 0.5}  # 64 bytes, and two TensorBoard events


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (20, {}),  # TensorBoard starts its file with more than that
        (200, {**_LINE, "images": "1" * 200}),  # the line itself; "images" does not go to TensorBoard
        (110, _LINE),  # its events
    ],
)
def test_every_file_of_the_log_reports_a_full_disk(limit: int, line: dict[str, object], tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"The log cannot be written to [^{]* \([^{]*File too large\)"),
        largest_file(limit),
        RunLog(tmp_path) as log,
    ):
        log.write(line)


def test_closing_the_log_reports_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The log cannot be written"), largest_file(200):
        _write_and_close(tmp_path)


def test_closing_the_log_does_not_hide_another_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="first"), largest_file(200):
        _write_and_close(tmp_path, KeyError("first"))


def _write_and_close(directory: Path, error: Exception | None = None) -> None:
    """Writes a line that does not fit; Python tries its end again on closing."""
    with RunLog(directory) as log:
        with pytest.raises(UserError, match="File too large"):
            log.write({**_LINE, "images": "1" * 200})
        if error:
            raise error


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


def test_depthwise_convolutions_in_bfloat16_are_not_for_xla_on_cpus(tmp_path: Path) -> None:
    def build() -> keras.Model:
        images = keras.Input((8, 8, 3))
        x = keras.layers.Flatten()(keras.layers.DepthwiseConv2D(3)(images))
        return keras.Model(images, keras.layers.Dense(small.CLASSES, dtype="float32")(x))

    with pytest.raises(ValueError, match="XLA cannot compile depthwise convolutions in bfloat16 on CPUs"):
        training.train(
            build,
            small.make_dataset(),
            small.recipe(precision="mixed_bfloat16"),
            tmp_path,
            training.make_strategy("one"),
            jit_compile=True,
        )
