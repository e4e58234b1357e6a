"""What imports what: the arrows between the packages, the ban on Keras 2, and what `import keras_models` costs."""

import ast
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("mobiatt_tf", "keras_models", "tflite", "coreml", "tools", "benchmarks", "tests")

# From the design: train_tpu_gpu.py, tflite/ and coreml/ -> keras_models/ -> mobiatt_tf/, and never back.
FORBIDDEN_IMPORTS = {
    "mobiatt_tf": {"keras_models", "tflite", "coreml", "train_tpu_gpu", "tools", "tests"},
    "keras_models": {"tflite", "coreml", "train_tpu_gpu", "tools", "tests"},
    "tflite": {"coreml", "train_tpu_gpu", "tools", "tests"},
    "coreml": {"tflite", "train_tpu_gpu", "tools", "tests"},
}
# The one arrow back, inside functions only: one command runs every format on one dataset (python -m
# mobiatt_tf.training.evaluate), and how a file or package is read, or a model resized, must not stand in two places.
EXCEPTIONS = {"mobiatt_tf/training/graphs.py": {"tflite", "coreml", "keras_models"}}

HEAVY_PACKAGES = {
    "coremltools",
    "cryptography",
    "faster_coco_eval",
    "keras_hub",
    "onnx",
    "onnxruntime",
    "safetensors",
    "segno",
    "skimage",
    "tensorflow_datasets",
    "tensorflow_model_optimization",
    "tf2onnx",
    "tf_keras",
    "timm",
    "torch",
}
# Keras 3.15 itself imports these two where they are installed (about 1.5 s); this project's modules must not add to it.
LOADED_BY_KERAS = {"matplotlib", "sklearn"}
IMPORT_SECONDS = 6.0


def python_files() -> list[Path]:
    files = [file for folder in SOURCE_FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *files])


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """The full names of all modules that `import` and `from` statements name, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses_keras_2(tree: ast.AST) -> bool:
    """True for the attribute `keras` of tensorflow (under either name) and for every import of it or of tf_keras."""
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    if any(n.attr == "keras" and n.value.id in ("tf", "tensorflow") for n in attributes):
        return True
    return any(name.startswith(("tensorflow.keras", "tf_keras")) for name in imported_modules(tree))


@pytest.mark.parametrize("package", FORBIDDEN_IMPORTS)
def test_imports_run_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {name.split(".")[0] for name in imported_modules(tree)}
        excepted = EXCEPTIONS.get(str(file.relative_to(ROOT)), set())
        wrong = imported & FORBIDDEN_IMPORTS[package] - excepted
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}, which stand above {package}"


def test_exceptions_are_needed_and_load_nothing_with_the_module():
    for name, excepted in EXCEPTIONS.items():
        tree = ast.parse((ROOT / name).read_text())
        assert excepted <= {module.split(".")[0] for module in imported_modules(tree)}
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        outside = [node for node in tree.body if not isinstance(node, functions)]
        at_import = {module.split(".")[0] for node in outside for module in imported_modules(node)}
        assert not excepted & at_import, f"{name} imports {sorted(excepted & at_import)} outside of a function"


def test_every_import_is_absolute():
    for file in python_files():
        relative = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, f"{file.relative_to(ROOT)}:{relative[0].lineno} is a relative import"


def test_keras_2_is_nowhere():
    files = python_files()
    assert ROOT / "mobiatt_tf" / "ops.py" in files
    assert [str(file.relative_to(ROOT)) for file in files if uses_keras_2(ast.parse(file.read_text()))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import tensorflow as tf\nlayer = tf" + ".keras.layers.Dense(1)",
        "from tensorflow import keras",
        "from tensorflow" + ".keras import layers",
        "def later():\n    import tf_keras",
    ],
)
def test_keras_2_would_be_found(source):
    assert uses_keras_2(ast.parse(source))
    assert not uses_keras_2(ast.parse("import keras\nfrom keras import ops\nkeras.layers.Dense(1)"))


def import_in_a_fresh_process(module: str) -> tuple[float, set[str]]:
    """Seconds from the start of Python to its end, and the top-level packages that were loaded.

    The seconds are the clock's or the processor's, whichever is less: a warm import is one busy thread, so on an idle
    machine they are equal, and on a busy one the processor's are what the import itself costs. JAX, which TensorFlow
    imports where it is installed (0.6 s), is hidden: it is in requirements-dev.txt only, for the tests.
    """
    program = (
        f"import json, sys; sys.modules['jax'] = None; import {module}\n"
        "print(json.dumps(sorted({name.split('.')[0] for name, loaded in sys.modules.items() if loaded})))"
    )
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return min(clock, processor), set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_import_keras_models_is_quick_and_light():
    seconds = []
    for _attempt in range(5):  # the first may read TensorFlow from disk; later ones meet what else the machine does
        elapsed, loaded = import_in_a_fresh_process("keras_models")
        assert "tensorflow" in loaded
        assert not loaded & HEAVY_PACKAGES
        seconds.append(elapsed)
        if elapsed < IMPORT_SECONDS:
            break
    assert min(seconds) < IMPORT_SECONDS, (
        f"import keras_models took {seconds} seconds; where the environment holds no .pyc files it takes 15"
    )


@pytest.mark.slow
def test_import_keras_models_loads_little_more_than_keras():
    _seconds, loaded = import_in_a_fresh_process("keras_models")
    _seconds, loaded_by_keras = import_in_a_fresh_process("keras")
    assert "keras_models" in loaded - loaded_by_keras
    assert not (loaded - loaded_by_keras) & (HEAVY_PACKAGES | LOADED_BY_KERAS)


@pytest.mark.parametrize("name", ["tensorflow_model_optimization", "tf_keras", *sorted(LOADED_BY_KERAS)])
def test_heavy_packages_are_there_to_be_avoided(name):
    """The tests above would pass on any code if nothing heavy were installed."""
    assert importlib.util.find_spec(name) is not None
