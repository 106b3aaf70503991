#!/usr/bin/env bash
# Installs the package into fresh environments as users on Linux do, and asks each whether its operations answer:
#
#   with a C++ compiler; without one, so that pip fetches zig's as a build requirement; without one and with no zig on
#   offer; and from the wheel of tools/build_wheels.sh, against which the tests of the operations run too.
#
#   tools/check_install.sh PYTHON
#
# PYTHON is the interpreter of the test environment. It lends PyTorch and the rest to the fresh ones once the package is
# there, so that pip brings no more than the package and what building it takes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
unset CXX NAPARI_MRCNN3D_NO_EXT NAPARI_MRCNN3D_OPS
python=$1
platform=manylinux_2_17_$(uname -m)
work=$(mktemp -d -t "mrcnn3d install XXXXXX")
trap 'rm -rf "$work"' EXIT
empty=$work/nothing
setuptools=$work/setuptools
mkdir "$empty" "$setuptools"

say() { printf '==> %s\n' "$*"; }

# install NAME WHAT [VARIABLE=VALUE ...]: what pip installs, into a new environment, with variables of its own
install() {
  local name=$1 what=$2
  shift 2
  "$python" -m venv "$work/$name"
  env "$@" "$work/$name/bin/python" -m pip install --quiet --no-deps "$what"
}

lend() {
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$python" -c "$packages" >"$("$work/$1/bin/python" -c "$packages")/lent.pth"
}

# ask NAME compiled|plain: do the operations answer, and with the kernels expected?
ask() {
  lend "$1"
  (cd "$empty" && "$work/$1/bin/python" -I - "$work/$1" "$2") <<'PYTHON'
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch

import napari_mrcnn3d
from napari_mrcnn3d._ops import _backends, _cpu, nms_3d, roi_align_3d

environment, expected = sys.argv[1:]
if not Path(napari_mrcnn3d.__file__).is_relative_to(environment):
    sys.exit(f"{napari_mrcnn3d.__file__} is not what was installed")
tag = distribution("napari-mrcnn3d").read_text("WHEEL").split("Tag: ")[1].strip()
problem = _cpu.problem(torch.device("cpu"))
if (problem is None, tag != "py3-none-any") != (expected == "compiled",) * 2:
    sys.exit(f"expected {expected} operations, found {tag}: {problem}")
boxes = torch.tensor([[0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [8, 8, 8, 9, 9, 9.0]])
kept = nms_3d(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
ramp = torch.arange(16.0).expand(1, 1, 16, 16, 16)
centres = roi_align_3d(ramp, boxes[:1], torch.tensor([0]), (2, 2, 2), (1.0, 1.0, 1.0), 2)[0, 0, 0, 0].tolist()
if kept != [1, 2] or centres != [0.5, 2.5]:
    sys.exit(f"wrong answers: {kept}, {centres}")
print(f"    {tag}: {_backends.describe(torch.device('cpu'))}")
PYTHON
}

say "Building the source archive and the Linux wheel"
DIST=$work/dist tools/build_wheels.sh "$python" "$platform"
mkdir "$work/source"
tar -xzf "$work"/dist/*.tar.gz -C "$work/source" --strip-components=1
"$python" -m pip download --quiet --no-deps --dest "$setuptools" "setuptools>=77"

say "Installing from source with a C++ compiler"
install compiler "$work/source"
ask compiler compiled

say "Installing from source without one: pip fetches zig's"
install zig "$work/source" PATH="$empty"
ask zig compiled

say "Installing from source with neither"
install neither "$work/source" PATH="$empty" PIP_NO_INDEX=1 PIP_FIND_LINKS="file://${setuptools// /%20}"
ask neither plain

say "Installing the wheel and running the tests of the operations against it"
install wheel "$work"/dist/*.whl
ask wheel compiled
# NVRTC is looked for in the environment itself, not in what it is lent: `make test` has seen to that part.
"$work/wheel/bin/python" -m pytest -q -p no:cacheprovider --ignore tests/ops/test_nvrtc.py tests/ops
