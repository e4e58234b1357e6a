#!/bin/sh
# Usage: tools/run_bazel.sh PYTHON MODEL
# The Bazel part of `make test`: builds everything, runs the Bazel tests and the benchmark on MODEL, all with PYTHON.
set -eu
export MOBIATT_PYTHON=$1
model=$2
# Bazel starts each program through `env python3`; a Debian with python3.11 alone has no python3 but this one.
PATH="$(dirname "$MOBIATT_PYTHON"):$PATH"
export PATH

# Bazel 4.2.3: "bazel does not currently work properly from paths containing spaces".
case $PWD in
*" "*)
    if [ "${CI:-}" = true ]; then
        echo "error: Bazel cannot work in $PWD, whose name contains a space. Move the checkout." >&2
        exit 1
    fi
    echo "######## BAZEL SKIPPED: it cannot work in $PWD, whose name contains a space. ########" >&2
    exit 0
    ;;
esac

status=0
tools/install_bazel.sh || status=$?
if [ "$status" = 2 ]; then
    exit 0
fi
[ "$status" = 0 ] || exit "$status"

bazel build //...
bazel test //tests/...
bazel run //tflite:benchmark -- --graph="$model" --num_threads=1 --output_dir=runs/bazel_benchmark
