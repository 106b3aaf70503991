"""What a user gets with ``pip install``: the wheel, its metadata and its dependencies."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LARGEST_MODEL = 16 * 2**20
IMPORT_NAMES = {"scikit-image": "skimage"}
WITH_NAPARI = {"napari", "pint", "magicgui", "qtpy", "superqt", "psygnal", "vispy", "npe2", "pandas", "app_model"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy so that nothing stale gets in and nothing is left behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, str(folder / "dist"), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def read_metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def requirement_names(requirements: list[str]) -> set[str]:
    return {requirement.split(">=")[0] for requirement in requirements}


def test_the_wheel_runs_everywhere_and_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert wheel.filename.endswith("-py3-none-any.whl")
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert tops == {"napari_mrcnn3d", f"napari_mrcnn3d-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "napari_mrcnn3d").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


@pytest.mark.parametrize("name", ["napari.yaml", "py.typed"])
def test_the_wheel_holds_what_is_no_python(wheel: zipfile.ZipFile, name: str) -> None:
    assert f"napari_mrcnn3d/{name}" in wheel.namelist()


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
    assert not [r for r in every if "<" in r or "==" in r or "~" in r]
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
