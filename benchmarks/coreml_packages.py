"""Core ML packages of trained models in every variant, and of full-size models beside coremltools' own conversion.

PYTHONPATH=. python benchmarks/coreml_packages.py

Takes the models that benchmarks/quantization.py trained, exports each in every variant (coreml.compare) and compares
all packages on Fashion-MNIST test images. Then converts full-size models with random weights twice, with coreml.convert
and with coremltools from the TensorFlow graph, and runs both packages in the interpreter. Everything that was done is
kept: a second call goes on from there. `--render` only rewrites the tables in docs/coreml.md from docs/coreml.json.
"""

import collections
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.model_table import put_into
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "coreml.json"

TRAINED = {
    "deit_28": "DeiT, 16 tokens",
    "deit_98": "DeiT, 196 tokens",
    "pvt_v2_32": "PVTv2, 64 to 1 tokens",
    "efficientformer_v2_32": "EfficientFormerV2, 4 tokens",
}
# Title: family, variant, further arguments, and whether the weights are drawn as PyTorch draws them by default. With
# those and the few wide heads of the host, Mobile-Attention's output is large, and so is the residual stream.
FULL_SIZE: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "DeiT tiny": ("deit", "tiny", {}, False),
    "DeiT tiny, 3 heads, PyTorch's weights": ("deit", "tiny", {"num_heads": 3}, True),
    "PVTv2 b0": ("pvt_v2", "b0", {}, False),
    "EfficientFormerV2 s0": ("efficientformer_v2", "s0", {}, False),
}
_IMAGES = 4  # photographs on which full-size packages are compared
_MODES = ("float32", "typed", "float16")


def trained(name: str, models: Path, output: Path, images: int) -> dict[str, Any]:
    """The comparison of all variants of one trained model.

    Raises:
        UserError: benchmarks/quantization.py has not trained it.
    """
    from coreml.compare import compare
    from mobiatt_tf import verification
    from mobiatt_tf.models import load_trained

    if not (models / name / "qat" / "train").is_dir():
        raise UserError(f"There is no trained model {models / name}. Run benchmarks/quantization.py first.")
    checkpoint = models / name / "float"
    dataset = verification.dataset_of(checkpoint, None, None)  # type: ignore[arg-type]
    quantized = load_trained(models / name / "qat" / "train")
    return compare(load_trained(checkpoint), dataset, output / name, quantized, images, progress=True)


def full_size(family: str, variant: str, arguments: dict[str, Any], pytorch: bool) -> dict[str, Any]:
    """Our package and coremltools' own of one model with random weights, both float16 for iOS 15."""
    import keras

    import keras_models
    from coreml import convert, package
    from mobiatt_tf import verification

    keras.utils.set_random_seed(0)
    model = keras_models.FAMILIES[family].build(variant, **arguments)
    if pytorch:
        draw_as_pytorch(model)
    images = verification.photographs(model.input_shape[1:3], _IMAGES)
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        own, plain = Path(directory) / "own.mlpackage", Path(directory) / "plain.mlpackage"
        convert.save(convert.convert(model, images, 15, "float16"), own, 15)
        plain_convert(model, plain)
        for name, path in (("coreml.export", own), ("coremltools", plain)):
            rows[name] = described(package.read(path), model, images)
    return rows


def draw_as_pytorch(model: Any) -> None:
    """Draws the dense layers of a transformer within 1 / sqrt(fan-in), as torch.nn.Linear.reset_parameters does."""
    import numpy as np

    generator = np.random.default_rng(0)
    for layer in model.layers:
        for child in ("query", "key", "value", "out", "fc1", "fc2"):
            dense = getattr(layer, child, None)
            if dense is not None:
                limit = dense.kernel.shape[0] ** -0.5
                for weight in (dense.kernel, dense.bias):
                    weight.assign(generator.uniform(-limit, limit, weight.shape))


def plain_convert(model: Any, path: Path) -> None:
    """What a user gets who gives the Keras model's TensorFlow graph to coremltools."""
    import tensorflow as tf

    from coreml.tools import coremltools, quiet, target
    from mobiatt_tf.models import rebuild

    ct = coremltools()
    copy = rebuild(model, batch_size=1)
    specification = tf.TensorSpec(copy.input_shape, tf.float32, name="images")
    function = tf.function(lambda images: copy(images, training=False)).get_concrete_function(specification)
    with quiet():
        converted = ct.convert(
            [function],
            source="tensorflow",
            convert_to="mlprogram",
            minimum_deployment_target=target(15),
            skip_model_load=True,
        )
        converted.save(str(path))


def described(found: Any, model: Any, images: Any) -> dict[str, Any]:
    """Operators of a package, and its error against the Keras model in every mode."""
    import numpy as np

    from coreml import lint, verify
    from coreml.interpreter import Interpreter
    from mobiatt_tf.verification import keras_logits

    pixels = verify.as_pixels(images)
    expected = keras_logits(model, verify.from_pixels(pixels))
    counts = collections.Counter(
        operation.type
        for operation in found.operations
        if operation.type not in ("const", "classify") and not operation.type.startswith("constexpr")
    )
    errors = {}
    for mode in _MODES:
        logits = Interpreter(found, mode).logits(pixels)
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        errors[mode] = error if np.isfinite(error) else None
        constant = bool(np.ptp(logits, axis=0).max() == 0)
    return {
        "operators": sum(counts.values()),
        "transposes": counts["transpose"],
        "size_bytes": found.size_bytes,
        "errors": errors,
        "constant_in_float16": constant,
        "findings": {finding.rule: len(finding.operators) for finding in lint.lint(found)},
    }


def variants_table(results: dict[str, Any]) -> str:
    """Size, error and accuracy of every variant of every trained model, as Markdown."""
    lines = [
        "| model | package | iOS | size | of float32 | error | same class | top-1 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results["trained"].items():
        reference = found["rows"]["float32"]["size_bytes"]
        for variant, row in found["rows"].items():
            lines.append(
                f"| {TRAINED[name]} | {variant} | {row['ios']} | {row['size_bytes'] / 1e6:.2f} MB "
                f"| {row['size_bytes'] / reference:.2f} | {row['max_relative_error']:.0e} "
                f"| {100 * row['agreement']:.1f} % | {100 * row['top1']:.1f} % |"
            )
        for variant in found["refused"]:
            lines.append(f"| {TRAINED[name]} | {variant} | refused | | | | | |")
    return "\n".join(lines)


def conversions_table(results: dict[str, Any]) -> str:
    """Both conversions of every full-size model, as Markdown."""
    lines = [
        "| model at 224 x 224 | converted by | operators | transposes | float32 | typed float16 | pure float16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, rows in results["full_size"].items():
        for converter, row in rows.items():
            errors = ["NaN" if row["errors"][mode] is None else f"{row['errors'][mode]:.0e}" for mode in _MODES]
            if row["constant_in_float16"]:
                errors[-1] += ", constant logits"
            lines.append(f"| {title} | {converter} | {row['operators']} | {row['transposes']} | {' | '.join(errors)} |")
    return "\n".join(lines)


def render(results: dict[str, Any]) -> None:
    """Rewrites the tables of the documentation."""
    document = ROOT / "docs" / "coreml.md"
    put_into(document, variants_table(results), "variants table")
    put_into(document, conversions_table(results), "conversions table")


def draw(results: dict[str, Any], path: Path) -> None:
    """Size and error of every variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    variants = list(next(iter(results["trained"].values()))["rows"])
    for offset, (name, found) in enumerate(results["trained"].items()):
        places = [index + 0.2 * offset for index in range(len(variants))]
        rows = [found["rows"].get(variant) for variant in variants]
        reference = found["rows"]["float32"]["size_bytes"]
        sizes.bar(places, [row["size_bytes"] / reference if row else 0 for row in rows], 0.18, label=TRAINED[name])
        errors.bar(places, [row["max_relative_error"] if row else 0 for row in rows], 0.18)
    sizes.set_ylabel("size, float32 = 1")
    sizes.legend(fontsize=8)
    errors.set_yscale("log")
    errors.set_ylabel("largest error of logits / max|logit|")
    for axes in (sizes, errors):
        axes.set_xticks([index + 0.3 for index in range(len(variants))], variants, fontsize=8)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(_: Sequence[str]) -> None:
    """Does what is missing, then writes JSON, tables and picture."""
    values = flags.FLAGS
    if values.render:
        render(files.read_json(RESULTS))
        print("docs/coreml.md has the tables of docs/coreml.json.")
        return
    output = files.user_path(values.output_dir)
    file = output / "coreml.json"
    results = files.read_json(file) if file.is_file() else {"trained": {}, "full_size": {}}
    for title, (family, variant, arguments, pytorch) in FULL_SIZE.items():
        if title not in results["full_size"]:
            print(f"{title} ...", flush=True)
            results["full_size"][title] = full_size(family, variant, arguments, pytorch)
            files.write_json(file, results)
    for name in TRAINED:
        if name not in results["trained"]:
            print(f"{TRAINED[name]} ...", flush=True)
            results["trained"][name] = trained(name, files.user_path(values.models), output, values.images)
            files.write_json(file, results)
    results["trained"] = {name: results["trained"][name] for name in TRAINED}  # in this order, whatever came first
    files.write_json(file, results)
    draw(results, output / "coreml.png")
    print(f"{variants_table(results)}\n\n{conversions_table(results)}\n\nwritten: {file}, {output / 'coreml.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("models", "runs/quantization", "Output directory of benchmarks/quantization.py.")
    flags.DEFINE_integer("images", 1000, "Test images for each trained model.", lower_bound=1)
    flags.DEFINE_bool("render", False, "Only rewrite the tables in docs/coreml.md from docs/coreml.json.")
    flags.DEFINE_string("output_dir", "runs/coreml_benchmark", "Gets coreml.json, coreml.png and all packages.")
    cli.run(main)
