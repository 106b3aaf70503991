"""What a user gets with ``pip install``: the wheel, its metadata and its dependencies."""

from __future__ import annotations

import ast
import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

import compile_library

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LARGEST_MODEL = 16 * 2**20
IMPORT_NAMES = {"cuda-bindings": "cuda", "cuda-core": "cuda", "scikit-image": "skimage"}
WITH_NAPARI = {"napari", "pint", "magicgui", "qtpy", "superqt", "psygnal", "vispy", "npe2", "pandas", "app_model"}
SOURCE_PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def copy_sources(folder: Path, *left_out: str) -> Path:
    """What a build needs, apart from the checkout so that nothing stale gets in and nothing is left behind."""
    folder.mkdir(parents=True)
    for name in SOURCE_PARTS:
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_ops_cpu.*", *left_out)
    for name in ("_build", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def build_wheel(folder: Path, **variables: str) -> zipfile.ZipFile:
    """The wheel that pip makes of a folder, with environment variables of its own."""
    shutil.rmtree(folder / "dist", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = {**os.environ, **variables}
    command += [str(folder / "dist"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, from a folder with a space in its name."""
    return build_wheel(copy_sources(tmp_path_factory.mktemp("build") / "my sources"))


@pytest.fixture(scope="module")
def cxx() -> list[str]:
    """Command of this machine's C++ compiler."""
    command = compile_library.find_compiler()
    if command is None and os.environ.get("CI") != "true":
        pytest.skip("there is no C++ compiler")
    assert command is not None
    return command


@pytest.fixture
def light_sources(tmp_path: Path) -> Path:
    """What a build needs but the models, which take their time to pack."""
    return copy_sources(tmp_path / "sources", "*.safetensors")


def libraries(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if PurePosixPath(name).name.startswith("_ops_cpu.")]


def tag(wheel: zipfile.ZipFile) -> str:
    assert wheel.filename is not None
    return Path(wheel.filename).stem.split("-", 2)[2]


def read_metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def requirement_names(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name for requirement in requirements}


def test_the_wheel_with_the_library_is_for_this_platform_and_every_python(
    cxx: list[str], wheel: zipfile.ZipFile
) -> None:
    assert libraries(wheel) == [f"napari_mrcnn3d/_ops/{compile_library.library_name()}"]
    system = sysconfig.get_platform().split("-")[0]
    assert tag(wheel).startswith(f"py3-none-{system}_")  # never manylinux: it may need a glibc as new as this one


def test_the_library_in_the_wheel_can_be_loaded_and_shows_nothing_but_our_functions(
    cxx: list[str], wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    library = ctypes.CDLL(wheel.extract(libraries(wheel)[0], tmp_path))
    library.mrcnn3d_signature.restype = ctypes.c_char_p
    assert library.mrcnn3d_signature() == b"napari-mrcnn3d ops"
    if "-static-libstdc++" in cxx:
        assert not hasattr(library, "__cxa_throw")  # of the C++ runtime inside


def test_without_the_library_the_wheel_is_for_every_platform(light_sources: Path) -> None:
    build_wheel(light_sources)  # whose leftovers must not get into the next
    plain = build_wheel(light_sources, NAPARI_MRCNN3D_NO_EXT="1")
    assert tag(plain) == "py3-none-any"
    assert not libraries(plain)


def test_a_compiler_that_fails_does_not_fail_the_installation(light_sources: Path, tmp_path: Path) -> None:
    (tmp_path / "ziglang.py").write_text("raise SystemExit(1)")
    plain = build_wheel(light_sources, CXX=str(tmp_path / "no compiler"), PYTHONPATH=str(tmp_path))
    assert tag(plain) == "py3-none-any"
    assert not libraries(plain)


def test_sources_that_may_only_be_read_stay_as_they_are(light_sources: Path, tmp_path: Path) -> None:
    before = sorted(light_sources.rglob("*"))
    build = "import os, sys; os.access = lambda *_, **__: False; import backend; backend.build_wheel(sys.argv[1])"
    environment = {
        **os.environ,
        "NAPARI_MRCNN3D_NO_EXT": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(light_sources / "_build"),
    }
    command = [sys.executable, "-c", build, str(tmp_path / "dist")]
    subprocess.run(command, cwd=light_sources, env=environment, capture_output=True, check=True)
    assert len(list((tmp_path / "dist").glob("*.whl"))) == 1
    assert sorted(light_sources.rglob("*")) == before


def test_the_source_archive_holds_what_compiling_needs_and_no_library(light_sources: Path, tmp_path: Path) -> None:
    kernels = light_sources / "src" / "napari_mrcnn3d" / "_ops"
    (kernels / compile_library.library_name()).touch()
    command = [sys.executable, "-c", "import backend, sys; backend.build_sdist(sys.argv[1])", str(tmp_path / "dist")]
    environment = {**os.environ, "PYTHONPATH": str(light_sources / "_build")}
    subprocess.run(command, cwd=light_sources, env=environment, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in file.getnames()}
    needed = [*(ROOT / "_build").glob("*.py"), *(ROOT / "src/napari_mrcnn3d/_ops/csrc").iterdir()]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert not [name for name in names if "_ops_cpu." in name]


def test_the_wheel_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert tops == {"napari_mrcnn3d", f"napari_mrcnn3d-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "napari_mrcnn3d").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


@pytest.mark.parametrize("name", ["napari.yaml", "py.typed"])
def test_the_wheel_holds_what_is_no_python(wheel: zipfile.ZipFile, name: str) -> None:
    assert f"napari_mrcnn3d/{name}" in wheel.namelist()


def test_the_wheel_holds_the_text_of_the_cuda_kernels_and_no_source_that_is_compiled(wheel: zipfile.ZipFile) -> None:
    csrc = {PurePosixPath(name).name for name in wheel.namelist() if "/csrc/" in name}
    assert "common.h" in csrc
    assert {PurePosixPath(name).suffix for name in csrc} == {".h", ".cuh"}


def test_nothing_is_needed_for_building_but_setuptools() -> None:
    assert requirement_names(PYPROJECT["build-system"]["requires"]) == {"setuptools"}


def test_the_wheel_holds_the_models_and_they_are_small(wheel: zipfile.ZipFile) -> None:
    sizes = {
        PurePosixPath(i.filename).stem: i.file_size for i in wheel.infolist() if i.filename.endswith(".safetensors")
    }
    assert {"embryo-nuclei", "toy-shapes"} <= set(sizes)
    assert max(sizes.values()) <= LARGEST_MODEL


def test_the_entry_points_lead_somewhere(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    text = wheel.read(name).decode()
    assert "[napari.manifest]\nnapari-mrcnn3d = napari_mrcnn3d:napari.yaml" in text
    assert "[console_scripts]\nmrcnn3d = napari_mrcnn3d.cli:main" in text


def test_the_metadata_say_licence_platform_and_framework(wheel: zipfile.ZipFile) -> None:
    metadata = read_metadata(wheel)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Framework :: napari" in metadata.get_all("Classifier", [])


def test_dependencies_have_no_upper_bounds_and_the_base_no_screen() -> None:
    every = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    assert not [r for r in every if any(part.operator != ">=" for part in Requirement(r).specifier)]
    assert not requirement_names(PROJECT["dependencies"]) & {"napari", "magicgui", "qtpy", "pyqt6", "pyside6"}


def test_everything_imported_is_a_declared_dependency() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in requirement_names(PROJECT["dependencies"])}
    undeclared = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        allowed = declared | WITH_NAPARI if "widgets" in path.parts else declared
        strangers = third_party(path) - allowed
        if strangers:
            undeclared[path.name] = strangers
    assert not undeclared


def third_party(path: Path) -> set[str]:
    """Top-level packages that a file imports and that come neither with Python nor with us."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"napari_mrcnn3d"}


def test_what_the_tests_run_with_satisfies_what_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert requirement_names(PROJECT["dependencies"]) <= set(pins)
    assert not [line for line in lines if "://" in line or "@" in line]


def test_the_manifest_at_the_root_is_the_packages_own() -> None:
    assert (ROOT / "napari.yaml").resolve() == ROOT / "src" / "napari_mrcnn3d" / "napari.yaml"
