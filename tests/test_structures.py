"""The nouns: what they check and what they compute."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from napari_mrcnn3d.structures import (
    Candidates,
    DeviceMemoryError,
    Instances,
    Progress,
    Steps,
    UserError,
    Volume,
    VoxelSize,
    drain,
)


@pytest.mark.parametrize("values", [(2, 1, 1), [2.0, 1.0, 1.0], np.array([2, 1, 1]), ("2", "1", "1")])
def test_a_voxel_size_is_three_lengths(values: Any) -> None:
    assert VoxelSize.of(values) == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        (1, 1),
        (1, 1, 1, 1),
        (0, 1, 1),
        (-1, 1, 1),
        (np.nan, 1, 1),
        (np.inf, 1, 1),
        ("a", 1, 1),
        5,
        None,
        "211",
        [[1], 2, 3],
    ],
)
def test_anything_else_is_refused_by_its_value(values: Any) -> None:
    with pytest.raises(UserError, match=r"is not usable: give three positive lengths in µm"):
        VoxelSize.of(values)


def test_what_follows_from_a_voxel_size() -> None:
    size = VoxelSize(2.0, 0.4, 0.6)
    assert size.volume == pytest.approx(0.48)


def test_a_volume_has_three_axes() -> None:
    assert Volume(np.zeros((2, 3, 4))).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="unpack"):
        _ = Volume(np.zeros((2, 3))).shape


def candidates(count: int = 3) -> Candidates:
    boxes = np.arange(6 * count, dtype=np.float32).reshape(count, 6)
    scores, classes = np.linspace(1, 0.5, count), np.arange(1, count + 1)
    return Candidates(
        boxes, scores, classes, np.zeros((count, 2, 3, 4), np.uint8), (9, 9, 9), VoxelSize(2, 1, 1), ("a",)
    )


@pytest.mark.parametrize("index", [np.array([2, 0]), np.array([True, False, True])])
def test_candidates_are_taken_row_by_row(index: np.ndarray) -> None:
    everything, taken = candidates(), candidates().take(index)
    assert len(taken) == 2
    for name in ("boxes", "scores", "classes", "masks"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(everything, name)[index])
    assert (taken.shape, taken.voxel_size, taken.class_names) == ((9, 9, 9), (2, 1, 1), ("a",))


def test_no_candidates_are_candidates() -> None:
    nothing = Candidates.empty((4, 5, 6), (2, 2, 2), VoxelSize(1, 1, 1), ("a", "b"))
    assert len(nothing) == len(nothing.take(np.zeros(0, bool))) == 0
    assert nothing.masks.shape == (0, 2, 2, 2)
    assert nothing.class_names == ("a", "b")


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": np.zeros((3, 5))},
        {"boxes": np.zeros(3)},
        {"masks": np.zeros((3, 2, 2))},
        {"scores": np.zeros(2)},
        {"classes": np.zeros(4)},
        {"masks": np.zeros((2, 1, 1, 1))},
    ],
)
def test_candidates_that_do_not_belong_together_are_refused(changes: dict[str, np.ndarray]) -> None:
    rows = {name: getattr(candidates(), name) for name in ("boxes", "scores", "classes", "masks")}
    with pytest.raises(ValueError, match="boxes"):
        Candidates(**(rows | changes), shape=(9, 9, 9))


def test_nouns_do_not_change() -> None:
    for noun, name in ((candidates(), "boxes"), (Progress(0, 1, "x"), "done"), (Volume(np.zeros((1, 1, 1))), "data")):
        with pytest.raises(FrozenInstanceError):
            setattr(noun, name, None)


def test_instances_are_as_many_as_their_rows() -> None:
    assert len(Instances(candidates(), np.arange(3), np.ones(3, np.int64))) == 3


def test_progress_of_two_steps_shares_no_figures() -> None:
    first, second = Progress(0, 1, "x"), Progress(1, 1, "x")
    first.metrics["loss"] = 1.0
    assert second.metrics == {}


def test_draining_gives_the_result_and_lets_errors_through() -> None:
    def job(fail: bool) -> Steps[str]:
        yield Progress(1, 2, "half")
        if fail:
            raise UserError("no")
        return "result"

    assert drain(job(fail=False)) == "result"
    with pytest.raises(UserError, match="no"):
        drain(job(fail=True))


def test_a_full_memory_is_something_the_user_can_repair() -> None:
    assert issubclass(DeviceMemoryError, UserError)
