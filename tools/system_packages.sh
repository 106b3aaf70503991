#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that are missing for what is asked for, and touches nothing when none is.
#
#   tools/system_packages.sh [qt] [xvfb] [venv=python3.12]
#
# Exit code 3: something is missing and cannot be installed here; one sentence says what and how.
set -euo pipefail

# shared library -> Debian package: what Qt 6 and OpenGL wheels link against
qt_libraries="
  libGL.so.1:libgl1 libEGL.so.1:libegl1 libGLX_mesa.so.0:libglx-mesa0 libglib-2.0.so.0:libglib2.0-0
  libfontconfig.so.1:libfontconfig1 libfreetype.so.6:libfreetype6 libdbus-1.so.3:libdbus-1-3
  libxkbcommon.so.0:libxkbcommon0 libxkbcommon-x11.so.0:libxkbcommon-x11-0 libX11-xcb.so.1:libx11-xcb1
  libxcb-cursor.so.0:libxcb-cursor0 libxcb-icccm.so.4:libxcb-icccm4 libxcb-image.so.0:libxcb-image0
  libxcb-keysyms.so.1:libxcb-keysyms1 libxcb-randr.so.0:libxcb-randr0 libxcb-render-util.so.0:libxcb-render-util0
  libxcb-shape.so.0:libxcb-shape0 libxcb-sync.so.1:libxcb-sync1 libxcb-xfixes.so.0:libxcb-xfixes0
  libxcb-xkb.so.1:libxcb-xkb1 libxcb-glx.so.0:libxcb-glx0"

missing=()

need_libraries() {
  local known pair
  known=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p)
  for pair in $qt_libraries; do
    grep -qF "${pair%%:*} " <<<"$known" || missing+=("${pair##*:}")
  done
  if ! compgen -G '/usr/lib/*/dri/*_dri.so' >/dev/null; then missing+=(libgl1-mesa-dri); fi
}

for part in "$@"; do
  case $part in
    qt) [ "$(uname)" = Linux ] && need_libraries ;;
    xvfb)
      command -v xvfb-run >/dev/null && command -v Xvfb >/dev/null || missing+=(xvfb)
      command -v xauth >/dev/null || missing+=(xauth)
      ;;
    venv=*) missing+=("${part#venv=}-venv") ;;
    *) echo "usage: $0 [qt] [xvfb] [venv=PYTHON]" >&2; exit 2 ;;
  esac
done
[ ${#missing[@]} -gt 0 ] || exit 0

lacking() {
  echo "mrcnn3d: These system packages are missing and $1: ${missing[*]}. Ask whoever looks after this machine for:" \
    "sudo apt-get install ${missing[*]}" >&2
  exit 3
}

command -v apt-get >/dev/null || lacking "this is no Debian or Ubuntu (look for the same libraries in your system)"
root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || lacking "there are no rights to install them"
  root=(sudo)
  [ -t 0 ] || root=(sudo -n)
  "${root[@]}" true 2>/dev/null || lacking "there are no rights to install them"
fi
echo "==> Installing system packages: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq)
if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  lacking "could not be installed"
fi
