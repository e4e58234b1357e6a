"""Times a Core ML package on this Mac or on an iPhone attached to it, with coremltools' own benchmark utilities.

python -m coreml.device X.mlpackage [--device_name=NAME --development_team=TEAM] [--iterations=N] [--json=PATH]

Without --device_name the model runs on the Mac itself. With it, coremltools builds its ModelRunner application with
Xcode, installs it on the iPhone and asks it for every prediction; the seconds are those measured on the phone around
Core ML's prediction, without the transfer. Each request takes seconds all the same, so the phone rests between two
predictions and its clock may drop: for latency under load use the application in coreml/ios.
"""

import asyncio
import dataclasses
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError, first_line

COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")  # names in coremltools.ComputeUnit
_SEED = 0  # of the noise image; latency does not depend on the pixels, but the same input is easier to compare


@dataclasses.dataclass(frozen=True)
class Latency:
    """Durations in seconds, in the order measured; p90 is linearly interpolated, as in tflite.measurements."""

    median_seconds: float
    p90_seconds: float
    samples_seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """One choice of compute units.

    Attributes:
        compute_units: name in `coremltools.ComputeUnit`.
        load: loading the compiled model; the first sample may include its preparation for the device.
        prediction: one inference each, after one that is not counted; None if the model did not run.
        error: what Core ML or the device said, else None.
    """

    compute_units: str
    load: Latency | None
    prediction: Latency | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What the command writes.

    Attributes:
        package: the measured file.
        device: name of the iPhone, or "this Mac".
        os_version: of the iPhone or the Mac.
        input: "image", or "multi array" where the image input was replaced, see `with_tensor_inputs`.
        results: one entry for each of `COMPUTE_UNITS`.
    """

    package: str
    device: str
    os_version: str
    input: str
    results: tuple[Result, ...]


def measure(
    path: Path,
    device_name: str | None = None,
    development_team: str | None = None,
    bundle_identifier: str | None = None,
    iterations: int = 20,
    load_iterations: int = 3,
) -> Report:
    """Measures load and prediction for every choice of compute units.

    Args:
        path: an .mlpackage.
        device_name: of a connected iPhone, as Xcode shows it; None measures on this Mac.
        development_team: identifier of the Apple Developer team that signs the ModelRunner application.
        bundle_identifier: of that application; needed where the team may not use coremltools' own.
        iterations: predictions per choice, after one that is not counted.
        load_iterations: loads per choice.

    Raises:
        UserError: this is not a Mac, the package or the iPhone is missing, or the application cannot be built.
    """
    if platform.system() != "Darwin":
        raise UserError(
            "Core ML runs only on Apple devices: use this command on a Mac with coremltools 9, and with Xcode and an"
            " attached iPhone for --device_name."
        )
    if not path.exists():
        raise UserError(f"There is no package {path}. Export a model first, or check the name.")
    return asyncio.run(
        _measure(path, device_name, development_team, bundle_identifier, iterations, load_iterations),
    )


def summarize(samples_milliseconds: Sequence[float]) -> Latency:
    """Median and p90, in seconds, of coremltools' samples, which are in milliseconds."""
    samples = tuple(sample / 1e3 for sample in samples_milliseconds)
    return Latency(statistics.median(samples), float(np.percentile(samples, 90)), samples)


def with_tensor_inputs(spec: Any) -> bool:
    """Declares the image inputs of an ML Program as float32 multi arrays [1, channels, height, width], in place.

    coremltools' ModelRunner application passes only multi arrays to a model. The program itself is the same: its image
    input already is a float32 tensor, only the conversion of the pixel buffer, done by Core ML before it, falls away.

    Args:
        spec: protocol buffer of the model, as from `MLModel.get_spec()`.

    Returns:
        Whether there was an image input.
    """
    from coremltools import proto

    images = [feature for feature in spec.description.input if feature.type.WhichOneof("Type") == "imageType"]
    for feature in images:
        image = feature.type.imageType
        channels = 3 if image.colorSpace in (image.RGB, image.BGR) else 1
        shape = (1, channels, image.height, image.width)
        array = feature.type.multiArrayType  # choosing it drops imageType
        array.shape.extend(shape)
        array.dataType = proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    return bool(images)


def noise_inputs(spec: Any) -> dict[str, Any]:
    """A random value from 0 to 255 for each input: a PIL image or a float32 array, whichever the model declares.

    Raises:
        UserError: an input is neither an RGB image nor a multi array.
    """
    from PIL import Image

    generator = np.random.default_rng(_SEED)
    inputs: dict[str, Any] = {}
    for feature in spec.description.input:
        kind = feature.type.WhichOneof("Type")
        image = feature.type.imageType
        if kind == "imageType" and image.colorSpace in (image.RGB, image.BGR):
            pixels = generator.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
            inputs[feature.name] = Image.fromarray(pixels)
        elif kind == "multiArrayType":
            shape = tuple(feature.type.multiArrayType.shape)
            inputs[feature.name] = generator.uniform(0, 255, shape).astype(np.float32)
        else:
            raise UserError(f"The input {feature.name} is neither an RGB image nor a multi array; it cannot be filled.")
    return inputs


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values, ready for `json.dumps`."""
    return dataclasses.asdict(report)


def format_table(report: Report) -> str:
    """The report as fixed-width text, in milliseconds."""
    lines = [
        f"{report.package} on {report.device}, version {report.os_version}, input as {report.input}; milliseconds",
        f"{'compute units':<14}{'load':>10}{'median':>10}{'p90':>10}",
    ]
    for result in report.results:
        if result.load is None or result.prediction is None:
            lines.append(f"{result.compute_units:<14}  failed: {result.error}")
            continue
        durations = (result.load.median_seconds, result.prediction.median_seconds, result.prediction.p90_seconds)
        lines.append(f"{result.compute_units:<14}" + "".join(f"{1e3 * duration:>10.3f}" for duration in durations))
    return "\n".join(lines)


async def _measure(
    path: Path,
    device_name: str | None,
    development_team: str | None,
    bundle_identifier: str | None,
    iterations: int,
    load_iterations: int,
) -> Report:
    from coremltools.models import MLModel

    try:
        model = MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        weights_directory = model.weights_dir
    except Exception as error:  # coremltools raises whatever its reader meets
        raise UserError(f"{path} cannot be read as a Core ML package: {first_line(error)}") from error

    device = None
    replaced = False
    if device_name is not None:
        device = await _prepare(device_name, development_team, bundle_identifier)
        replaced = with_tensor_inputs(spec)
    inputs = noise_inputs(spec)
    results = [
        await _measure_units(name, spec, weights_directory, device, inputs, iterations, load_iterations)
        for name in COMPUTE_UNITS
    ]
    has_image = any(feature.type.WhichOneof("Type") == "imageType" for feature in spec.description.input)
    return Report(
        package=str(path),
        device="this Mac" if device is None else device.name,
        os_version=platform.mac_ver()[0] if device is None else device.os_version,
        input="multi array" if replaced or not has_image else "image",
        results=tuple(results),
    )


async def _prepare(device_name: str, development_team: str | None, bundle_identifier: str | None) -> Any:
    """The connected iPhone with coremltools' ModelRunner application built, installed and running on it."""
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceType

    try:
        devices = Device.get_connected_devices(DeviceType.IPHONE)
    except Exception as error:  # a missing devicectl, or whatever it printed
        raise UserError(f"The attached devices cannot be listed: {first_line(error)}") from error
    named = [device for device in devices if device.name == device_name]
    if not named:
        names = ", ".join(device.name for device in devices) or "none"
        raise UserError(
            f"No connected iPhone is named {device_name}; connected: {names}. Attach and unlock it, switch on its"
            " Developer Mode, and see `xcrun devicectl list devices`."
        )
    credentials = AppSigningCredentials(development_team=development_team or "", bundle_identifier=bundle_identifier)
    try:
        return await named[0].prepare_for_model_debugging(credentials=credentials)
    except Exception as error:  # Xcode's and devicectl's failures come as several types
        raise UserError(
            f"coremltools cannot build or start its ModelRunner application on {device_name}: {first_line(error)}"
            " Check --development_team and --bundle_identifier, and that Xcode can sign for this iPhone."
        ) from error


async def _measure_units(
    name: str,
    spec: Any,
    weights_directory: str,
    device: Any,
    inputs: dict[str, Any],
    iterations: int,
    load_iterations: int,
) -> Result:
    from coremltools import ComputeUnit
    from coremltools.models import MLModel
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    load = prediction = None
    try:
        # The benchmarker loads the model itself; here it only learns what to load.
        model = MLModel(spec, weights_dir=weights_directory, compute_units=ComputeUnit[name], skip_model_load=True)
        benchmarker = MLModelBenchmarker(model=model, device=device)
        load = summarize((await benchmarker.benchmark_load(iterations=load_iterations)).samples)
        measurement = await benchmarker.benchmark_predict(inputs=inputs, iterations=iterations, warmup=True)
        prediction = summarize(measurement.samples)
    except Exception as error:  # one choice that fails, say on a Mac without a Neural Engine, must not end the others
        return Result(name, load, None, first_line(error))
    return Result(name, load, prediction, None)


def define_flags() -> None:
    """The command line's flags; a function, because several commands share their names."""
    flags.DEFINE_string("device_name", None, "A connected iPhone, named as in Xcode; without it this Mac is measured.")
    flags.DEFINE_string("development_team", None, "Apple Developer team that signs the application for the iPhone.")
    flags.DEFINE_string("bundle_identifier", None, "Of that application, where coremltools' own is taken.")
    flags.DEFINE_integer("iterations", 20, "Predictions per choice of compute units.", lower_bound=1)
    flags.DEFINE_integer("load_iterations", 3, "Loads per choice of compute units.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the JSON; without it the JSON is written beside the package.")


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    package = files.user_path(argv[1])
    report = measure(
        package,
        values.device_name,
        values.development_team,
        values.bundle_identifier,
        values.iterations,
        values.load_iterations,
    )
    target = files.user_path(values.json) if values.json else package.with_suffix(".device.json")
    files.write_json(target, to_json(report))
    print(format_table(report))
    print(f"written to {target}")


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=("PACKAGE",))
