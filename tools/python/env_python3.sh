#!/bin/sh
# The Python that Bazel's targets run with: $MOBIATT_PYTHON, else the first python3 on PATH. It needs the packages of
# requirements.txt; Bazel fetches none.
#
# -P keeps the directory of the main script off sys.path. Without it tflite/inspect.py takes the place of the standard
# library's `inspect` in every program started from tflite/ (seen: `bazel run //tflite:benchmark` died inside numpy).
exec "${MOBIATT_PYTHON:-python3}" -P "$@"
