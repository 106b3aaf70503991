#!/usr/bin/env bash
# Runs all tests, those that open windows on a virtual display.
#
#   tools/run_tests.sh PYTHON [pytest arguments]
#
# Where Xvfb or Qt's libraries are missing and cannot be installed, a person gets the other tests and is told so; CI fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
export NAPARI_ENSURE_PLUGIN_MAIN_THREAD=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

if tools/system_packages.sh qt xvfb; then
  echo "==> Running all tests, windows on a virtual display"
  exec xvfb-run -a -s "-screen 0 1600x1200x24" "$python" -m pytest "$@"
elif [ "${CI:-}" = true ]; then
  echo "mrcnn3d: In CI every test must run: the packages named above are needed." >&2
  exit 1
fi
echo "==> Running the tests that open no window; the others were left out for the reason above"
exec "$python" -m pytest -m "not gui" "$@"
