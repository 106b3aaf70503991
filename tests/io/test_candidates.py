"""Candidates come back exactly, and nothing foreign gets in."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from napari_mrcnn3d import _files
from napari_mrcnn3d.io import candidates
from napari_mrcnn3d.io.candidates import load_candidates, save_candidates
from napari_mrcnn3d.structures import Candidates, UserError, VoxelSize


def some(
    count: int = 4, shape: tuple[int, int, int] = (9, 20, 30), seed: int = 0, size: VoxelSize | None = None
) -> Candidates:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (2, count, 3)), axis=0) * shape
    return Candidates(
        np.concatenate(list(corners), axis=1).astype(np.float32),
        np.sort(rng.uniform(0, 1, count))[::-1].astype(np.float32),
        rng.integers(1, 3, count),
        rng.integers(0, 256, (count, 4, 6, 6), dtype=np.uint8),
        shape,
        size,
        ("nucleus", "Zellkern é"),
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 5),
    shape=st.tuples(*[st.integers(1, 10**6)] * 3),
    seed=st.integers(0, 99),
    size=st.none() | st.tuples(*[st.floats(1e-3, 1e3)] * 3).map(VoxelSize.of),
)
def test_what_is_saved_comes_back(
    tmp_path: Path, count: int, shape: tuple[int, int, int], seed: int, size: VoxelSize | None
) -> None:
    before = some(count, shape, seed, size)
    save_candidates(tmp_path / "a.mrcnn3d", before)
    after = load_candidates(tmp_path / "a.mrcnn3d")
    for name in ("boxes", "scores", "classes", "masks"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), strict=True)
    assert (after.shape, after.voxel_size, after.class_names) == (shape, size, before.class_names)


def _cut(path: Path) -> None:
    save_candidates(path, some())
    path.write_bytes(path.read_bytes()[:-7])


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "does not exist"),
    "empty": (lambda p: p.touch(), "is empty"),
    "text": (lambda p: p.write_text("score,box\n0.5,3\n"), "is no .mrcnn3d file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"boxes": 3})), "is no .mrcnn3d file"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f{}"), "is no .mrcnn3d file"),
    "cut off": (_cut, "is no .mrcnn3d file, or is cut off: save"),
    "a model": (lambda p: save_file({"w": np.zeros(3)}, p, {"format": "pt"}), "holds no candidates"),
    "bare arrays": (lambda p: save_file({"w": np.zeros(3)}, p), "holds no candidates"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, words = FOREIGN[kind]
    make(tmp_path / "a.mrcnn3d")
    with pytest.raises(UserError, match=rf"a\.mrcnn3d .*{words}"):
        load_candidates(tmp_path / "a.mrcnn3d")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": np.zeros((4, 6))}, "boxes are float64"),
        ({"boxes": np.zeros((4, 5), np.float32)}, "boxes must be"),
        ({"boxes": np.full((4, 6), 50, np.float32)}, "boxes outside the image"),
        ({"boxes": np.full((4, 6), np.nan, np.float32)}, "boxes outside the image"),
        ({"scores": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}, "scores not falling"),
        ({"scores": np.full(4, np.nan, np.float32)}, "scores not falling"),
        ({"scores": np.zeros(3, np.float32)}, "differ in length"),
        ({"classes": np.zeros(4, np.int64)}, "classes without a name"),
        ({"classes": np.full(4, 3)}, "classes without a name"),
        ({"masks": None}, "is no .mrcnn3d file"),
        ({"shape": [9, 20]}, "image shape"),
        ({"shape": [9, 20, -1]}, "image shape"),
        ({"shape": None}, "damaged content"),
        ({"voxel_size": [1, 0, 1]}, "Voxel size"),
        ({"class_names": []}, "class names"),
        ({"class_names": [3]}, "class names"),
    ],
    ids=str,
)
def test_damaged_content_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = some()
    arrays = {name: getattr(good, name) for name in ("boxes", "scores", "classes", "masks")}
    about: dict[str, Any] = {"shape": list(good.shape), "voxel_size": None, "class_names": list(good.class_names)}
    for name, value in change.items():
        (arrays if name in arrays else about)[name] = value
    path = tmp_path / "a.mrcnn3d"
    metadata = {"format": candidates._FORMAT, "about": json.dumps(about)}
    save_file({name: array for name, array in arrays.items() if array is not None}, path, metadata)
    with pytest.raises(UserError, match=words) as caught:
        load_candidates(path)
    assert "a.mrcnn3d" in str(caught.value)


def test_header_without_its_fields_is_refused(tmp_path: Path) -> None:
    for about in ({}, {"about": "["}):
        save_file({"w": np.zeros(3)}, tmp_path / "a.mrcnn3d", {"format": candidates._FORMAT, **about})
        with pytest.raises(UserError, match=r"a\.mrcnn3d .*: save"):
            load_candidates(tmp_path / "a.mrcnn3d")


def test_what_exceeds_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_candidates(tmp_path / "a.mrcnn3d", some())
    monkeypatch.setattr(_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(UserError, match=r"a\.mrcnn3d needs 1\.\d KB of memory and 100 bytes are free"):
        load_candidates(tmp_path / "a.mrcnn3d")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder does not exist"):
        save_candidates(tmp_path / "nowhere" / "a.mrcnn3d", some())
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.mrcnn3d"
    save_candidates(path, some())
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"a\.mrcnn3d cannot be written: the disk is full"):
            save_candidates(path, some(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
