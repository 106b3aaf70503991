"""Output is whole or absent, whatever goes wrong while it is written."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from napari_mrcnn3d._files import atomic_write, check_memory, readable_bytes
from napari_mrcnn3d.io.tiff import write_image
from napari_mrcnn3d.structures import UserError


def write_and_fail(path: Path, error: BaseException | type[BaseException]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".csv"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, UserError])
def test_whatever_interrupts_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_and_fail(tmp_path / "a.csv", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full .*; free"),
        (errno.EROFS, "can only be read; choose"),
        (errno.EACCES, "not permitted there; choose"),
        (errno.EIO, "the system says: .*; try"),
    ],
)
def test_failures_to_write_are_explained(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"a\.csv cannot be written: .*{words}") as caught:
        write_and_fail(tmp_path / "a.csv", OSError(code, os.strerror(code)))
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, words in {
        "nowhere/a.csv": "folder does not exist; create it",
        "file/a.csv": "folder is a file",
        "folder": "folder of this name is in the way",
        "a" * 300: "name is too long",
    }.items():
        with pytest.raises(UserError, match=words), atomic_write(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are Unix's")
def test_a_real_write_that_fails_half_way(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.tif cannot be written: the disk is full or a limit is reached"):
            write_image(tmp_path / "a.tif", np.zeros((9, 100, 100), np.uint8), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="links and modes are Unix's")
def test_links_and_modes_stay_usual(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "a.csv"
    link.symlink_to(tmp_path / "far" / "b.csv")
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "far" / "b.csv").read_text() == "new"
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_sizes_are_readable() -> None:
    assert [readable_bytes(n) for n in (0, 999, 1000, 2_340_000, 5e15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 KB",
        "2.3 MB",
        "5000.0 TB",
    ]


def test_memory_is_checked() -> None:
    check_memory(1, "a.tif")
    with pytest.raises(UserError, match=r"a\.tif needs 1000000\.0 TB of memory and .* are free: close"):
        check_memory(10**18, "a.tif")
