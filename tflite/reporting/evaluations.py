"""Accuracies out of the evaluation.json of `mobiatt_tf.training.evaluate`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobiatt_tf.errors import UserError
from tflite.inspect import Description


@dataclass(frozen=True)
class Accuracy:
    """A share of right first guesses in [0, 1], on what images, and the file that says so."""

    top1: float
    images: int
    data: str
    source: str
    at_export: bool = False


def check_share(top1: Any, images: Any, name: str) -> None:
    """Raises ValueError where the two are no accuracy."""
    if type(top1) not in (float, int) or not 0 <= top1 <= 1:
        raise ValueError(f"top1 of {name} is {top1!r}, not a share from 0 to 1")
    if type(images) is not int or images < 1:
        raise ValueError(f"the number of images of {name} is {images!r}")


@dataclass(frozen=True)
class Evaluated:
    """One result of an evaluation.json: `digest` is its `sha256`, which for files covers their name too."""

    file_name: str
    digest: str
    accuracy: Accuracy
    dataset: str

    def is_of(self, description: Description) -> bool:
        """Whether it is of this very file; see `mobiatt_tf.training.graphs.content_sha256` for the digest."""
        named = hashlib.sha256(f"{self.file_name} {description.sha256}\n".encode()).hexdigest()
        return self.digest in (description.sha256, named)


def read(path: Path, value: dict[str, Any]) -> list[Evaluated]:
    """The accuracies in the content of an evaluation.json.

    Raises:
        UserError: something is missing or of a wrong type; the path is named.
    """
    task = value.get("task", "classification")
    if task != "classification":
        raise UserError(
            f"{path} is an evaluation for {task}: the report takes those of classifiers only. Leave it out."
        )
    try:
        dataset = value["dataset"]
        for key, kind in (("name", str), ("fingerprint", str), ("evaluated_images", int), ("test_images", int)):
            if type(dataset[key]) is not kind:
                raise TypeError(f"dataset.{key} is {dataset[key]!r}")
        for result in value["results"]:
            if not isinstance(result["graph"], str) or not isinstance(result["sha256"], str):
                raise TypeError("a graph has no name or no SHA-256")
            check_share(result["top1"], result["images"], result["graph"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a whole evaluation.json: {what}. Evaluate again.") from None
    dataset = value["dataset"]
    share = "all" if dataset["evaluated_images"] == dataset["test_images"] else f"of {dataset['test_images']:,}"
    data = f"{dataset['evaluated_images']:,} test images of {dataset['name']} ({share})"
    found = []
    for result in value["results"]:
        accuracy = Accuracy(float(result["top1"]), result["images"], data, str(path))
        found.append(Evaluated(Path(result["graph"]).name, result["sha256"], accuracy, dataset["fingerprint"]))
    return found
