"""Google's benchmark_model for the phone: where it is, and whether it can run there."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from mobiatt_tf import files
from mobiatt_tf.errors import UserError

VARIABLE = "MOBIATT_BENCHMARK_MODEL"
# ELF class (1: 32 bits, 2: 64) and machine of each ABI, from Android's NDK and the ELF specification.
_ELF_OF_ABI = {"arm64-v8a": (2, 183), "armeabi-v7a": (1, 40), "x86_64": (2, 62), "x86": (1, 3), "riscv64": (2, 243)}
# How Google names its builds.
_PUBLISHED = {"arm64-v8a": "android_aarch64", "armeabi-v7a": "android_arm"}
_BAZEL = {"arm64-v8a": "android_arm64", "armeabi-v7a": "android_arm", "x86_64": "android_x86_64", "x86": "android_x86"}


def default_path(abi: str) -> Path:
    """Where benchmark_model is looked for if nothing else is said."""
    return files.user_path("~/.cache/mobiatt/benchmark_model") / abi / "benchmark_model"


def find_binary(given: str | None, abis: Sequence[str]) -> Path:
    """The benchmark_model for a phone.

    Args:
        given: --benchmark_binary; None: $MOBIATT_BENCHMARK_MODEL, then `default_path` of each ABI, best first.
        abis: what the phone runs, best first.

    Raises:
        UserError: there is none.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        path = files.user_path(named)
        if not path.is_file():
            option = "--benchmark_binary" if given else f"${VARIABLE}"
            raise UserError(f"{option} names {path}, which is not a file. {_where_to_get(abis)}")
        return path
    for abi in abis:
        if default_path(abi).is_file():
            return default_path(abi)
    raise UserError(f"Give --benchmark_binary=PATH: Google's benchmark_model for the phone. {_where_to_get(abis)}")


def _where_to_get(abis: Sequence[str]) -> str:
    abi = abis[0] if abis else "arm64-v8a"
    published = _PUBLISHED.get(abi)
    nightly = (
        f"Google publishes {published}_benchmark_model, linked from the page "
        "https://ai.google.dev/edge/litert/models/measurement; or build"
        if published
        else "Build"
    )
    config = _BAZEL.get(abi, "android_arm64")
    return (
        f"{nightly} it in TensorFlow's source: bazel build -c opt --config={config} "
        f"//tensorflow/lite/tools/benchmark:benchmark_model. Without --benchmark_binary it is looked for in "
        f"${VARIABLE} and {default_path(abi)}."
    )


def binary_abi(path: Path) -> str | None:
    """The ABI that a program was built for; None of a script (`#!`), which may run anywhere.

    Raises:
        UserError: it is neither, or a program for a machine that no Android phone is.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if head.startswith(b"#!"):
        return None
    if len(head) < 20 or not head.startswith(b"\x7fELF"):
        raise UserError(f"{path} is no program for Android: it is neither an ELF file nor a script.")
    # e_machine lies at byte 18 of the header, in the byte order that byte 5 names (1: little endian, as on Android).
    kind, little, machine = head[4], head[5] == 1, struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]
    for abi, values in _ELF_OF_ABI.items():
        if little and values == (kind, machine):
            return abi
    raise UserError(f"{path} is built for a machine that is no phone (ELF class {kind}, machine {machine}).")


def check_abi(path: Path, abis: Sequence[str]) -> None:
    """Checks that the phone can run the program.

    Args:
        path: the program.
        abis: what the phone runs.

    Raises:
        UserError: it cannot.
    """
    abi = binary_abi(path)
    if abi is not None and abi not in abis:
        raise UserError(
            f"{path} is built for {abi}, but the phone runs {', '.join(abis) or 'nothing that it names'}. "
            f"{_where_to_get(abis)}"
        )
