#!/bin/sh
# Usage: [PYTHON=...] tools/arm/setup.sh [DIRECTORY]
# Prepares in DIRECTORY (runs/arm/toolchain) what benchmarks/arm.py needs to run the aarch64 build of LiteRT in QEMU:
#   root/                   an aarch64 Python 3.11 and its libraries, unpacked from Debian's packages, not installed
#   site/                   the aarch64 wheels of LiteRT and NumPy at the versions of requirements.txt
#   count_instructions.so   the plugin for QEMU
# Installs qemu-user and gcc where they are missing and this is root on Debian 12. Done already: returns at once.
# Interrupted halfway: DIRECTORY is as it was. PYTHON is any Python with pip that runs here; .venv's by default.
set -eu
tools=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$tools/../.." && pwd)
directory=${1:-$project/runs/arm/toolchain}
python=${PYTHON:-$project/.venv/bin/python}

fail() {
    echo "error: $*" >&2
    exit 1
}

compiler_works() { echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1; }

missing=
command -v qemu-aarch64 >/dev/null || missing="qemu-user"
compiler_works || missing="${missing:+$missing }gcc libc6-dev"
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "there is no $missing. On Debian: sudo apt-get install $missing"
    fi
    echo "Installing $missing."
    # shellcheck disable=SC2086 # a list of names
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } ||
        fail "$missing could not be installed; see above."
fi
qemu=$(qemu-aarch64 --version | sed -n '1s/.* version \([0-9]*\).*/\1/p')
[ "$qemu" -le 8 ] || fail "QEMU $qemu is installed; the plugin is for QEMU 5 to 8. Debian 12 has QEMU 7.2."

# What the directory's content follows from.
wanted=$(cat "$0" "$tools/count_instructions.c" "$project/requirements.txt" | cksum)
if [ "$(cat "$directory/stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    fail "the aarch64 Python is unpacked from Debian's packages, and there is no apt-get here. Use Debian 12."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "'$python' is not a Python with pip. Run 'make dev', or name one: PYTHON=python3 $0"

if [ ! -e "$directory/stamp" ] && [ -n "$(ls -A "$directory" 2>/dev/null)" ]; then
    fail "$directory holds something else. Name another directory."
fi

mkdir -p "$(dirname "$directory")"
directory=$(cd "$(dirname "$directory")" && pwd)/$(basename "$directory") # apt wants it absolute
unfinished=$(mktemp -d "$directory.unfinished.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
trap 'exit 130' INT TERM

gcc -O2 -Wall -Werror -shared -fPIC -o "$unfinished/count_instructions.so" "$tools/count_instructions.c"

# apt with the system's sources and keys, but lists, cache and architecture of its own: the system stays as it is.
apt="$unfinished/apt"
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$unfinished/packages"
: >"$apt/status"
cat >"$apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "$(id -un)";
#clear APT::Update;
Acquire::Languages "none";
Dir::State::Lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
END
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
packages="$packages libc6 libexpat1 libffi8 libgcc-s1 libstdc++6 zlib1g"
export APT_CONFIG="$apt/apt.conf"
# shellcheck disable=SC2086 # a list of names
(cd "$unfinished/packages" && apt-get -qq update && apt-get -qq download $packages) ||
    fail "Debian's arm64 packages of Python 3.11 could not be fetched; see above. Debian 12 (bookworm) has them."
mkdir "$unfinished/root"
for package in "$unfinished"/packages/*.deb; do
    dpkg-deb -x "$package" "$unfinished/root"
done
rm -r "$apt" "$unfinished/packages"

version() { sed -n "s/^$1==/&/p" "$project/requirements.txt"; }
"$python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile --target "$unfinished/site" \
    --python-version 3.11 --implementation cp --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    --constraint "$project/requirements.txt" "$(version ai-edge-litert)" "$(version numpy)" ||
    fail "the aarch64 wheels could not be fetched; see above."

# XNNPACK chooses its kernels by the processor that Linux names, and QEMU shows the host's files unless root/ has them:
# one Cortex-A76 r4p1 (arch/arm64/include/asm/cputype.h of Linux), its features as Linux prints them, 512 KiB of L2.
processors="$unfinished/root/sys/devices/system/cpu"
mkdir -p "$unfinished/root/proc" "$processors/cpu0/cpufreq" "$processors/cpu0/topology" "$processors/cpu0/cache/index2"
cat >"$unfinished/root/proc/cpuinfo" <<END
processor	: 0
BogoMIPS	: 100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

END
value() { echo "$1" >"$processors/$2"; }
value 0 possible
value 0 present
value 0 kernel_max
value 2400000 cpu0/cpufreq/cpuinfo_max_freq
value 2400000 cpu0/cpufreq/cpuinfo_min_freq
value 0 cpu0/topology/physical_package_id
value 0 cpu0/topology/cluster_cpus_list
value 2 cpu0/cache/index2/level
value 512K cpu0/cache/index2/size
value 0 cpu0/cache/index2/shared_cpu_list

echo "$wanted" >"$unfinished/stamp"
chmod 755 "$unfinished"
rm -rf "$directory"
mv "$unfinished" "$directory"
echo "The aarch64 runtime is in $directory."
