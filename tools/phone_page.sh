#!/bin/sh
# Usage: tools/phone_page.sh [DIRECTORY]
# Installs LiteRT.js, which `--device=browser` serves to phones, from npm into DIRECTORY (runs/litertjs), at the versions
# and checksums of tflite/browser/package-lock.json. Done already: returns at once.
set -eu
source=$(cd "$(dirname "$0")/../tflite/browser" && pwd)
directory=${1:-runs/litertjs}

if cmp -s "$source/package-lock.json" "$directory/installed-package-lock.json"; then
    exit 0
fi
if ! command -v npm >/dev/null 2>&1; then
    echo "error: npm is missing. Run: sudo apt-get install npm" >&2
    exit 1
fi
echo "Installing LiteRT.js into $directory (about 40 MB)."
mkdir -p "$directory"
rm -f "$directory/installed-package-lock.json"
cp "$source/package.json" "$source/package-lock.json" "$directory/"
npm ci --prefix "$directory" --ignore-scripts --no-audit --no-fund
cp "$source/package-lock.json" "$directory/installed-package-lock.json"
