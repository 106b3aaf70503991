#!/usr/bin/env bash
# Builds the source archive and the wheels of a release on one Linux machine, and checks each wheel.
#
#   tools/build_wheels.sh PYTHON [PLATFORM ...]      platforms as wheels name them; without any: all
#
# They come into dist/, or where DIST says. zig's compiler and what it keeps stay in build/zig, so that the next time
# takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
python=$1
shift
dist=${DIST:-dist}
home=$PWD/build/zig
tool=$home/environment/bin/python
tools=(ziglang==0.17.0 setuptools==84.2.1 lief==1.0.0)
export ZIG_GLOBAL_CACHE_DIR=$home/cache ZIG_LOCAL_CACHE_DIR=$home/cache

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

say() { printf '==> %s\n' "$*"; }

fetch_tools() {
  if [ "$(cat "$home/tools" 2>/dev/null)" = "${tools[*]}" ]; then return; fi
  say "Fetching zig's compiler into build/zig (about 100 MB)"
  "$python" -m venv --clear "$home/environment"
  "$tool" -m pip install --quiet "${tools[@]}"
  echo "${tools[*]}" >"$home/tools"
}

# From a copy: setuptools remembers what earlier builds left in the checkout.
make_source_archive() {
  cp -R pyproject.toml setup.py MANIFEST.in README.md LICENSE _build src "$copy"
  rm -rf "$copy"/src/*.egg-info
  (cd "$copy" && PYTHONPATH=_build "$tool" -c 'import backend; backend.build_sdist("dist")' >log 2>&1) ||
    { cat "$copy/log" >&2; exit 1; }
  mkdir -p "$dist"
  archive=$dist/$(basename "$copy"/dist/*.tar.gz)
  mv "$copy"/dist/*.tar.gz "$archive"
}

make_wheel() {
  "$tool" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$dist" \
    --config-settings="--build-option=--plat-name=$1" "$archive"
}

fetch_tools
if [ $# -eq 0 ]; then
  list='from compile_library import TARGETS; print(*TARGETS, sep="\n")'
  mapfile -t platforms < <(PYTHONPATH=_build "$tool" -c "$list")
  set -- "${platforms[@]}"
fi
say "Packing the source archive"
make_source_archive
wheels=()
for platform in "$@"; do
  say "Building the wheel for $platform"
  make_wheel "$platform"
  wheels+=("${archive%.tar.gz}-py3-none-$platform.whl")
done
say "Checking what the wheels hold"
"$tool" tools/check_wheels.py "${wheels[@]}"
