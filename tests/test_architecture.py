"""The import direction of DESIGN.md, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "napari_mrcnn3d"
ROOT = Path(__file__).resolve().parents[1] / "src" / PACKAGE

BASE = {"structures", "config", "device", "_files"}
SIDE = {"data", "metrics", "editing", "io"}
CHAIN = ["_ops", "model", "inference", "training"]
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": BASE | SIDE | set(CHAIN),  # lazily, see test_importing_costs_neither_torch_nor_qt
    "structures": set(),
    "config": {"structures"},
    "device": {"structures"},
    "_files": {"structures"},
    "io": BASE,
    "metrics": BASE,
    "editing": BASE,
    "data": BASE | {"_ops", "io"},
    "_ops": BASE,
    "model": BASE | {"_ops"},
    "inference": BASE | SIDE | {"_ops", "model"},
    "training": BASE | SIDE | {"_ops", "model", "inference"},
    "selftest": BASE | SIDE | set(CHAIN),
    "_cli_files": {"structures"},
    "_cli_progress": {"structures"},
    "cli": BASE | SIDE | set(CHAIN) | {"selftest", "_cli_files", "_cli_progress"},
    "widgets": BASE | SIDE | set(CHAIN),
}
"""For every room (folder or module) the rooms that it may import."""

SCREEN = {"napari", "magicgui", "vispy", "qtpy", "superqt", "PyQt5", "PyQt6", "PySide2", "PySide6", "npe2", "app_model"}
HEAVY = {"torch", "monai", *SCREEN}
LIGHT = [
    PACKAGE,
    *(f"{PACKAGE}.{name}" for name in ("structures", "config", "cli", "data.toy", "data.embryo", "data.volumes")),
]


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Full dotted names of everything imported below a node, at whatever depth; of names, ``module.name``."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path} imports relatively: write the full name"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


@cache
def imported_rooms(path: Path) -> frozenset[str]:
    """Rooms that a module imports (from), its own left out."""
    names = (name.split(".") for name in imports(ast.parse(path.read_text(encoding="utf-8")), path))
    rooms = {parts[1] for parts in names if parts[0] == PACKAGE and len(parts) > 1}
    return frozenset(rooms - {room(path), "__version__"})


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    assert imported_rooms(path) <= MAY_IMPORT[room(path)]


def test_the_rules_allow_no_cycle_and_every_module_obeys_one() -> None:
    list(TopologicalSorter({name: rooms for name, rooms in MAY_IMPORT.items() if name != "__init__"}).static_order())
    assert {room(path) for path in modules()} <= set(MAY_IMPORT)


def test_no_cycle_between_modules() -> None:
    known = {dotted(path) for path in modules()}

    def needs(path: Path) -> set[str]:
        names = imports(ast.parse(path.read_text(encoding="utf-8")), path)
        found = {name if name in known else name.rpartition(".")[0] for name in names}
        return (found & known) - {dotted(path), PACKAGE}

    graph = {dotted(path): needs(path) for path in modules()}
    order = list(TopologicalSorter(graph).static_order())  # raises on a cycle
    assert set(order) == known


@pytest.mark.parametrize("path", [p for p in modules() if room(p) != "widgets"], ids=dotted)
def test_screen_libraries_stay_in_the_widgets(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")), path)}
    assert not names & SCREEN


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/__init__.py")), ids=dotted)
def test_a_room_begins_with_a_sentence_and_exports_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1 or room(path) == "_ops"


def heavy_modules_after(code: str) -> set[str]:
    """Heavy top-level modules that a fresh interpreter holds after running the code."""
    probe = f"{code}\nimport sys\nprint(*set({sorted(HEAVY)}).intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_probe_sees_a_heavy_import() -> None:
    assert "torch" in heavy_modules_after("import torch")


def test_importing_costs_neither_torch_nor_qt() -> None:
    light = LIGHT + [dotted(path) for path in modules() if room(path) in {"io", "metrics"}]
    assert heavy_modules_after("import " + ", ".join(light)) == set()


def test_help_costs_neither_torch_nor_qt() -> None:
    commands = [
        [],
        ["train"],
        ["predict"],
        ["generate", "toy"],
        ["generate", "embryo"],
        ["evaluate"],
        ["info"],
        ["selftest"],
    ]
    code = f"from {PACKAGE}.cli import main\nfor c in {commands}:\n    assert main([*c, '--help']) == 0"
    assert heavy_modules_after(code) == set()


def test_opening_a_widget_costs_no_torch() -> None:
    widgets = ", ".join(dotted(path) for path in modules() if room(path) == "widgets")
    assert not heavy_modules_after(f"import {widgets}") & {"torch", "monai"}
