"""What benchmarks/resolution.py measures: the models, and the child process that takes training steps.

`python -m benchmarks.resolution_worker`, see `tflite.process.Worker`; requests as in `benchmarks.training_worker`.
"""

from importlib import metadata
from typing import Any

import numpy as np

from benchmarks import training_worker
from tflite.serving import serve

PARTS = ("backbone", "detector", "segmenter")
DETECTOR_CLASSES, SEGMENTER_CLASSES = 80, 150  # of COCO and ADE20K
_BOXES = 8  # in the image of a training step


def build(subject: str, image_size: tuple[int, int], attention: str) -> Any:
    """A seeded model for images of one size whose backbone has the scale of the variant's own size.

    Args:
        subject: FAMILY/VARIANT/PART, as in "pvt_v2/b0/detector". Of a backbone the outputs are the maps that a pyramid
            takes, or DeiT's normalised tokens.
        image_size: (height, width).
        attention: "mobile" or "softmax".

    Raises:
        ValueError: there is no such model, or it cannot have that size.
    """
    import keras

    import keras_models
    from keras_models import deit, pvt_v2

    family, variant, part = subject.split("/")
    keras.utils.set_random_seed(0)
    trained = {"deit": deit.VARIANTS, "pvt_v2": pvt_v2.VARIANTS}[family][variant].image_size
    arguments: dict[str, Any] = {"image_size": image_size, "attention": attention, "training_size": trained}
    arguments["drop_path"] = 0.0
    if part == "detector":
        return keras_models.RetinaNetMobiAtt(family, variant, num_classes=DETECTOR_CLASSES, **arguments)
    if part == "segmenter":
        return keras_models.SemanticFPNMobiAtt(family, variant, num_classes=SEGMENTER_CLASSES, **arguments)
    model = keras_models.FAMILIES[family].build(variant, features_only=True, **arguments)
    outputs = model.output["norm"] if family == "deit" else model.output
    return keras.Model(model.input, outputs, name=model.name)


def with_one_output(model: Any) -> Any:
    """A backbone that ends in the means of its maps, side by side, [B, C]: a .tflite file has one output."""
    import keras

    tensors = keras.tree.flatten(model.output)
    means = [
        (keras.layers.GlobalAveragePooling2D if len(x.shape) == 4 else keras.layers.GlobalAveragePooling1D)()(x)
        for x in tensors
    ]
    return keras.Model(model.input, keras.layers.Concatenate()(means) if len(means) > 1 else means[0], name=model.name)


def losses_and_targets(subject: str, model: Any, recipe: Any) -> tuple[Any, Any]:
    """The loss of the model's task, and targets for one image; of a backbone the mean square of its maps."""
    import keras
    import tensorflow as tf

    from mobiatt_tf import tasks

    height, width = model.input_shape[1:3]
    generator = np.random.default_rng(0)
    part = subject.split("/")[2]
    if part == "detector":
        corners = generator.uniform(0, 0.5, (1, _BOXES, 2)) * (width, height)
        sides = generator.uniform(0.1, 0.5, (1, _BOXES, 2)) * (width, height)
        labels = generator.integers(DETECTOR_CLASSES, size=(1, _BOXES)).astype("int32")
        boxes = np.concatenate([corners, corners + sides], axis=-1).astype("float32")
        return tasks.make_task("detection").losses(model, recipe, None), {"boxes": boxes, "labels": labels}
    if part == "segmenter":
        labels = generator.integers(SEGMENTER_CLASSES, size=(1, height, width)).astype("int32")
        return tasks.make_task("segmentation").losses(model, recipe, None), labels

    def mean_squares(images: Any, _: Any) -> Any:
        maps = keras.tree.flatten(model(images, training=True))
        return tf.add_n([tf.reduce_mean(tf.square(tf.cast(x, tf.float32)), list(range(1, len(x.shape)))) for x in maps])

    return mean_squares, np.zeros(1, "int32")


class Session(training_worker.Session):
    """One process's state: a training step, see the base class."""

    def load_dense(self, subject: str, image_size: list[int], attention: str, num_threads: int) -> dict[str, Any]:
        """A training step at batch 1, in float32, as training takes it, ready to run.

        Args:
            subject: see `build`.
            image_size: [height, width].
            attention: "mobile" or "softmax".
            num_threads: threads.

        Returns:
            `baseline_bytes`, the process with its libraries, and `versions`.
        """
        import tensorflow as tf

        from mobiatt_tf.training.optimizer import make_optimizer
        from mobiatt_tf.training.recipes import Recipe
        from mobiatt_tf.training.step import make_run_steps

        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
        baseline = training_worker._settled_bytes()
        recipe = Recipe(
            epochs=1, batch_size=1, learning_rate=1e-4, warmup_epochs=0, weight_decay=1e-4, label_smoothing=0
        )
        strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
        with strategy.scope():
            model = build(subject, (image_size[0], image_size[1]), attention)
            losses, targets = losses_and_targets(subject, model, recipe)
            run_steps = make_run_steps(
                model, make_optimizer(recipe, 10**6, model), None, recipe, strategy, losses=losses
            )
        images = np.random.default_rng(1).normal(size=(1, *image_size, 3)).astype("float32")
        batches = iter(tf.data.Dataset.from_tensors((images, targets)).repeat())
        self.take_step = lambda: float(run_steps(batches, tf.constant(1)).numpy()[0])
        versions = {package: metadata.version(package) for package in ("tensorflow", "keras")}
        return {"baseline_bytes": baseline, "versions": versions}


if __name__ == "__main__":
    serve(Session(), training_worker.reason)
