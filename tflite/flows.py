"""Writes a .tflite of a trained model that also shows what its heads do: for pictures on a phone, not for measuring.

Example:
    python -m tflite.flows --checkpoint=runs/quickstart/train --output=runs/quickstart/flows.tflite

Its outputs are, by name, `logits` [1, classes] and for the i-th layer of Mobile-Attention `competition_i` and
`allocation_i`, each float32 [1, heads, tokens] (`mobiatt_tf.MobileAttention.introspect`). The file is checked against
the Keras model on real images, every output of it, before it gets its name; the .json beside it says which layer is
which, how its tokens lie in the image, and what an image must go through (`tflite.classes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from mobiatt_tf import cli, files, quantization, verification
from mobiatt_tf.errors import UserError
from mobiatt_tf.introspection import model_flows
from mobiatt_tf.layers import MobileAttention, MobileConvAttention, PositionEmbedding
from mobiatt_tf.lean import lean
from mobiatt_tf.models import load_trained, rebuild
from tflite import classes, convert, export, inspect

KIND = "flows"
SHOWN = ("competition", "allocation")
CHECK_IMAGES = 32

# Largest allowed difference of an output from the Keras model's, relative to the largest absolute value of that output.
# Measured: below 1e-6, of the trained quickstart and of untrained DeiT-Tiny, PVTv2-B0 and EfficientFormerV2-S0.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layer:
    """One layer of Mobile-Attention and where its flows are.

    Attributes:
        layer: its name in the model.
        competition: name of the output of the file.
        allocation: likewise.
        prefix: how many tokens (class, distillation) come before those of the image.
        grid: rows and columns of the image's tokens, which follow row by row.
        heads: their number.
    """

    layer: str
    competition: str
    allocation: str
    prefix: int
    grid: tuple[int, int]
    heads: int


def layers_of(model: keras.Model) -> list[Layer]:
    """The layers of Mobile-Attention of a model, in its order.

    Raises:
        UserError: there is none, or the tokens of one lie in no image.
    """
    found = [layer for layer in model.layers if isinstance(layer, MobileAttention | MobileConvAttention)]
    if not found:
        kinds = sorted({type(layer).__name__ for layer in model.layers if "Attention" in type(layer).__name__})
        raise UserError(
            f"{model.name} has no layer of Mobile-Attention, so it has no flows to show "
            f"(its attention: {', '.join(kinds) or 'none'}). Give a model with --attention=mobile."
        )
    return [_layer(model, layer, index) for index, layer in enumerate(found)]


def _layer(model: keras.Model, layer: Any, index: int) -> Layer:
    prefix = 0
    if isinstance(layer, MobileConvAttention):
        grid = layer.grid
    elif not isinstance(layer.input, list) and len(layer.input.shape) == 4:
        grid = tuple(layer.input.shape[1:3])
    else:  # a sequence: the position embedding knows what it came from
        position = next((other for other in model.layers if isinstance(other, PositionEmbedding)), None)
        tokens = layer.query_tokens
        if position is None or position.prefix + position.grid[0] * position.grid[1] != tokens:
            raise UserError(
                f"Nothing says where in the image the {tokens} tokens of {layer.name} lie: {model.name} has no "
                "position embedding for them."
            )
        prefix, grid = position.prefix, position.grid
    height, width = (int(side) for side in grid)
    return Layer(layer.name, f"{SHOWN[0]}_{index}", f"{SHOWN[1]}_{index}", prefix, (height, width), layer.num_heads)


def with_flows(model: keras.Model, batch_size: int | None = 1) -> keras.Model:
    """A float32 copy of a float model whose outputs are the logits and the flows, by name.

    Args:
        model: a functional model with one image input and logits, such as `keras_models.DeiTMobiAtt()`.
        batch_size: of the copy.

    Raises:
        UserError: the model has no Mobile-Attention, or was quantized.
        ValueError: it cannot be rebuilt (see `mobiatt_tf.models.rebuild`).
    """
    policy = quantization.policy_of(model)
    if policy is not None:
        raise UserError(
            f"{model.name} was quantized for {policy.name}; flows are written of float models. Give the checkpoint "
            "that it was made from."
        )
    described = layers_of(model)
    copy = lean(rebuild(model, batch_size, dense_patches=True))
    convert.use_formulation(copy, convert.formulation_for("float32"))
    heads = copy.outputs  # two of a distilled model, which answers with their mean
    outputs = {"logits": heads[0] if len(heads) == 1 else (heads[0] + heads[1]) / 2}
    for entry in described:
        layer = copy.get_layer(entry.layer)
        flows = _Introspection(layer, name=f"{entry.layer}_flows")(layer.input)
        outputs |= {entry.competition: flows["competition"], entry.allocation: flows["allocation"]}  # [B, H, N] each
    return keras.Model(copy.inputs[0], outputs, name=f"{model.name}_flows")


class _Introspection(keras.layers.Layer):
    """`layer.introspect` as a node of a functional model: the children of the layer keep their names to themselves."""

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, inputs: Any) -> dict[str, Any]:
        """What flows at each token of `inputs`: the query, or [query, key] or [query, key, value]."""
        return self.layer.introspect(*inputs[:2]) if isinstance(inputs, list) else self.layer.introspect(inputs)


def write(
    model: keras.Model, output: str | Path, images: np.ndarray, metadata: dict[str, Any], what: str = "given images"
) -> dict[str, Any]:
    """Converts and checks; `output` and the .json beside it exist afterwards only if every output agreed.

    Args:
        model: see `with_flows`.
        output: the .tflite file to write.
        images: float32 [N, height, width, 3], normalised: what file and model are compared on.
        metadata: of `tflite.classes.metadata`.
        what: what the images are, in words.

    Returns:
        What the .json holds.

    Raises:
        UserError: see `with_flows`; or the file does not match the model, or does not run in LiteRT.
        ValueError: the model cannot be rebuilt.
    """
    output = Path(output)
    described = layers_of(model)
    content = convert.through_converter(with_flows(model), "float32", int8=False)
    with files.atomic_path(output) as temporary:
        temporary.write_bytes(content)
        export.check_description(inspect.describe(temporary))
        errors = _errors(temporary, rebuild(model, batch_size=None), described, images)
        # Not a number is not within the tolerance either.
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        if wrong:
            name = max(wrong, key=lambda name: wrong[name])
            raise UserError(
                f"{len(wrong)} outputs of the file differ from the Keras model, {name} by {wrong[name]:.1e} of its "
                f"largest value on {len(images)} images (allowed {TOLERANCE:.0e}). Nothing was written."
            )
        output.with_suffix(".json").unlink(missing_ok=True)  # no report of an old file beside a new one
    report = {
        "file": output.name,
        "sha256": files.sha256(output),
        "kind": KIND,
        "model": model.name,
        "verification": {"images": len(images), "what": what, "tolerance": TOLERANCE, "max_relative_errors": errors},
        "flows": [{**vars(layer), "grid": list(layer.grid)} for layer in described],
        "classify": metadata,
    }
    files.write_json(output.with_suffix(".json"), report)
    return report


def run_file(path: str | Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a file with flows by name, float32 [N, ...], for float32 images [N, height, width, 3]."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    answers = [{name: value.copy() for name, value in runner(images=image[None]).items()} for image in images]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def keras_outputs(model: keras.Model, described: Sequence[Layer], images: np.ndarray) -> dict[str, np.ndarray]:
    """What `run_file` should answer, by the Keras model as it is trained."""
    outputs = {"logits": verification.keras_logits(model, images)}
    seen = model_flows(model, images)
    for layer in described:
        outputs |= {getattr(layer, name): seen[layer.layer][name] for name in SHOWN}
    return outputs


def _errors(path: Path, model: keras.Model, described: Sequence[Layer], images: np.ndarray) -> dict[str, float]:
    """By output name the largest difference between file and model over the largest absolute value of the model."""
    expected, found = keras_outputs(model, described, images), run_file(path, images)
    if expected.keys() != found.keys():
        raise UserError(f"The converted file has the outputs {', '.join(sorted(found))}. Nothing was written.")
    return {
        name: float(np.max(np.abs(found[name] - value)) / max(float(np.max(np.abs(value))), 1e-30))
        for name, value in expected.items()
    }


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """The .json beside a file with flows.

    Raises:
        UserError: it is missing, is of something else, or of another file than the one beside it.
    """
    path = Path(path)
    inspect.check_file(path)
    found = files.read_json(path.with_suffix(".json"))
    if not isinstance(found, dict) or found.get("kind") != KIND or not {"flows", "classify", "sha256"} <= found.keys():
        raise UserError(
            f"{path.with_suffix('.json')} does not describe a file with flows. Write one with python -m tflite.flows."
        )
    if found["sha256"] != files.sha256(path):
        raise UserError(f"{path} is not the file that the .json beside it describes. Run python -m tflite.flows again.")
    return {**found, "classify": classes.check(found["classify"], path.with_suffix(".json"))}


def main(_: Sequence[str]) -> None:
    """Writes what the flags ask for."""
    values = flags.FLAGS
    output = files.user_path(values.output)
    if output.suffix != ".tflite":
        raise UserError(f"--output={values.output} must end in .tflite.")
    model = load_trained(values.checkpoint)
    layers_of(model)  # an error before the data are loaded
    image_size = model.input_shape[1:3]
    images, _labels, what = verification.checking_images(
        values.checkpoint, values.dataset, values.cache_dir, image_size, values.check_images
    )
    metadata = classes.metadata(model, classes.dataset_for(values.checkpoint, values.dataset, values.cache_dir))
    try:
        report = write(model, output, images, metadata, what)
    except ValueError as error:
        raise UserError(str(error)) from error
    worst = max(report["verification"]["max_relative_errors"].values())
    print(
        f"Wrote {output}: logits and flows of {len(report['flows'])} layers, checked on {len(images)} images ({what}): "
        f"largest error {worst:.1e} of an output's largest value (allowed {TOLERANCE:.0e}).\n"
        f"{output.with_suffix('.json').name} beside it names its outputs."
    )


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Output directory of a training run, or a .keras file.", required=True)
    flags.DEFINE_string("dataset", None, "Images to check on, and class names; without it those of the run.")
    flags.DEFINE_string("cache_dir", None, "Where downloads of --dataset are kept.")
    flags.DEFINE_integer("check_images", CHECK_IMAGES, "How many images to check on.", lower_bound=1)
    flags.DEFINE_string("output", None, "The .tflite file to write; a .json goes beside it.", required=True)
    cli.run(main)
