"""Check that wheels hold what their names promise, and a library that runs wherever pip would install it.

    python tools/check_wheels.py WHEEL ...

Needs the package lief, which reads the libraries of all systems.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import lief

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "src" / "napari_mrcnn3d" / "_ops" / "csrc" / "cpu_api.cpp"
PLATFORM = re.compile(r"(manylinux|macosx|win)_(?:(\d+)_(\d+)_)?(x86_64|aarch64|arm64|amd64)$")
MACHINES = {
    ("manylinux", "x86_64"): lief.ELF.ARCH.X86_64,
    ("manylinux", "aarch64"): lief.ELF.ARCH.AARCH64,
    ("win", "amd64"): lief.PE.Header.MACHINE_TYPES.AMD64,
    ("macosx", "arm64"): lief.MachO.Header.CPU_TYPE.ARM64,
    ("macosx", "x86_64"): lief.MachO.Header.CPU_TYPE.X86_64,
}
# What each system has by itself; for Windows from version 10 on.
SYSTEM_LIBRARIES = {
    "manylinux": r"lib(c|m|pthread|dl|rt)\.so\.\d|ld-linux-[\w-]+\.so\.\d",
    "win": r"(?i:kernel32|ntdll|api-ms-win-crt-[\w-]+)\.dll",
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
}
# macOS's linker cannot hide these; they mean the same in every library.
SHARED_BY_ALL = re.compile(r"_Z(n|d)[wal]|_mh_dylib_header|__dso_handle")


def find_problems(path: Path) -> Iterator[str]:
    """Sentences on what is wrong with a wheel."""
    tag = path.stem.split("-", 2)[2]
    match = PLATFORM.search(tag)
    if match is None or not tag.startswith("py3-none-"):
        yield f"{tag} is none of the platforms that are released"
        return
    with zipfile.ZipFile(path) as wheel:
        yield from check_record(wheel)
        (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
        if f"Tag: {tag}" not in wheel.read(about).decode().splitlines():
            yield "its tags differ from its name"
        libraries = [name for name in wheel.namelist() if PurePosixPath(name).suffix in {".so", ".dll", ".dylib"}]
        if len(libraries) != 1:
            yield f"it holds {len(libraries)} libraries instead of one"
            return
        binary = lief.parse(wheel.read(libraries[0]))
    system, machine = match[1], match[4]
    if machine_of(binary) != MACHINES[system, machine]:
        yield f"the library is made for {machine_of(binary)}"
        return
    yield from check_interface(binary, system)
    if system != "win":
        yield from check_oldest_system(binary, system, (int(match[2]), int(match[3])))


def check_record(wheel: zipfile.ZipFile) -> Iterator[str]:
    """Compare the list of contents with the contents."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
    recorded = {row[0]: row[1] for row in csv.reader(wheel.read(name).decode().splitlines())}
    if recorded.keys() != set(wheel.namelist()):
        yield "RECORD lists other files than there are"
    for file, expected in recorded.items():
        if file != name and file in wheel.namelist():
            digest = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(file)).digest()).rstrip(b"=").decode()
            if expected != f"sha256={digest}":
                yield f"RECORD has another hash for {file}"


def machine_of(binary: lief.Binary) -> object:
    """Processor family, which each file format calls differently."""
    names = {"ELF": "machine_type", "PE": "machine", "MACHO": "cpu_type"}
    return getattr(binary.header, names[binary.format.name])


def check_interface(binary: lief.Binary, system: str) -> Iterator[str]:
    """Check what is exported and what is needed."""
    exported = {function.name.removeprefix("_" if system == "macosx" else "") for function in binary.exported_functions}
    expected = set(re.findall(r"^MRCNN3D_EXPORT .*?\b(mrcnn3d_\w+)\(", API.read_text(encoding="utf-8"), re.MULTILINE))
    if missing := expected - exported:
        yield f"the library lacks {sorted(missing)}"
    if extra := {name for name in exported - expected if system != "macosx" or not SHARED_BY_ALL.match(name)}:
        yield f"the library also exports {sorted(extra)[:5]}"
    needed = [getattr(library, "name", library) for library in binary.libraries]
    if system == "macosx":
        needed = needed[1:]  # the first is its own name
    if foreign := [name for name in needed if not re.fullmatch(SYSTEM_LIBRARIES[system], name)]:
        yield f"the library needs {foreign}"


def check_oldest_system(binary: lief.Binary, system: str, promised: tuple[int, int]) -> Iterator[str]:
    """Check which version of glibc or macOS the library needs at least."""
    if system == "manylinux":
        names = {part.name for need in binary.symbols_version_requirement for part in need.get_auxiliary_symbols()}
        versions = [tuple(map(int, name[6:].split("."))) for name in names if re.fullmatch(r"GLIBC_[\d.]+", name)]
        if len(versions) < len(names):
            yield f"the library needs symbols of {sorted(names)}"
    else:
        versions = [tuple(binary.build_version.minos[:2])]
        if binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64 and not binary.has_code_signature:
            yield "the library is not signed, macOS would refuse to load it"
    if max(versions) > promised:
        yield f"the library needs version {'.'.join(map(str, max(versions)))} of the system"


def main(paths: list[str]) -> int:
    """Print a line for each wheel; exit code 1 if one breaks its promise."""
    lief.logging.disable()
    failed = False
    for path in map(Path, paths):
        problems = list(find_problems(path))
        failed = failed or bool(problems)
        print(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB): {'; '.join(problems) or 'as its name promises'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
