#!/usr/bin/env bash
# Makes the virtual environment of the Makefile. Every step says in one line what it does.
#
#   tools/setup_env.sh torch VENV            the environment, and PyTorch in the version of constraints.txt
#   tools/setup_env.sh package VENV EXTRA    this package from the checkout, with one of its extras
#   tools/setup_env.sh library VENV          its operations compiled for this machine's processor; 1 if that fails
#
# Packages come from wherever pip is configured to look. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '==> %s\n' "$*"; }
fail() { printf 'mrcnn3d: %s\n' "$*" >&2; exit 1; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "No Python 3.11 or newer was found (looked for ${PYTHON:-python3, python3.13, python3.12, python3.11}):" \
    "install one, for example with 'sudo apt-get install python3', or name it: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
  local venv=$1 python
  if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  python=$(find_python)
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    tools/system_packages.sh "venv=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no 'venv' module:" \
      "install it (Debian, Ubuntu: sudo apt-get install python3-venv) or choose another Python with PYTHON=..."
  fi
  say "Making a Python environment in $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
  local python=$1/bin/python wanted
  wanted=$(grep -m1 '^torch==' constraints.txt)
  if "$python" -m pip show torch 2>/dev/null | grep -q "^Version: ${wanted#torch==}\(+\|$\)"; then
    return
  fi
  say "Installing PyTorch ${wanted#torch==} (the largest part: some minutes the first time)"
  if [ "$(uname)" = Linux ] && ! has_gpu; then # the processor-only build is ten times smaller, where it is on offer
    "$python" -m pip install --quiet "$wanted+cpu" 2>/dev/null && return
  fi
  "$python" -m pip install --quiet "$wanted"
}

install_package() {
  local python=$1/bin/python extra=$2
  say "Installing napari-mrcnn3d with what it needs ($extra)"
  NAPARI_MRCNN3D_NO_EXT=1 "$python" -m pip install --quiet --constraint constraints.txt --editable ".[$extra]"
}

compile_library() {
  local python=$1/bin/python status=0
  say "Compiling the operations for the processor"
  "$python" _build/compile_library.py >/dev/null || status=$?
  if [ $status -eq 3 ]; then
    say "Fetching zig's compiler for that (about 100 MB)"
    status=0
    "$python" -m pip install --quiet --no-deps --editable . || status=$?
  fi
  if [ $status -ne 0 ]; then
    say "Going on without them: the same results, but slower"
    return 1
  fi
}

case ${1:-} in
  torch)
    make_venv "$2"
    install_torch "$2"
    ;;
  package) install_package "$2" "$3" ;;
  library) compile_library "$2" ;;
  *) fail "usage: $0 torch VENV | package VENV EXTRA | library VENV" ;;
esac
