"""Compile the operations for the processor into one shared library: the one place that knows sources, flags and names.

    python _build/compile_library.py [--target ZIG-TRIPLE] [--output FILE]

The library has a plain C interface and knows neither Python nor PyTorch, so one file serves every version of both.
With a target zig's compiler is used (package ziglang), otherwise this machine's own, and zig's where there is none.
On Windows that is always zig's, unless CXX names another: it is what the released wheels are made with, and it finds
its headers and libraries by itself.

CXX names the compiler, maybe with arguments; it must understand g++'s options. NAPARI_MRCNN3D_NO_EXT=1 leaves the
library out.
Exit codes: 0 compiled, or left out as wished; 1 compiling failed; 3 there is no compiler.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "napari_mrcnn3d._ops"
FOLDER = ROOT.joinpath("src", *PACKAGE.split("."))
STEM = "_ops_cpu"
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "win_amd64": "x86_64-windows-gnu",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "macosx_10_15_x86_64": "x86_64-macos.10.15",
}
"""Platform tags of the released wheels and what zig calls them."""

SUFFIXES = {"linux": ".so", "windows": ".dll", "macos": ".dylib"}

# No flag for a processor: the files choose their instruction sets by pragma. No fused multiply-add: it would decide
# ties of the suppression differently from the other devices.
FLAGS = ["-O3", "-std=c++17", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
EXPORTS = "exports.map"
EXPORTS_TEXT = "{ global: mrcnn3d_*; local: *; };\n"
"""Keeps the C++ runtime inside the library, away from the one that PyTorch brings."""

SYSTEM_FLAGS = {
    "linux": ["-fPIC", "-pthread", "-s", f"-Wl,--version-script={EXPORTS}"],
    "windows": ["-s"],
    "macos": ["-fPIC"],
}
# The C++ runtime goes into the library, so that it cannot meet an older one in the process. Some distributions ship no
# static one; what is compiled there is used there, and may share the system's.
RUNTIMES: dict[str, list[list[str]]] = {
    "linux": [["-static-libstdc++", "-static-libgcc"], []],
    "windows": [["-static"]],
    "macos": [[]],
}

PROBE = '#include <thread>\nextern "C" void mrcnn3d_probe() { std::thread([] {}).join(); }\n'


class CompileError(Exception):
    """Why there is no library, as one sentence."""


class NoCompilerError(CompileError):
    """There is nothing to compile with."""


def is_unwanted() -> bool:
    """Whether NAPARI_MRCNN3D_NO_EXT asks for an installation without the library."""
    return os.environ.get("NAPARI_MRCNN3D_NO_EXT", "") not in ("", "0")


def sources() -> list[Path]:
    """Files that are compiled."""
    return sorted((FOLDER / "csrc").glob("cpu_*.cpp"))


def dependencies() -> list[Path]:
    """Files besides the sources that a library must not be older than."""
    csrc = FOLDER / "csrc"
    return [*sorted([*csrc.glob("*.h"), *csrc.glob("*.inl")]), Path(__file__).resolve()]


def library_name(target: str | None = None) -> str:
    """File name of the library on this machine or on a target of zig's."""
    return STEM + SUFFIXES[_system(target)]


def _system(target: str | None = None) -> str:
    if target:
        return next((system for system in SUFFIXES if f"-{system}" in target), "linux")
    return {"win32": "windows", "darwin": "macos"}.get(sys.platform, "linux")


# ---------------------------------------------------------------------------------------------- compilers


def find_compiler() -> list[str] | None:
    """Command of this machine's C++ compiler, flags included; None if there is none that works."""
    system = _system()
    for compiler in _installed_compilers():
        for runtime in RUNTIMES[system]:
            command = [*compiler, *FLAGS, *SYSTEM_FLAGS[system], *runtime]
            if _works(command):
                return command
    return None


def _installed_compilers() -> Iterator[list[str]]:
    named = os.environ.get("CXX")
    if named:
        yield [named] if shutil.which(named) else shlex.split(named, posix=os.name != "nt")
    elif _system() != "windows" and not _is_placeholder():
        for name in ("c++", "g++", "clang++"):
            path = shutil.which(name)
            if path:
                yield [path]


def _is_placeholder() -> bool:
    """Whether calling c++ would open macOS's offer to install the developer tools instead of compiling."""
    if _system() != "macos":
        return False
    return subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode != 0


def _works(command: list[str]) -> bool:
    with tempfile.TemporaryDirectory(prefix="mrcnn3d-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE, encoding="utf-8")
        try:
            _run([*command, str(source), "-o", "probe.out"], Path(folder), capture_output=True)
        except CompileError:
            return False
        return Path(folder, "probe.out").is_file()


def _zig(target: str | None) -> list[str] | None:
    """Command of zig's C++ compiler, flags included; None if the package ziglang is not here."""
    if find_spec("ziglang") is None:
        return None
    # Left to itself zig compiles for this very processor, and the library would crash on an older one.
    machine = ["-target", target] if target else ["-mcpu=baseline"]
    return [sys.executable, "-m", "ziglang", "c++", *machine, "-s", *FLAGS, *SYSTEM_FLAGS[_system(target)]]


# ---------------------------------------------------------------------------------------------- compiling


def compile_library(output: Path, target: str | None = None) -> Path:
    """Compile the library.

    Parameters
    ----------
    output : Path
    target : str, optional
        What zig calls the platform to compile for; this machine by default.

    Returns
    -------
    Path
        The output.

    Raises
    ------
    NoCompilerError
        If nothing is there to compile with.
    CompileError
        If the compiler fails or the file cannot be written. Nothing is left at ``output`` then, not even what was
        there before: a library must not be older than its sources.
    """
    try:
        command = _command(target)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mrcnn3d-", dir=output.parent) as folder:
            _run([*command, *map(str, sources()), "-o", output.name], Path(folder))
            Path(folder, output.name).replace(output)
    except (CompileError, OSError) as error:
        with suppress(OSError):
            output.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CompileError(f"{output.name} cannot be written: {error.strerror or error}") from error
        raise
    return output


def _command(target: str | None) -> list[str]:
    command = _zig(target) if target else find_compiler() or _zig(None)
    if command is not None:
        return command
    if target:
        raise NoCompilerError(f"there is no compiler for {target}: install the package ziglang")
    named = os.environ.get("CXX")
    remedy = f"CXX={named} does not compile C++17" if named else "install one (for example g++) or name it in CXX"
    raise NoCompilerError(f"there is no working C++ compiler: {remedy}")


def _run(command: list[str], folder: Path, *, capture_output: bool = False) -> None:
    """Run a compiler in a folder; what zig would cache in the user's home goes away with it."""
    (folder / EXPORTS).write_text(EXPORTS_TEXT, encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="mrcnn3d-") as cache:
        environment = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, **os.environ}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=capture_output, check=False)
        except OSError as error:
            raise CompileError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    if done.returncode:
        raise CompileError(f"{command[0]} failed with exit code {done.returncode}")


def main() -> int:
    """Command line: compile, and say where the library is or why there is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", metavar="ZIG-TRIPLE", help="compile with zig for this platform")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: beside the package's Python files")
    arguments = parser.parse_args()
    output = arguments.output or FOLDER / library_name(arguments.target)
    if is_unwanted():
        print("NAPARI_MRCNN3D_NO_EXT is set: nothing is compiled.")
        return 0
    try:
        print(f"Compiled {compile_library(output.absolute(), arguments.target)}")
    except CompileError as error:
        print(f"{output.name} was not compiled: {error}.", file=sys.stderr)
        return 3 if isinstance(error, NoCompilerError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
