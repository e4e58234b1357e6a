#!/bin/sh
# Makes `bazel` available: nothing to do where it is on PATH, else installs Debian's and Ubuntu's bazel-bootstrap as root.
# Exit status: 0 it is there; 2 it is missing and is not needed here; 1 it is missing in CI (CI=true) or cannot be installed.
set -eu

if command -v bazel >/dev/null 2>&1; then
    exit 0
fi

advice="Run: sudo apt-get install bazel-bootstrap (or put Bazelisk on PATH as bazel)"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing bazel-bootstrap."
    export DEBIAN_FRONTEND=noninteractive
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends bazel-bootstrap; then
        exit 0
    fi
    echo "error: bazel-bootstrap could not be installed. $advice." >&2
    exit 1
fi

if [ "${CI:-}" = true ]; then
    echo "error: there is no bazel, and CI needs it. $advice." >&2
    exit 1
fi
echo "######## BAZEL SKIPPED: there is no bazel here. $advice. ########" >&2
exit 2
