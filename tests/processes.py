"""What tests of several packages need of the operating system."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in the root of the repository, without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def missing(reason: str) -> NoReturn:
    """Skips where a person's machine or Bazel's sandbox lacks something; fails in CI, which must have it."""
    if os.environ.get("CI") and "TEST_SRCDIR" not in os.environ:  # the second is Bazel's
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the size of files, in bytes, stands in for a full disk: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
