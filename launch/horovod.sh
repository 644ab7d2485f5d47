#!/usr/bin/env bash
# Builds Horovod for the torch that is installed, keeps the wheel, installs it.
#
#   bash launch/horovod.sh [PYTHON]        default .venv/bin/python
#
# EFFTRAIN_CACHE    where wheels are kept, default ~/.cache/efftrain
# MAKEFLAGS         default -j and the number of cores
#
# Exit codes: 0 installed, 2 no Python with torch, 3 a build tool is missing, 4 the sources do not come or are not
# those expected, 5 the build failed (its log is kept and named), 6 the wheel does not install or load.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.28.1
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
recipe=1 # raise it when the build below changes

say() { echo "horovod.sh: $*" >&2; }
fail() { # exit code, message
    say "$2"
    exit "$1"
}

python=${1:-.venv/bin/python}
python=$(command -v "$python") || fail 2 "no Python at ${1:-.venv/bin/python}; run make install or name one: bash launch/horovod.sh PYTHON"
case $python in /*) ;; *) python=$PWD/$python ;; esac
facts=$("$python" - <<'PYTHON'
import platform, sys, sysconfig
import torch
print("torch" + torch.__version__.replace("+", ".").replace("-", "."))
print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{sysconfig.get_platform()}-{'-'.join(platform.libc_ver())}")
PYTHON
) || fail 2 "$python does not import torch; install it there first: $python -m pip install torch"
local_version=$(sed -n 1p <<<"$facts")
key=$version-$local_version-$(sed -n 2p <<<"$facts")-$recipe
cache=${EFFTRAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/efftrain}/horovod/$key

loads() {
    (cd / && "$python" -W ignore - "$version+$local_version") <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("horovod")
except PackageNotFoundError:
    sys.exit("horovod is not installed")
if found != sys.argv[1]:
    sys.exit(f"found horovod {found}, expected {sys.argv[1]}")
import horovod.torch
sys.exit(0 if horovod.torch.gloo_built() else "horovod has no gloo")
PYTHON
}

wheel() { find "$cache" -name 'horovod-*.whl' 2>/dev/null | head -n 1; }

build() {
    missing=()
    command -v "${CXX:-c++}" >/dev/null || missing+=(g++)
    command -v "${CC:-cc}" >/dev/null || missing+=(gcc)
    command -v make >/dev/null || missing+=(make)
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || missing+=(python3-dev)
    [ ${#missing[@]} -eq 0 ] || fail 3 "missing to build Horovod: ${missing[*]}; get them, e.g.: apt-get install ${missing[*]}"

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    log=$work/log
    pip=("$python" -m pip --quiet --disable-pip-version-check)
    # Beside the environment, not in it: building must not change anybody's versions.
    tools=$work/tools
    tool_names=('setuptools<81' wheel packaging)
    command -v cmake >/dev/null || tool_names+=('cmake<4.2')
    "${pip[@]}" install --target "$tools" "${tool_names[@]}" >"$log" 2>&1 ||
        { tail -n 5 "$log" >&2; fail 4 "pip could not fetch the build tools ${tool_names[*]}"; }
    export PYTHONPATH=$tools PATH=$PATH:$tools/bin

    # pip refuses a file with another hash.
    echo "horovod==$version --hash=sha256:$sha256" >"$work/sources.txt"
    "${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation --dest "$work" -r "$work/sources.txt" >"$log" 2>&1 ||
        { tail -n 5 "$log" >&2; fail 4 "pip could not fetch the sources of horovod $version with SHA-256 $sha256"; }
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    sources=$work/horovod-$version

    patch_line() { # file, old, new: nothing to replace means that these are other sources
        grep -q -- "$2" "$sources/$1" || fail 5 "$1 of horovod $version has no '$2' to replace"
        sed -i "s|$2|$3|" "$sources/$1"
    }
    # torch's headers are C++20 now.
    patch_line CMakeLists.txt 'CMAKE_CXX_STANDARD 14' 'CMAKE_CXX_STANDARD 20'
    patch_line horovod/torch/CMakeLists.txt 'CMAKE_CXX_STANDARD 14' 'CMAKE_CXX_STANDARD 20'
    # distutils left Python with 3.12.
    patch_line horovod/torch/CMakeLists.txt 'from distutils.sysconfig import get_python_inc; print(get_python_inc())' \
        "import sysconfig; print(sysconfig.get_path('include'))"
    # Debug information is most of the time and size.
    patch_line setup.py "'RelWithDebInfo'" "'Release'"
    # What it needs at run time is not needed to build.
    patch_line setup.py 'setup_requires=require_list if is_build_action() else \[\]' 'setup_requires=[]'
    # Its torch part goes without.
    patch_line setup.py "require_list.append('cffi>=1.4.0')" 'pass'

    say "building horovod $version for $local_version, some minutes"
    (
        cd "$sources"
        export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_LOCAL_VERSION=$local_version
        # cmake 4 refuses what gloo asks for; gcc 13 no longer includes cstdint on its own; messages name source files.
        export CMAKE_POLICY_VERSION_MINIMUM=3.5
        export CXXFLAGS="${CXXFLAGS:-} -include cstdint -ffile-prefix-map=$work/="
        export MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
        "$python" setup.py --quiet bdist_wheel --dist-dir "$work/wheel"
    ) >"$log" 2>&1 || {
        mkdir -p "$cache"
        cp "$log" "$cache/build.log"
        grep -E 'error:|Error ' "$log" | head -n 5 >&2
        fail 5 "the build failed; see $cache/build.log"
    }
    mkdir -p "$cache"
    cp "$work"/wheel/*.whl "$cache/.part"
    mv "$cache/.part" "$cache/$(basename "$work"/wheel/*.whl)" # whole or not at all
    rm -f "$cache/build.log"
}

if reason=$(loads 2>&1); then
    say "horovod $version+$local_version is installed in $python"
    exit 0
fi
[ -n "$(wheel)" ] || build
unset PYTHONPATH
"$python" -m pip --quiet --disable-pip-version-check install --force-reinstall --no-deps "$(wheel)" ||
    fail 6 "pip could not install $(wheel)"
# The rest of what it imports; versions that are there stay.
"$python" -m pip --quiet --disable-pip-version-check install --constraint constraints.txt cloudpickle psutil pyyaml packaging ||
    fail 6 "pip could not install what horovod imports: cloudpickle psutil pyyaml packaging"
reason=$(loads 2>&1) || fail 6 "horovod is installed but does not load: $(tail -n 1 <<<"$reason"); remove $cache and try again"
say "installed $(basename "$(wheel)") in $python"
