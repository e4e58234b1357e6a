"""What the page is told to do: the plan, the models, and the outputs that it has to reproduce."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import sha256
from tflite import results
from tflite.browser.litertjs import RUNTIME
from tflite.browser.site import File
from tflite.inspect import Description, describe
from tflite.measurements import Plan
from tflite.process import Worker

_PAGE = Path(__file__).parent / "page"
_CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript"}
_GOLDEN_TIMEOUT_SECONDS = 600
_DTYPES = ("float32", "int32", "uint8", "int8")  # what the page can hand to LiteRT.js

# How far an output may lie from the one computed here, relative to the largest value of the output computed here.
# Float32 kernels differ in the order of sums. With int8 weights or activations a sum that falls to the other side of a
# rounding step moves a value by that step, and later layers with it. GPUs compute in float16 by default.
FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.1
GPU_TOLERANCE = 0.1


@dataclass(frozen=True)
class Configuration:
    """A backend and its threads; the GPU has one "thread"."""

    backend: str
    num_threads: int

    def __str__(self) -> str:
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return self.backend if self.backend == "WebGPU" else f"{self.backend}, {threads}"


@dataclass(frozen=True)
class Job:
    """A plan made ready for the page.

    Attributes:
        plan: what was asked for.
        descriptions: one per graph.
        configurations: what each graph is measured with.
        tolerances: for each graph, the greatest `output_error` by backend.
        value: what the page reads as job.json.
        files: what it reads, by name.
        exports: for each graph what its export says of it, as `Measurements.exports`.
    """

    plan: Plan
    descriptions: tuple[Description, ...]
    configurations: tuple[Configuration, ...]
    tolerances: tuple[Mapping[str, float], ...]
    value: Mapping[str, Any]
    files: Mapping[str, File]
    exports: tuple[dict[str, Any] | None, ...]


def prepare(
    plan: Plan,
    directory: Path,
    *,
    webgpu: bool = True,
    stay: bool = False,
    classes_file: Path | None = None,
    flows_file: Path | None = None,
) -> Job:
    """Describes the graphs, computes what they must answer, and gathers the files.

    Args:
        plan: what to measure.
        directory: an empty one, for inputs, outputs and copies of the graphs, which may be exported anew while they
            are served; it has to live as long.
        webgpu: also measure with WebGPU where the phone has it.
        stay: whether the server stays after the first result.
        classes_file: the class names and preprocessing of the graphs' images, for the camera (`tflite.classes`).
        flows_file: a .tflite file that also returns attention flows (`tflite.flows`); its .json has class names too.

    Raises:
        UserError: a graph is missing, damaged or being written, a browser cannot run it, or the classes do not fit the
            first graph.
    """
    descriptions = tuple(describe(graph, 1) for graph in plan.graphs)
    for description in descriptions:
        if description.delegate_partitions is None:
            raise UserError(f"{description.path} cannot run in LiteRT.js: {description.undelegated_reason}.")
    configurations = tuple(Configuration("WASM", threads) for threads in plan.num_threads)
    if webgpu:
        configurations += (Configuration("WebGPU", 1),)
    files = page_files()
    graphs, tolerances = [], []
    for number, description in enumerate(descriptions):
        own = directory / str(number)
        own.mkdir()
        copy = _copied(plan.graphs[number], own / "model.tflite", description.sha256)
        tensors = _golden(plan, number, copy)
        for kind in ("inputs", "outputs"):
            for index, tensor in enumerate(tensors[kind]):
                tensor["url"] = f"golden/{number}/{kind}/{index}.bin"
                files[tensor["url"]] = File(Path(tensor.pop("file")), "application/octet-stream")
        url = f"models/{number}.tflite"
        files[url] = File(copy, "application/octet-stream")
        tolerances.append(_tolerances(description))
        graphs.append(
            {
                "name": plan.labels[number],
                "url": url,
                "size_bytes": description.size_bytes,
                "tolerances": tolerances[-1],
                **tensors,
                "input": tensors["inputs"][0],
                "output": tensors["outputs"][0],
            }
        )
    value = {
        "runtime": RUNTIME,
        "graphs": graphs,
        "configurations": [
            {"backend": one.backend, "num_threads": one.num_threads, "name": str(one)} for one in configurations
        ],
        "rounds": list(plan.rounds),
        "warmup": plan.warmup,
        "cooldown_seconds": plan.cooldown_seconds,
        "stay": stay,
        **_camera(descriptions[0], classes_file, flows_file, files, directory),
    }
    files["job.json"] = File(json.dumps(value).encode(), "application/json")
    exports = tuple(results.read_export(description) for description in descriptions)
    return Job(plan, descriptions, configurations, tuple(tolerances), value, files, exports)


def _copied(path: Path, copy: Path, digest: str) -> Path:
    """Copies the file, which must have this SHA-256. No link: it would follow a file that is written in place."""
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise UserError(f"{path} cannot be copied to {copy.parent}: {error.strerror or error}.") from error
    if sha256(copy) != digest:
        raise UserError(f"{path} has changed while it was read. Wait until it is written and run the command again.")
    return copy


def _camera(
    description: Description,
    classes_file: Path | None,
    flows_file: Path | None,
    files: dict[str, File],
    directory: Path,
) -> dict[str, Any]:
    """What the page needs to classify photos: None, None without class names. Adds the flows' file to `files`."""
    if not classes_file and not flows_file:
        return {"classify": None, "flows": None}
    from tflite import classes, flows  # TensorFlow, which the benchmark alone does without

    sidecar = flows.read_sidecar(flows_file) if flows_file else None
    metadata = classes.read(classes_file) if classes_file else (sidecar or {})["classify"]
    served = None
    if flows_file and sidecar:
        copy = _copied(flows_file, directory / "flows.tflite", sidecar["sha256"])
        files["flows.tflite"] = File(copy, "application/octet-stream")
        size = sidecar["classify"]["image_size"]
        served = {"url": "flows.tflite", "flows": sidecar["flows"], "image_size": size}
    return {"classify": classes.for_graph(metadata, description), "flows": served}


def page_files() -> dict[str, File]:
    """The page's own files by name; "" is the page."""
    files = {
        path.name: File(path, _CONTENT_TYPES[path.suffix])
        for path in _PAGE.iterdir()
        if path.is_file() and path.suffix in _CONTENT_TYPES and not path.name.startswith(".")  # no .DS_Store, ._app.js
    }
    return {**files, "": files["index.html"]}


def _golden(plan: Plan, number: int, copy: Path) -> dict[str, Any]:
    path = plan.graphs[number]
    with Worker(str(path), module="tflite.browser.golden") as worker:
        tensors: dict[str, Any] = worker.request(
            "compute",
            timeout_seconds=_GOLDEN_TIMEOUT_SECONDS,
            path=str(copy.absolute()),
            inputs=[str(file.absolute()) for file in plan.inputs] if plan.inputs else None,
            seed=plan.seed,
            directory=str(copy.parent.absolute()),
        )
    for tensor in tensors["inputs"] + tensors["outputs"]:
        if tensor["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: {tensor['name']} is {tensor['dtype']}; in the browser inputs and outputs are "
                f"{', '.join(_DTYPES)}."
            )
    return tensors


def _tolerances(description: Description) -> dict[str, float]:
    quantized = "int8" in description.weight_bytes or "int4" in description.weight_bytes
    wasm = QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE
    return {"WASM": wasm, "WebGPU": max(wasm, GPU_TOLERANCE)}
