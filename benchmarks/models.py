"""Latency of whole models against other ways of running them, in one interleaved run for each model and image size.

PYTHONPATH=. python benchmarks/models.py --models=deit/tiny --image_sizes=224,512

The peers: timm's softmax host and the same host with the published Mobile-Attention module, through litert-torch,
PyTorch (eager and torch.compile), onnxruntime and executorch, all with this project's weights; a peer whose logits are
not those of the Keras model is not timed. The floor is a graph of the model's dense layers and convolutions alone. Each
peer's packages are installed once, pinned, under runs/peers (several GB; see benchmarks/peers/requirements-*.txt about
PyTorch's size); what cannot be installed or converted is left out, with its reason in the report. Ratios are paired by
round and refer to litert-torch's softmax host in float32. Writes JSON after each model and size (a second call with the
same flags goes on from there), a PNG and Markdown tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.peers import environment, measurement, programs, report
from benchmarks.peers.preparation import Preparation
from mobiatt_tf import cli, files
from mobiatt_tf.errors import UserError
from tflite.host import describe_host

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "peers.json"
FORMATS = ("float32", "dynamic", "int8")
SOFTMAX = "softmax"


def networks(head_dims: list[int]) -> dict[str, int | None]:
    """Name -> channels of a head of Mobile-Attention; None is the softmax host."""
    return {SOFTMAX: None, **{f"mobile d={head_dim}": head_dim for head_dim in head_dims}}


def case(model: str, image_size: int, settings: dict[str, Any], output: Path, environments: Path) -> dict[str, Any]:
    """Everything about one model at one image size, as the report has it.

    Raises:
        UserError: there is no such model, or a process ended in the middle of the run.
    """
    family, variant = model.split("/")
    wanted = networks(settings["head_dims"])
    directory = output / "files" / f"{family}-{variant}-{image_size}"
    preparation = Preparation(family, variant, image_size, directory, environments)
    variants = programs.variants(list(wanted), settings["formats"], settings["peers"])
    prepared = preparation.prepare(variants, wanted)
    rows, unloaded = measurement.measure(prepared, preparation.images, settings["num_threads"], settings["runs"])
    skipped = [
        {"program": one.program, "network": one.network, "format": one.format, "num_threads": threads, "reason": reason}
        for (one, threads), reason in [
            *(((one, None), reason) for one, reason in preparation.skipped.items()),
            *unloaded.items(),
        ]
    ]
    return {
        "model": model,
        "image_size": image_size,
        "settings": settings,
        "device": describe_host(),
        "converters": {
            name: environment.versions(program.converter[0] if program.converter else "pytorch", program.packages)
            for name, program in programs.PROGRAMS.items()
            if program.packages and program.peer in settings["peers"]
        },
        "rows": measurement.to_json(rows),
        "skipped": skipped,
    }


def main(_: Sequence[str]) -> None:
    """Measures what is missing, then writes tables and picture."""
    import keras_models

    values = flags.FLAGS
    if values.render:
        from benchmarks.model_table import put_into

        cases = list(files.read_json(RESULTS)["cases"].values())
        put_into(ROOT / "docs" / "performance.md", report.summary(cases), "peers")
        return
    known = [f"{name}/{variant}" for name, family in keras_models.FAMILIES.items() for variant in family.variants]
    settings = {
        "formats": _chosen("formats", FORMATS),
        "num_threads": _numbers("num_threads"),
        "head_dims": _numbers("head_dims"),
        "runs": values.runs,
        "peers": [] if values.peers == ["none"] else _chosen("peers", programs.PEERS),
    }
    models, sizes = _chosen("models", known), _numbers("image_sizes")
    output, environments = files.user_path(values.output_dir), files.user_path(values.environments)
    file = output / "models.json"
    results = files.read_json(file) if file.is_file() else {"cases": {}}
    names = []
    for model in models:
        for size in sizes:
            names.append(f"{model} {size}")
            if results["cases"].get(names[-1], {}).get("settings") == settings:
                print(f"{names[-1]}: measured before, {file}")
                continue
            print(f"{names[-1]} ...", flush=True)
            results["cases"][names[-1]] = case(model, size, settings, output, environments)
            files.write_json(file, results)
    chosen = [results["cases"][name] for name in names]
    print("\n\n".join(report.table(one) for one in chosen))
    report.draw(chosen, output / "models.png")
    print(f"\nwritten: {file}, {output / 'models.png'}")


def _chosen(name: str, allowed: Sequence[str]) -> list[str]:
    given = list(dict.fromkeys(getattr(flags.FLAGS, name)))
    if not given or set(given) - set(allowed):
        raise UserError(f"--{name}={','.join(given)} is not possible. Choose from {', '.join(allowed)}.")
    return given


def _numbers(name: str) -> list[int]:
    given = list(dict.fromkeys(getattr(flags.FLAGS, name)))
    if not given or not all(text.isdecimal() and int(text) for text in given):
        raise UserError(f"--{name}={','.join(given)} is not a list of numbers; give it as in --{name}=1,2.")
    return [int(text) for text in given]


if __name__ == "__main__":
    flags.DEFINE_list("models", ["deit/tiny"], "FAMILY/VARIANT, comma separated.")
    flags.DEFINE_list("image_sizes", ["224", "512"], "Sides in pixels.")
    flags.DEFINE_list("formats", list(FORMATS), "Precisions: " + ", ".join(FORMATS) + ".")
    flags.DEFINE_list("num_threads", ["1", "2"], "Numbers of threads.")
    flags.DEFINE_list("head_dims", ["8"], "Channels of a head of Mobile-Attention.")
    flags.DEFINE_integer("runs", 30, "Recorded runs of each row.", lower_bound=1)
    flags.DEFINE_list("peers", list(programs.PEERS), f"Who else is measured: {', '.join(programs.PEERS)}; or none.")
    flags.DEFINE_bool("render", False, "Only rewrite the table in docs/performance.md from docs/peers.json.")
    flags.DEFINE_string("output_dir", "runs/models_benchmark", "Gets models.json, models.png and all files.")
    flags.DEFINE_string("environments", "runs/peers", "Gets the peers' environments.")
    cli.run(main)
