"""The napari manifest: it is valid, all its ids exist, and what it names can be imported without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

npe2 = pytest.importorskip("npe2")
yaml = pytest.importorskip("yaml")

NAME = "napari-mrcnn3d"
FILE = Path(__file__).resolve().parents[1] / "src" / "napari_mrcnn3d" / "napari.yaml"
OPEN_MENUS = {"new_layer", "io_utilities", "acquire"}
OPEN_LAYER_MENUS = {
    "visualize", "annotate", "data", "metadata", "layer_type", "transform", "measure", "filter", "register", "project",
    "segment", "track", "classify",
}  # fmt: skip
"""Menus of napari 0.9 that plugins may add to; entries of any other are ignored without a word."""


@pytest.fixture
def contributions() -> dict[str, Any]:
    return deepcopy(yaml.safe_load(FILE.read_text(encoding="utf-8"))["contributions"])


def entries(contributions: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry that refers to something, with the name of its section or menu."""
    for section in ("widgets", "readers", "writers", "sample_data"):
        yield from ((section, entry) for entry in contributions.get(section, []))
    for menu, items in contributions.get("menus", {}).items():
        yield from ((menu, item) for item in items)


def unknown_ids(contributions: dict[str, Any]) -> set[str]:
    """Ids of commands, submenus and menus that are used and not defined: napari would leave them out silently."""
    commands = {command["id"] for command in contributions["commands"]}
    submenus = {submenu["id"] for submenu in contributions.get("submenus", [])}
    wrong = set()
    for _place, entry in entries(contributions):
        if "command" in entry and entry["command"] not in commands:
            wrong.add(entry["command"])
        if "submenu" in entry and entry["submenu"] not in submenus:
            wrong.add(entry["submenu"])
    known = submenus | {f"napari/file/{m}" for m in OPEN_MENUS} | {f"napari/layers/{m}" for m in OPEN_LAYER_MENUS}
    return wrong | (set(contributions.get("menus", {})) - known)


def test_npe2_accepts_it_and_can_import_everything() -> None:
    command = [sys.executable, "-m", "npe2", "validate", "--imports", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_napari_finds_it() -> None:
    (entry,) = entry_points(group="napari.manifest", name=NAME)
    assert entry.value == "napari_mrcnn3d:napari.yaml"
    assert yaml.safe_load(FILE.read_text(encoding="utf-8"))["name"] == NAME


def test_every_id_is_defined(contributions: dict[str, Any]) -> None:
    assert unknown_ids(contributions) == set()


@pytest.mark.parametrize("section", ["widgets", "readers", "writers", "sample_data", "napari-mrcnn3d.menu"])
def test_the_check_sees_an_unknown_command(contributions: dict[str, Any], section: str) -> None:
    for place, entry in entries(contributions):
        if place == section:
            entry["command"] = "napari-mrcnn3d.no_such_command"
    assert unknown_ids(contributions) == {"napari-mrcnn3d.no_such_command"}


def test_the_check_sees_an_unknown_submenu_or_menu(contributions: dict[str, Any]) -> None:
    contributions["menus"]["napari/layers/segment"][0]["submenu"] = "napari-mrcnn3d.nowhere"
    contributions["menus"]["napari/nowhere"] = []
    assert unknown_ids(contributions) == {"napari-mrcnn3d.nowhere", "napari/nowhere"}


def test_every_command_is_used_and_has_a_title_for_people(contributions: dict[str, Any]) -> None:
    used = {entry.get("command") for _place, entry in entries(contributions)}
    for command in contributions["commands"]:
        assert command["id"] in used
        assert command["id"].startswith(f"{NAME}.")
        assert command["title"][0].isupper()
        assert "mrcnn" not in command["title"].replace("(.mrcnn3d)", "").lower()
        assert "_" not in command["title"]


def test_tiff_files_are_left_to_napari(contributions: dict[str, Any]) -> None:
    patterns = [pattern for reader in contributions["readers"] for pattern in reader["filename_patterns"]]
    assert patterns == ["*.mrcnn3d"]


def test_labels_are_written_one_layer_at_a_time(contributions: dict[str, Any]) -> None:
    (writer,) = contributions["writers"]
    assert writer["layer_types"] == ["labels"]
    assert set(writer["filename_extensions"]) == {".tif", ".tiff"}


def test_opening_any_of_it_imports_no_torch(contributions: dict[str, Any]) -> None:
    modules = {command["python_name"].split(":")[0] for command in contributions["commands"]}
    code = f"import sys, {', '.join(sorted(modules))}; print(sorted({{'torch', 'monai'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
