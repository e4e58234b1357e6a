"""The main program of Bazel's py_test targets: pytest with the arguments of the target."""

import os
import sys

import pytest


def main(arguments: list[str]) -> int:
    """Runs pytest; Bazel names the report's path and `bazel test --test_filter` in environment variables."""
    if report := os.environ.get("XML_OUTPUT_FILE"):
        arguments = [*arguments, f"--junitxml={report}"]
    if expression := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        arguments = [*arguments, f"-k={expression}"]
    return pytest.main(["-p", "no:cacheprovider", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
