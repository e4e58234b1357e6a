"""Keras models in general: read a trained one, build one under a precision."""

import contextlib
import os
from collections.abc import Iterator

import keras

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import user_path


def load_trained(checkpoint: str | os.PathLike[str]) -> keras.Model:
    """The trained Keras model of a run.

    Args:
        checkpoint: a directory that train_tpu_gpu.py wrote (its model.keras is taken), or a .keras file.

    Raises:
        UserError: there is no such file, or Keras cannot read it.
    """
    path = user_path(checkpoint)
    if path.is_dir():
        path = path / "model.keras"
    if not path.is_file():
        raise UserError(
            f"There is no model at {path}. Give the --output_dir of a training run that has finished at least one "
            "epoch, or a .keras file."
        )
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # zipfile, h5py, json and Keras each raise their own for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a Keras model ({reason}). Take a whole .keras file.") from error


@contextlib.contextmanager
def dtype_policy(policy: str | None) -> Iterator[None]:
    """Builds layers under a Keras dtype policy and restores the global one; None changes nothing."""
    if policy is None:
        yield
        return
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
