"""Writing many images with several processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest

from napari_mrcnn3d.data._generate import generate_files
from napari_mrcnn3d.structures import Progress, Steps, UserError, drain


def write_two(index: int, place: Path, *, seconds: float = 0.0) -> None:
    """Two files per image, with a pause between them."""
    for sub in ("images", "labels"):
        (place / sub).mkdir(parents=True)
        (place / sub / f"{index}.txt").write_text(str(index))
        time.sleep(seconds)


def fail_at_one(index: int, place: Path) -> None:
    if index == 1:
        raise UserError("image 1 cannot be made")
    write_two(index, place)


def die(index: int, place: Path) -> None:
    os._exit(9)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def both(*indices: int) -> list[str]:
    return sorted(f"{sub}/{k}.txt" for k in indices for sub in ("images", "labels"))


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_are_written_whatever_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "new" / "folder"
    result = []

    def watched() -> Steps[None]:
        steps = generate_files(write_two, folder, count=5, workers=workers, nbytes=1, stage="Making")
        result.append((yield from steps))

    progress = list(watched())
    assert result == [folder]
    assert progress == [Progress(k, 5, "Making") for k in range(6)]
    assert files(folder) == both(*range(5))
    assert sorted(p.name for p in folder.iterdir()) == ["images", "labels"]


@pytest.mark.parametrize("workers", [1, 2])
def test_cancelling_keeps_complete_images_and_nothing_else(tmp_path: Path, workers: int) -> None:
    task = partial(write_two, seconds=0.05 if workers == 1 else 0.3)
    steps = generate_files(task, tmp_path, count=50, workers=workers, nbytes=1)
    next(steps)
    next(steps)  # the first image is complete, others are being made
    before = time.perf_counter()
    steps.close()
    assert time.perf_counter() - before < 5  # 50 images would take longer; a second on an idle machine
    assert not multiprocessing.active_children()
    names = {p.rpartition("/")[2] for p in files(tmp_path)}
    assert 1 <= len(names) < 50
    assert files(tmp_path) == sorted(f"{sub}/{name}" for name in names for sub in ("images", "labels"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "labels"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_one_image_ends_the_job_and_cleans_up(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError, match="image 1 cannot be made"):
        drain(generate_files(fail_at_one, tmp_path, count=4, workers=workers, nbytes=1))
    assert not multiprocessing.active_children()
    assert {p.name for p in tmp_path.iterdir()} <= {"images", "labels"}


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended unexpectedly \(code 9\).*fewer workers"):
        drain(generate_files(die, tmp_path, count=4, workers=2, nbytes=1))
    assert files(tmp_path) == []


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    drain(generate_files(write_two, tmp_path, count=1, workers=1, nbytes=1))
    with pytest.raises(UserError, match="already holds files"):
        drain(generate_files(write_two, tmp_path, count=1, workers=1, nbytes=1))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        drain(generate_files(write_two, tmp_path / "taken", count=1, workers=1, nbytes=1))


@pytest.mark.parametrize(("count", "nbytes", "message"), [(0, 1, "0 images"), (2, 2**60, "of memory")])
def test_impossible_jobs_are_refused_before_they_start(tmp_path: Path, count: int, nbytes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        drain(generate_files(write_two, tmp_path / "x", count=count, workers=2, nbytes=nbytes))
    assert not (tmp_path / "x").exists()
