#!/bin/sh
# Usage: [PYTHON=...] tools/phone/setup.sh [DIRECTORY]
# Prepares in DIRECTORY (runs/phone/toolchain) what tools/phone/emulated.py makes a phone of, unpacked from Debian's
# packages, not installed:
#   bin/adb         Debian's adb, the client and its server
#   qemu-aarch64    QEMU's user emulation, linked statically
#   amd64/ arm64/   the phone's files: Debian's adbd; the MirBSD shell and toybox, which are Android's shell and commands;
#                   Python 3.11 with the wheels of LiteRT and NumPy at the versions of requirements.txt, in /opt/litert
# Needs Debian 12 on x86-64 (apt with its mirror and keys). The system stays as it is. Done already: returns at once.
# Interrupted halfway: DIRECTORY is as it was. PYTHON is any Python with pip that runs here; .venv's by default.
set -eu
tools=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$tools/../.." && pwd)
directory=${1:-$project/runs/phone/toolchain}
python=${PYTHON:-$project/.venv/bin/python}
keys=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "error: $*" >&2
    exit 1
}

# What the directory's content follows from.
wanted=$(cat "$0" "$project/requirements.txt" | cksum)
is_done() { [ "$(cat "$directory/stamp" 2>/dev/null)" = "$wanted" ]; }
if is_done; then
    exit 0
fi
for program in apt-get dpkg dpkg-deb flock; do
    command -v "$program" >/dev/null ||
        fail "the phone's programs are unpacked from Debian's packages, and there is no $program here. Use Debian 12."
done
release=$(. /etc/os-release && echo "${ID:-} ${VERSION_CODENAME:-}")
[ "$release $(dpkg --print-architecture)" = "debian bookworm amd64" ] && [ -e "$keys" ] ||
    fail "the phone's programs come from Debian 12 on x86-64; this is '$release' on $(dpkg --print-architecture)."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "'$python' is not a Python with pip. Run 'make dev', or name one: PYTHON=python3 $0"
if [ ! -e "$directory/stamp" ] && [ -n "$(ls -A "$directory" 2>/dev/null)" ]; then
    fail "$directory holds something else. Name another directory."
fi

# The mirror of the suite "bookworm" in apt's two formats.
mirror=$(
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) bookworm .*/\2/p'
    cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk '
        function finish() { if (suite && uri != "") print uri; suite = 0; uri = "" }
        /^[[:space:]]*$/ || /^Types:/ { finish() }
        /^URIs:/ { uri = $2 }
        /^Suites:/ { for (field = 2; field <= NF; field++) if ($field == "bookworm") suite = 1 }
        END { finish() }'
)
mirror=$(echo "$mirror" | sed -n '1p')
[ -n "$mirror" ] || fail "apt's sources name no mirror with the suite bookworm."

mkdir -p "$(dirname "$directory")"
directory=$(cd "$(dirname "$directory")" && pwd)/$(basename "$directory") # apt wants it absolute
exec 9>"$directory.lock" # one setup at a time; whoever waited finds the work done
flock 9
if is_done; then
    exit 0
fi
unfinished=$(mktemp -d "$directory.unfinished.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
trap 'exit 130' INT TERM

# prepare ARCHITECTURE: apt with a mirror, lists, state and cache of its own; the empty state makes it fetch every
# dependency.
prepare() {
    architecture=$1
    apt="$unfinished/apt-$architecture"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial"
    : >"$apt/status"
    for suite in bookworm bookworm-backports; do
        echo "deb [signed-by=$keys] $mirror $suite main"
    done >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
APT::Architecture "$architecture";
APT::Architectures "$architecture";
APT::Sandbox::User "$(id -un)";
#clear APT::Update;
#clear DPkg::Pre-Install-Pkgs;
Acquire::Languages "none";
Dir::Etc::SourceList "$apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::State::extended_states "$apt/extended_states";
Dir::Cache "$apt";
Debug::NoLocking "true";
END
    export APT_CONFIG="$apt/apt.conf"
    apt-get -qq update || fail "Debian's lists of $architecture packages could not be fetched; see above."
}

version() { sed -n "s/^$1==/&/p" "$project/requirements.txt"; }

for architecture in amd64 arm64; do
    prepare "$architecture"
    apt-get -qq --yes --download-only --no-install-recommends --target-release bookworm-backports \
        install adb adbd mksh toybox python3.11-minimal libpython3.11-stdlib >/dev/null ||
        fail "Debian's $architecture packages could not be fetched; see above. Debian 12 (bookworm) has them."
    root="$unfinished/$architecture"
    mkdir "$root"
    for package in "$apt/archives"/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    case $architecture in
    amd64)
        machine=x86_64
        (cd "$apt" && apt-get -qq download qemu-user-static) || fail "Debian's qemu-user-static could not be fetched."
        dpkg-deb --fsys-tarfile "$apt"/qemu-user-static*.deb |
            tar -x -C "$unfinished" --transform 's,.*/qemu-aarch64-static,qemu-aarch64,' ./usr/bin/qemu-aarch64-static
        ;;
    arm64) machine=aarch64 ;;
    esac
    rm -r "$apt"
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
        --target "$root/opt/litert" --python-version 3.11 --implementation cp --only-binary=:all: \
        --platform manylinux_2_28_$machine --platform manylinux_2_27_$machine --platform manylinux2014_$machine \
        --constraint "$project/requirements.txt" "$(version ai-edge-litert)" "$(version numpy)" ||
        fail "the $machine wheels could not be fetched; see above."
done

# What an Android phone has where; the rest is mounted when the phone starts.
own="$unfinished/amd64"
commands=$("$own/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$own/lib/x86_64-linux-gnu:$own/usr/lib/x86_64-linux-gnu" \
    "$own/bin/toybox") || fail "Debian's toybox does not run here; see above."
for architecture in amd64 arm64; do
    root="$unfinished/$architecture"
    mkdir -p "$root/system/bin" "$root/data" "$root/proc" "$root/sys" "$root/dev" "$root/fixture"
    for command in $commands; do
        ln -s /bin/toybox "$root/system/bin/$command"
    done
    ln -sf /bin/mksh "$root/system/bin/sh"
    ln -s mksh "$root/bin/sh"
    echo "root:x:0:0::/data/local/tmp:/system/bin/sh" >"$root/etc/passwd"
    echo "root:x:0:" >"$root/etc/group"
done

# Compiled beforehand: the phone's files are read-only, and compiling anew at every start takes seconds in QEMU. Trees
# of both architectures are alike but for the extension modules.
python311="$own/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path $own/lib/x86_64-linux-gnu:$own/usr/lib/x86_64-linux-gnu"
for architecture in amd64 arm64; do
    root="$unfinished/$architecture"
    # shellcheck disable=SC2086 # a command and its arguments
    PYTHONHOME="$own/usr" $python311 "$own/usr/bin/python3.11" -I -m compileall -q -s "$root" -p / \
        --invalidation-mode unchecked-hash "$root/usr/lib/python3.11" "$root/opt/litert" >/dev/null ||
        fail "Python's modules could not be compiled."
done

mkdir "$unfinished/bin"
cat >"$unfinished/bin/adb" <<'END'
#!/bin/sh
# Debian's adb with its libraries, in place; the C library is the system's.
root=$(cd "$(dirname "$0")/../amd64" && pwd)
LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu/android" \
    exec "$root/usr/lib/android-sdk/platform-tools/adb" "$@"
END
chmod 755 "$unfinished/bin/adb"
"$unfinished/bin/adb" version >/dev/null || fail "Debian's adb does not run here; see above."

echo "$wanted" >"$unfinished/stamp"
chmod 755 "$unfinished"
rm -rf "$directory"
mv -T "$unfinished" "$directory"
echo "The phone's programs are in $directory."
