"""The tasks on files: a detector and a segmenter that know the truth, and that every way to evaluate says the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobiatt_tf.tasks import anchors, detection, make_task, segmentation
from mobiatt_tf.tasks.anchors import anchors as make_anchors
from mobiatt_tf.training.strategy import make_strategy
from tests.tasks.pictures import COLOURS, dataset, detection_split, segmentation_split
from tests.tasks.toys import SIZE, SIZES, STRIDE, make_detector, make_segmenter, recipe

pytest.importorskip("faster_coco_eval")

ROOT = Path(__file__).resolve().parents[2]


def run_of(model: keras.Model) -> Any:
    def run(images: np.ndarray) -> Any:
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), model(images, training=False))

    return run


def test_a_detector_that_gives_the_truth_is_perfect(tmp_path: Path) -> None:
    split = detection_split(tmp_path, SIZES)
    references, calls = make_anchors(SIZE, STRIDE), iter(range(len(split)))

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        index = next(calls)
        scale = min(SIZE[0] / split.sizes[index][0], SIZE[1] / split.sizes[index][1])
        boxes = np.zeros((1, len(references), 4), np.float32)
        logits = np.full((1, len(references), 3), -20, np.float32)
        for place, (box, label) in enumerate(zip(split.boxes[index], split.labels[index], strict=True)):
            boxes[0, place] = anchors.encode(box * np.float32(scale), references[place])
            logits[0, place, label] = 3
        assert images.shape == (1, *SIZE, 3)
        return {"boxes": boxes, "logits": logits}

    result = detection.evaluate_outputs(run, dataset(split, split), split, SIZE)
    assert (result.ap, result.count, result.boxes) == (1, 5, 10)
    json.dumps(result.to_json(("red", "green", "blue")), allow_nan=False)


@pytest.mark.parametrize("how", ["sliding", "whole"])
def test_a_segmenter_that_knows_the_colours_is_nearly_perfect(tmp_path: Path, how: str) -> None:
    split = segmentation_split(tmp_path, SIZES)
    colours = (COLOURS / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    def run(images: np.ndarray) -> np.ndarray:
        return -((images[..., None, :] - colours) ** 2).sum(axis=-1).astype(np.float32)  # [n, H, W, 3]

    stops: list[int] = []
    if how == "sliding":
        result = segmentation.evaluate_outputs(
            run, dataset(split, split), split, SIZE, stop=lambda: stops.append(1), short_side=40
        )
    else:
        result = segmentation.evaluate_whole(lambda size: run, dataset(split, split), split, 48)
    assert result.count == len(split)
    assert len(stops) == (len(split) if how == "sliding" else 0)
    assert result.miou > 0.95  # borders are blurred by resizing
    json.dumps(result.to_json(("red", "green", "blue")), allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_detection_in_training_says_what_evaluation_afterwards_says(tmp_path: Path, batch_size: int) -> None:
    split, strategy = detection_split(tmp_path, SIZES), make_strategy("one")
    with strategy.scope():
        model = make_detector()
        evaluate = make_task("detection").evaluator(
            model, dataset(split, split), strategy, recipe(batch_size=batch_size)
        )
    stops: list[int] = []
    first = evaluate(split, lambda: stops.append(1))
    second = detection.evaluate_outputs(run_of(model), dataset(split, split), split, SIZE, batch_size=2)
    assert first.ap50 > 0
    assert first.to_line() == pytest.approx(second.to_line(), abs=1e-6)
    assert first.class_ap == pytest.approx(second.class_ap, abs=1e-6)
    assert len(stops) == -(-len(split) // batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_segmentation_in_training_says_what_evaluation_afterwards_says(tmp_path: Path, batch_size: int) -> None:
    """Windows of several images share a step, and those of one image may fall into several."""
    split, strategy = segmentation_split(tmp_path, SIZES), make_strategy("one")
    with strategy.scope():
        model = make_segmenter()
        evaluate = make_task("segmentation").evaluator(
            model, dataset(split, split), strategy, recipe(batch_size=batch_size)
        )
    stops: list[int] = []
    first = evaluate(split, lambda: stops.append(1))
    second = segmentation.evaluate_outputs(run_of(model), dataset(split, split), split, (32, 32))
    assert first.count == len(split) == len(stops)
    assert first.confusion.sum() == second.confusion.sum()
    assert np.abs(first.confusion - second.confusion).sum() <= 4  # rounding may turn a tie
    assert first.miou > 0


def test_an_evaluation_computes_no_more_images_at_a_time_than_training(tmp_path: Path) -> None:
    boxes, masks = detection_split(tmp_path / "boxes", SIZES), segmentation_split(tmp_path / "masks", SIZES)
    for task, split, model in (("detection", boxes, make_detector()), ("segmentation", masks, make_segmenter())):
        counts: list[int] = []

        class Counting(type(model)):  # type: ignore[misc]
            def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
                counts.append(images.shape[0])  # noqa: B023
                return super().__call__(images, *args, **kwargs)

        counting = Counting(model.inputs, model.outputs if task == "segmentation" else model.output)
        evaluate = make_task(task).evaluator(
            counting, dataset(split, split), make_strategy("one"), recipe(batch_size=4, accumulation=2)
        )
        evaluate(split, lambda: None)
        assert set(counts) == {2}


def test_an_image_whose_outputs_are_not_finite_is_named(tmp_path: Path) -> None:
    split = segmentation_split(tmp_path, SIZES)
    calls = iter(range(100))

    def run(images: np.ndarray) -> np.ndarray:
        value = np.nan if next(calls) == 2 else 0.0
        return np.full((len(images), 8, 8, 3), value, np.float32)

    with pytest.raises(ValueError, match=f"{split.name_of(2)}: The segmenter's outputs are not finite"):
        segmentation.evaluate_outputs(run, dataset(split, split), split, (32, 32))


def test_stop_may_give_up(tmp_path: Path) -> None:
    boxes, masks = detection_split(tmp_path / "boxes", SIZES), segmentation_split(tmp_path / "masks", SIZES)

    def stop() -> None:
        raise KeyboardInterrupt

    strategy = make_strategy("one")
    for task, split, model in (("detection", boxes, make_detector()), ("segmentation", masks, make_segmenter())):
        evaluate = make_task(task).evaluator(model, dataset(split, split), strategy, recipe())
        with pytest.raises(KeyboardInterrupt):
            evaluate(split, stop)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_an_empty_split_is_refused(tmp_path: Path, task: str) -> None:
    make_split = detection_split if task == "detection" else segmentation_split
    split = make_split(tmp_path, SIZES[:2])
    model = make_detector() if task == "detection" else make_segmenter()
    evaluate = make_task(task).evaluator(model, dataset(split, split), make_strategy("one"), recipe())
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(split.select(np.arange(0)), lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_task_trains_and_its_loss_falls(tmp_path: Path, task: str) -> None:
    make_split = detection_split if task == "detection" else segmentation_split
    split = make_split(tmp_path, [(48, 64)] * 8)
    model = make_detector() if task == "detection" else make_segmenter()
    size = SIZE if task == "detection" else (32, 32)
    chosen, own = make_task(task), dataset(split, split)
    chosen.check_model(model, own)
    chosen.check_recipe(recipe())
    losses, optimizer = chosen.losses(model, recipe(), None), keras.optimizers.Adam(3e-3)

    @tf.function
    def step(images: tf.Tensor, targets: Any) -> tf.Tensor:
        with tf.GradientTape() as tape:
            found = losses(images, targets)
            loss = tf.reduce_mean(found)
        tf.ensure_shape(found, [4])
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)
        return loss

    means = []
    for epoch in range(6):
        batches = chosen.batches(
            own, recipe(), image_size=size, epoch=epoch, first_step=0, replica_count=1, replicas=[0]
        )
        means.append(np.mean([step(images, targets).numpy() for images, targets in batches]))
    assert np.isfinite(means).all()
    assert means[-1] < means[0]


def test_check_names_what_does_not_fit(tmp_path: Path) -> None:
    boxes, masks = detection_split(tmp_path / "boxes", SIZES), segmentation_split(tmp_path / "masks", SIZES)
    detect, segment = make_task("detection"), make_task("segmentation")
    detector, segmenter = make_detector(), make_segmenter()
    with pytest.raises(ValueError, match="a detector gives boxes"):
        detect.check_model(segmenter, dataset(boxes, boxes))
    with pytest.raises(ValueError, match="a segmenter gives logits"):
        segment.check_model(detector, dataset(masks, masks))
    open_size = keras.Input((None, None, 3))
    anything = keras.Model(open_size, keras.layers.Conv2D(3, 1)(open_size))
    with pytest.raises(ValueError, match="images of a fixed size"):
        segment.check_model(anything, dataset(masks, masks))
    with pytest.raises(ValueError, match="model has 4 classes, the dataset rectangles has 3"):
        segment.check_model(make_segmenter(4), dataset(masks, masks))
    with pytest.raises(ValueError, match=r"mixup=0.8 \(off is 0.0\): detection does not do that"):
        detect.check_recipe(recipe(mixup=0.8))
    for task in (detect, segment):
        task.check_recipe(recipe())
        with pytest.raises(ValueError, match=r"layer_decay=0.75 \(off is 1.0\): \w+ does not do that"):
            task.check_recipe(recipe(layer_decay=0.75))
    detect.check_model(detector, dataset(boxes, boxes))
    segment.check_model(segmenter, dataset(masks, masks))
    with pytest.raises(ValueError, match=r"dataset has none\. Choose a dataset of detection"):
        detect.check_model(detector, dataset(masks, masks))
    with pytest.raises(ValueError, match=r"dataset has none\. Choose a dataset of segmentation"):
        segment.check_model(segmenter, dataset(boxes, boxes))
    empty = detection_split(tmp_path / "boxes", SIZES[:1])
    crowd = type(empty)(**{**vars(empty), "crowd": (np.ones(2, bool),)})
    with pytest.raises(ValueError, match="has no boxes"):
        detect.check_model(detector, dataset(boxes, crowd))


def expected_lines(directory: Path, count: int = len(SIZES)) -> dict[str, Any]:
    """What one process on one device says of the data that `toys.evaluate_under` makes."""
    boxes, masks = (
        detection_split(directory / "detection", SIZES),
        segmentation_split(directory / "segmentation", SIZES),
    )
    boxes, masks = boxes.take(count), masks.take(count)
    return {
        "detection": detection.evaluate_outputs(run_of(make_detector()), dataset(boxes, boxes), boxes, SIZE).to_line(),
        "segmentation": segmentation.evaluate_outputs(
            run_of(make_segmenter()), dataset(masks, masks), masks, (32, 32)
        ).to_line(),
    }


def assert_says(process: subprocess.Popen[str], expected: dict[str, Any]) -> None:
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-2000:]
    found = json.loads(output.splitlines()[-1])
    for task, line in expected.items():
        assert found[task] == pytest.approx(line, abs=2e-3)  # rounding may turn a few pixels, or two scores


def start(directory: Path, strategy: str, count: int = len(SIZES), **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.toys", strategy, str(directory), str(count)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_devices_say_what_one_says(tmp_path: Path) -> None:
    assert_says(start(tmp_path, "mirrored"), expected_lines(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("count", [len(SIZES), 1])
def test_two_processes_say_what_one_says(tmp_path: Path, count: int) -> None:
    """Also of a single image, of which the second process has nothing to compute."""
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for index in range(2):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        processes.append(start(tmp_path / str(index), "multi_worker", count, TF_CONFIG=json.dumps(config)))
    expected = expected_lines(tmp_path, count)
    try:
        for process in processes:
            assert_says(process, expected)
    finally:
        for process in processes:
            process.kill()
