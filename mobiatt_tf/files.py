"""Files that are either whole or absent: write to a temporary name beside the target, then rename."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mobiatt_tf.errors import UserError

_CHUNK_BYTES = 1 << 20


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path as the user meant it: `~` expanded and, under `bazel run`, relative to the directory it was called from.

    Bazel starts a binary inside its runfiles tree and names the caller's directory in BUILD_WORKING_DIRECTORY.
    """
    return Path(os.environ.get("BUILD_WORKING_DIRECTORY", "")) / Path(path).expanduser()


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the target's directory; renames it to the target when the block ends without an error.

    The temporary name keeps the target's suffix, because writers such as Keras and matplotlib choose the format by it.

    Raises:
        UserError: the disk is full, or the target cannot be written there.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _explained(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic_path` for a directory: yields the path of one that does not exist; it replaces the target at the end.

    Raises:
        UserError: the disk is full, or the target cannot be written there.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    old = target.with_name(f".{target.stem}.{os.getpid()}.old{target.suffix}")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, but a directory is written there. Choose another output.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        raise _explained(target, error) from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _explained(target: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"No space left while writing {target}. Free some space and run the same command again.")
    return UserError(f"{target} cannot be written: {error.strerror or error}. Choose another output.")


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Writes the whole content or nothing."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON with a final newline, whole or not at all."""
    write_bytes(target, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def take_lock(directory: str | os.PathLike[str]) -> TextIO:
    """Keeps a directory, which is made if need be, to this process.

    Returns:
        The lock's open file: closing it frees the directory, as the kernel does when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it; `strerror` is that process's number, or "".
        OSError: the directory cannot be made or written.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    file = open(Path(directory) / ".lock", "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise BlockingIOError(error.errno, holder) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
