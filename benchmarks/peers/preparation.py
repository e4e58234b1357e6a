"""The files of every variant: ours are made here, the peers' by their converters in their environments."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.peers import environment
from benchmarks.peers.programs import PROGRAMS, Variant
from mobiatt_tf import files
from mobiatt_tf.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS = 1800
_CALIBRATION_IMAGES = 8  # what int8 is calibrated on; these files are for timing


@dataclass(frozen=True)
class Prepared:
    """One variant ready to be loaded by `worker.Session.load`.

    Attributes:
        variant: which.
        source: what the worker loads.
        python: the interpreter of its environment; None: this one.
        reference: the logits [classes] that it must give; None: it is no network.
    """

    variant: Variant
    source: dict[str, Any]
    python: Path | None
    reference: np.ndarray | None


class Preparation:
    """Everything of one model at one image size."""

    def __init__(self, family: str, variant: str, image_size: int, directory: Path, environments: Path) -> None:
        """Args: the model, where its files go, and where the peers' environments are."""
        self.family, self.variant, self.image_size = family, variant, image_size
        self.directory, self.environments = directory, environments
        self.skipped: dict[Variant, str] = {}
        self._pythons: dict[str, Path | UserError] = {}

    @property
    def images(self) -> Path:
        """A .npy file, float32 [1, size, size, 3]: the input of every measured run."""
        return self.directory / "image.npy"

    @property
    def _calibration(self) -> Path:
        return self.directory / "calibration.npy"

    def prepare(self, variants: list[Variant], networks: dict[str, int | None]) -> list[Prepared]:
        """Makes what is missing; what cannot be made is in `skipped` with the reason.

        Args:
            variants: what is wanted.
            networks: name -> channels of a head of Mobile-Attention, or None for the softmax host.
        """
        from mobiatt_tf.verification import photographs

        self.directory.mkdir(parents=True, exist_ok=True)
        for path, seed, count in ((self.images, 1, 1), (self._calibration, 0, _CALIBRATION_IMAGES)):
            images = photographs((self.image_size, self.image_size), count, seed)
            with files.atomic_path(path) as temporary:
                np.save(temporary, images)
        prepared = []
        interval = 0.5 if sys.stderr.isatty() else 30
        with tqdm(total=len(variants), desc="prepare", leave=False, mininterval=interval) as progress:
            for network, head_dim in {**networks, "floor": None}.items():
                mine = [variant for variant in variants if variant.network == network]
                prepared += self._network(network, head_dim, mine, progress) if mine else []
        return sorted(prepared, key=lambda one: variants.index(one.variant))

    def _network(self, network: str, head_dim: int | None, variants: list[Variant], progress: Any) -> list[Prepared]:
        from benchmarks.peers import ours
        from mobiatt_tf.interop import save_pytorch
        from mobiatt_tf.verification import keras_logits

        # The floor has the products of the Mobile-Attention models, which are the same at every number of heads.
        model = ours.build(self.family, self.variant, self.image_size, 8 if network == "floor" else head_dim)
        reference = None
        if network == "floor":
            model = ours.products(model)
        else:
            reference = keras_logits(model, np.load(self.images))[0]
            save_pytorch(model, self._weights(network))
        prepared = []
        for variant in variants:
            progress.set_postfix_str(str(variant), refresh=sys.stderr.isatty())
            try:
                source, python = self._source(variant, head_dim, model)
            except UserError as error:
                self.skip(variant, str(error))
            else:
                prepared.append(Prepared(variant, source, python, reference))
            progress.update()
        return prepared

    def skip(self, variant: Variant, reason: str) -> None:
        """Records that a variant is not measured, and says so."""
        self.skipped[variant] = reason
        tqdm.write(f"skipped: {variant}: {reason}")

    def _weights(self, network: str) -> Path:
        return self.directory / f"{network}.safetensors"

    def _source(self, variant: Variant, head_dim: int | None, model: Any) -> tuple[dict[str, Any], Path | None]:
        program = PROGRAMS[variant.program]
        python = self._python(program.environment)
        path = self.directory / f"{variant.network}-{variant.program}-{variant.format}{program.suffix}"
        network = {
            "family": self.family,
            "variant": self.variant,
            "image_size": self.image_size,
            "head_dim": head_dim,
            "weights": str(self._weights(variant.network).absolute()),
        }
        if program.converter:
            self._convert(variant, network, path)
        elif program.suffix:
            self._convert_ours(variant, model, path)
        else:
            return {"network": network}, python
        return {"path": str(path.absolute())}, python

    def _python(self, name: str | None) -> Path | None:
        """Raises: UserError: the environment cannot be installed; said once more for every variant that needs it."""
        if name is None:
            return None
        if name not in self._pythons:
            try:
                self._pythons[name] = environment.python_of(name, self.environments)
            except UserError as error:
                self._pythons[name] = error
        found = self._pythons[name]
        if isinstance(found, UserError):
            raise found
        return found

    def _convert_ours(self, variant: Variant, model: Any, path: Path) -> None:
        from benchmarks.peers import ours

        try:
            if path.suffix == ".onnx":
                content = ours.onnx_file(model)
            else:
                content = ours.tflite_file(model, variant.format, np.load(self._calibration))
        except ValueError as error:
            raise UserError(first_line(error)) from error
        files.write_bytes(path, content)

    def _convert(self, variant: Variant, network: dict[str, Any], path: Path) -> None:
        converter = PROGRAMS[variant.program].converter
        assert converter is not None
        name, module = converter
        job = {
            "network": network,
            "images": str(self._calibration.absolute()),
            "format": variant.format,
            "output": str(path.absolute()),
        }
        stamp = path.with_name(f"{path.name}.made_from")
        made_from = self._made_from(name, module, job)
        if path.is_file() and stamp.is_file() and stamp.read_text() == made_from:
            return
        command = [str(self._python(name)), "-P", "-m", module, json.dumps(job)]
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        try:
            run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(f"{module} took more than {_TIMEOUT_SECONDS} s.") from None
        if run.returncode:
            files.write_bytes(path.with_name(f"{path.name}.log"), (run.stdout + run.stderr).encode())
            raise UserError(f"{module} failed: {environment.error_in(run.stderr)}")
        files.write_bytes(stamp, made_from.encode())

    def _made_from(self, name: str, module: str, job: dict[str, Any]) -> str:
        """A digest of all that decides the content of a peer's file."""
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode())
        code = (module.rpartition(".")[2], "conversion", "hosts", "published")
        for path in (Path(job["network"]["weights"]), self._calibration, environment.requirements(name)):
            digest.update(path.read_bytes())
        for part in code:
            digest.update((environment.DIRECTORY / f"{part}.py").read_bytes())
        return digest.hexdigest()
