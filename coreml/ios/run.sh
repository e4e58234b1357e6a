#!/bin/sh
# Builds the benchmark app with the given models, runs it on an attached iPhone and collects its results.
#
#   run.sh TEAM_ID DEVICE MODEL.mlpackage...
#
# TEAM_ID  the Apple Developer team that signs the app, ten letters and digits
# DEVICE   the iPhone's name or identifier, as `xcrun devicectl list devices` shows it
# Exit status: 0 results written, 1 a step failed, 2 wrong arguments or missing tools, 130 interrupted.
set -eu

fail() {
    status=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$status"
}

[ "$#" -ge 3 ] || fail 2 "usage: run.sh TEAM_ID DEVICE MODEL.mlpackage..."

system=$(uname -s)
[ "$system" = Darwin ] || fail 2 "this needs a Mac with Xcode 16 and an attached iPhone; this system is $system."
command -v xcodebuild >/dev/null 2>&1 || fail 2 "xcodebuild is missing: install Xcode 16 from the App Store."
xcodebuild -version >/dev/null 2>&1 ||
    fail 2 "xcodebuild does not work: open Xcode once, select it with 'sudo xcode-select -s /Applications/Xcode.app'."
xcrun --find devicectl >/dev/null 2>&1 ||
    fail 2 "xcrun devicectl is missing: it comes with Xcode 15 and later; select that with 'sudo xcode-select -s'."

team=$1
device=$2
shift 2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
models=$here/Models
bundle=mobiatt.benchmark.$team
result=results-$(date +%Y-%m-%d-%H%M%S).json

# Checked before anything is copied: what lies in Models already is not this script's to remove.
for package in "$@"; do
    package=${package%/}
    name=$(basename -- "$package")
    case $name in
        *.mlpackage) ;;
        *) fail 2 "$package is not an .mlpackage." ;;
    esac
    [ -d "$package" ] || fail 2 "there is no package $package."
    for copy in "$models/$name" "$models/${name%.mlpackage}.golden"; do
        [ ! -e "$copy" ] || fail 2 "$copy is there already: remove it first."
    done
done

work=$(mktemp -d)
: >"$work/copied"

clean_up() {
    while IFS= read -r copy; do
        rm -rf -- "$copy"
    done <"$work/copied"
    rm -rf -- "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Names a copy before it is made, so that a half-made one is removed too.
copy_folder() {
    [ ! -e "$2" ] || fail 2 "two of the packages are named $(basename -- "$1"); give them different names."
    printf '%s\n' "$2" >>"$work/copied"
    cp -R -- "$1" "$2"
}

for package in "$@"; do
    package=${package%/}
    name=$(basename -- "$package")
    copy_folder "$package" "$models/$name"
    golden=${package%.mlpackage}.golden
    if [ -d "$golden" ]; then
        copy_folder "$golden" "$models/${name%.mlpackage}.golden"
    else
        printf 'warning: %s is missing, the output of %s will not be checked\n' "$golden" "$name" >&2
    fi
done

echo "building"
xcodebuild -project "$here/MobiAttBenchmark.xcodeproj" -scheme MobiAttBenchmark -configuration Release \
    -destination 'generic/platform=iOS' -derivedDataPath "$work/build" -allowProvisioningUpdates \
    DEVELOPMENT_TEAM="$team" build >"$work/build.log" 2>&1 || {
    tail -n 40 "$work/build.log" >&2
    fail 1 "the build failed; its last lines are above."
}

echo "installing"
xcrun devicectl device install app --device "$device" \
    "$work/build/Build/Products/Release-iphoneos/MobiAttBenchmark.app" ||
    fail 1 "the app cannot be installed: unlock $device, switch on its Developer Mode and trust this Mac."

# The status of the launch is that of the app, which has its say in the result.
echo "running; leave the iPhone unlocked and the app in the foreground"
xcrun devicectl device process launch --console --terminate-existing --device "$device" \
    -- "$bundle" --autorun | tee "$work/console.log" || true

sed -n 's/^.*RESULT_JSON: //p' "$work/console.log" | tr -d '\r' | tail -n 1 >"$work/result.json"
case $(cat "$work/result.json") in
    '{'*'}') ;;
    *) fail 1 "the app ended without a whole RESULT_JSON line; its output is above." ;;
esac
cp -- "$work/result.json" "$result"
echo "written to $result"
