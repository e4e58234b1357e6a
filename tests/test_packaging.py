"""`pip install .` gives every package and the training program; version and requirements are told once."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import mobiatt_tf

ROOT = Path(__file__).resolve().parent.parent


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def normalized(requirement: str) -> str:
    """The project's name in a requirement line, as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0]).lower()


def pins(name: str) -> dict[str, str]:
    """Project name to exact version, with the files that `-r` names."""
    result: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            result |= pins(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9-]+==[A-Za-z0-9.]+", line), f"{name}: {line!r} is not an exact pin"
            project, version = line.split("==")
            result[normalized(project)] = version
    return result


def expected_modules() -> set[str]:
    """The Python files of the packages and the training program, relative to the root."""
    folders = [ROOT / name for name in ("mobiatt_tf", "keras_models", "tflite", "coreml")]
    return {str(file.relative_to(ROOT)) for folder in folders for file in folder.rglob("*.py")} | {"train_tpu_gpu.py"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install .` puts into an empty directory, built from a copy: setuptools writes build/."""
    source = tmp_path_factory.mktemp("source") / "a b"
    target = tmp_path_factory.mktemp("installed")
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", "bazel-*", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
    ]
    result = subprocess.run(
        [*command, "--quiet", "--target", target, "."],
        cwd=source,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.slow
def test_install_holds_every_module_and_nothing_else(installed):
    modules = {str(file.relative_to(installed)) for file in installed.rglob("*.py")}
    assert modules == expected_modules()


@pytest.mark.slow
def test_installed_packages_import_from_the_installation(installed, tmp_path):
    program = (
        "import keras_models, mobiatt_tf, tflite.benchmark, tflite.inspect, train_tpu_gpu\n"
        "for module in (keras_models, mobiatt_tf, tflite, train_tpu_gpu): print(module.__file__)\n"
        "from importlib.metadata import version\n"
        "print(version('mobiatt-tf'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *paths, installed_version = result.stdout.splitlines()
    assert len(paths) == 4
    assert all(Path(path).is_relative_to(installed) for path in paths)
    assert installed_version == mobiatt_tf.__version__


def test_version_is_told_once():
    assert setup_cfg()["metadata"]["version"] == "attr: mobiatt_tf.__version__"
    assert f"## {mobiatt_tf.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact_and_name_no_index(name):
    assert pins(name)
    assert "://" not in (ROOT / name).read_text()


def test_pins_cover_what_setup_cfg_asks_for():
    parser = setup_cfg()
    needed = {normalized(line) for line in parser["options"]["install_requires"].split("\n") if line}
    tools = {normalized(line) for line in parser["options.extras_require"]["dev"].split("\n") if line}
    assert len(needed) > 5
    assert len(tools) > 3
    assert needed <= set(pins("requirements.txt"))
    assert tools <= set(pins("requirements-dev.txt"))


def test_the_pins_are_what_these_tests_run_with():
    tested = ("tensorflow", "keras", "ai-edge-litert", "numpy", "pillow", "pytest", "jax")
    assert {name: version(name) for name in tested} == {name: pins("requirements-dev.txt")[name] for name in tested}


def test_no_requirement_shadows_a_folder_of_this_project():
    """A project named tflite or coreml would be imported in place of the folder, or the other way round."""
    assert not {"tflite", "coreml", "keras-models", "tools", "tests"} & set(pins("requirements-dev.txt"))


def run_script(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def test_make_venv_without_python_is_one_line(tmp_path):
    venv = tmp_path / "venv"
    result = run_script("tools/make_venv.sh", "no-such-python", venv, "requirements.txt", PATH=os.environ["PATH"])
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "sudo apt-get install python3.11 python3.11-venv" in result.stderr
    assert not venv.exists()


@pytest.mark.slow
def test_make_venv_installs_once_and_mends_what_was_interrupted(tmp_path):
    """With requirements that name no package, so that it needs no network."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("--no-index\n")

    def make() -> str:
        command = [str(ROOT / "tools/make_venv.sh"), "python3.11", ".venv", "requirements.txt"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return result.stdout

    assert "Creating .venv" in make()
    assert make() == ""
    requirements.write_text("--no-index\n# changed\n")
    changed = make()
    assert "Installing" in changed
    assert "Creating" not in changed
    (tmp_path / ".venv" / "unfinished").touch()  # as Ctrl-C in the middle of pip leaves it
    (tmp_path / ".venv" / "installed-requirements.txt").unlink()
    assert "Creating .venv" in make()
    shutil.rmtree(tmp_path / ".venv" / "lib")  # a half-deleted environment
    (tmp_path / ".venv" / "bin" / "python").unlink()
    assert "Creating .venv" in make()
    assert make() == ""


@pytest.mark.parametrize(("ci", "status", "word"), [("true", 1, "error: "), ("", 2, "BAZEL SKIPPED")])
def test_missing_bazel_fails_in_ci_and_shows_elsewhere(tmp_path, ci, status, word):
    """With an `id` that says we are not root, and a PATH without bazel: the script may not install anything."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    result = run_script("/bin/sh", "tools/install_bazel.sh", PATH=str(tmp_path), CI=ci)
    assert result.returncode == status
    assert word in result.stderr
    assert "sudo apt-get install bazel-bootstrap" in result.stderr
    assert result.stderr.count("\n") == 1
