"""Pasting against SciPy's interpolation at every voxel centre."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from napari_mrcnn3d._ops import _torch, paste_masks_3d
from tests.ops.helpers import few, random_boxes

pytestmark = pytest.mark.usefixtures("every_backend")

Triple = tuple[int, int, int]


def probability(mask: Tensor, box: list[float], shape: Triple) -> np.ndarray:
    """What the mask says at every voxel centre of the volume; below 0 outside its box."""
    out = np.full(shape, -1.0)
    axes, inside = [], []
    for a in range(3):
        centre = np.arange(shape[a]) + 0.5
        inside.append(np.flatnonzero((box[a] <= centre) & (centre < box[a + 3])))
        axes.append((centre[inside[a]] - box[a]) / max(box[a + 3] - box[a], 1e-9) * mask.shape[a] - 0.5)
    if all(len(i) for i in inside):
        grid = np.meshgrid(*axes, indexing="ij")
        out[np.ix_(*inside)] = map_coordinates(mask.double().numpy(), grid, order=1, mode="nearest")
    return out


def oracle(masks: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, shape: Triple) -> np.ndarray:
    """Best first: a voxel goes to the first mask that claims it."""
    out = np.zeros(shape, np.int32)
    taken = np.zeros(shape, bool)
    for k in np.argsort(-scores.numpy(), kind="stable"):
        claim = (probability(masks[k], boxes[k].tolist(), shape) >= 0.5) & ~taken
        out[claim] = labels[k].item()
        taken |= claim
    return out


@few
@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 6), st.integers(0, 9999)
)
def test_any_shape_matches_scipy(shape: Triple, cells: Triple, count: int, seed: int) -> None:
    """Boxes inside, across the border, outside, thinner than a voxel, without volume; equal scores."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, *cells, generator=generator, dtype=torch.float64)
    boxes = random_boxes(count, seed, extent=9.0, sides=(-0.5, 9.0))
    labels, scores = torch.arange(1, count + 1), torch.randint(0, 3, (count,), generator=generator).float()
    result = paste_masks_3d(masks, boxes, labels, scores, shape)
    assert result.dtype == torch.int32
    np.testing.assert_array_equal(result.numpy(), oracle(masks, boxes, labels, scores, shape))


def full(count: int) -> Tensor:
    return torch.ones(count, 2, 2, 2)


def test_a_full_mask_paints_the_voxels_whose_centre_is_in_the_half_open_box() -> None:
    boxes = torch.tensor([[0.5, 1.0, 0.0, 2.5, 2.5, 0.6]])
    result = paste_masks_3d(full(1), boxes, torch.tensor([7]), torch.tensor([0.9]), (4, 4, 2))
    expected = torch.zeros(4, 4, 2, dtype=torch.int32)
    expected[0:2, 1:2, 0] = 7
    assert torch.equal(result, expected)


def test_a_label_box_and_mask_come_back_exactly() -> None:
    """The box of a label is [min, max + 1]; a mask on the voxel grid pastes to itself."""
    blob = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    volume = torch.zeros(6, 8, 9, dtype=torch.int32)
    volume[1:4, 2:6, 3:8] = blob.int() * 5
    boxes = torch.tensor([[1.0, 2, 3, 4, 6, 8]])
    result = paste_masks_3d(blob[None].float(), boxes, torch.tensor([5]), torch.tensor([1.0]), (6, 8, 9))
    assert torch.equal(result, volume)


@pytest.mark.parametrize(
    ("scores", "winner"),
    [([0.2, 0.9], 2), ([0.9, 0.2], 1), ([0.5, 0.5], 1), ([float("nan"), 0.0], 2), ([-3.0, -2.0], 2)],
)
def test_the_best_score_wins_and_equal_ones_go_to_the_lower_index(scores: list[float], winner: int) -> None:
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2]]).repeat(2, 1)
    result = paste_masks_3d(full(2), boxes, torch.tensor([1, 2]), torch.tensor(scores), (2, 2, 2))
    assert result.unique().tolist() == [winner]


@pytest.mark.parametrize(
    "box",
    [
        [1.0, 1, 1, 1, 3, 3],
        [3.0, 1, 1, 1, 3, 3],
        [-9.0, 0, 0, -2, 4, 4],
        [9.0, 0, 0, 12, 4, 4],
        [float("nan"), 0, 0, 4, 4, 4],
        [0.0, 0, 0, 4, float("inf"), 4],
        [1.6, 0, 0, 2.4, 4, 4],
    ],
)
def test_boxes_that_hold_no_voxel_centre_paint_nothing(box: list[float]) -> None:
    result = paste_masks_3d(full(1), torch.tensor([box]), torch.tensor([1]), torch.tensor([1.0]), (4, 4, 4))
    assert not result.any()


def test_a_mask_value_that_is_no_number_counts_as_zero() -> None:
    mask = full(1)
    mask[0, 0, 0, 0] = float("nan")
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2]])
    result = paste_masks_3d(mask, boxes, torch.tensor([1]), torch.tensor([1.0]), (2, 2, 2))
    assert result.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_threshold_is_reached_not_passed() -> None:
    arguments = (
        full(1) * 0.25,
        torch.tensor([[0.0, 0, 0, 2, 2, 2]]),
        torch.tensor([1]),
        torch.tensor([1.0]),
        (2, 2, 2),
    )
    assert paste_masks_3d(*arguments, threshold=0.25).all()
    assert not paste_masks_3d(*arguments, threshold=0.26).any()


def test_large_boxes_are_painted_in_slabs_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(1, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    arguments = (masks, torch.tensor([[0.3, 0, 0, 20, 20, 20]]), torch.tensor([1]), torch.tensor([1.0]), (20, 20, 20))
    whole = paste_masks_3d(*arguments)
    assert 0 < whole.sum() < whole.numel()
    monkeypatch.setattr(_torch, "_VOXELS_AT_ONCE", 1300)
    assert torch.equal(paste_masks_3d(*arguments), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_label_types(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2]]).double()
    labels = torch.tensor([2**31 - 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = paste_masks_3d(full(1).to(dtype), boxes, labels, torch.ones(1).to(dtype), (2, 2, 2))
    assert result.unique().tolist() == [2**31 - 1]


def test_no_masks_and_no_voxels() -> None:
    nothing = (torch.zeros(0, 3, 3, 3), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert paste_masks_3d(*nothing, (2, 3, 4)).tolist() == torch.zeros(2, 3, 4).tolist()
    one = (full(1), torch.tensor([[0.0, 0, 0, 2, 2, 2]]), torch.tensor([1]), torch.ones(1))
    assert paste_masks_3d(*one, (0, 3, 4)).shape == (0, 3, 4)


GOOD: dict[str, Any] = {
    "masks": full(2),
    "boxes": torch.zeros(2, 6),
    "labels": torch.tensor([1, 2]),
    "scores": torch.ones(2),
    "shape": (4, 4, 4),
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("masks", full(3), ValueError),
        ("masks", full(2)[0], ValueError),
        ("masks", torch.zeros(2, 0, 2, 2), ValueError),
        ("masks", full(2).to(torch.uint8), TypeError),
        ("masks", full(2).numpy(), TypeError),
        ("masks", full(2).to("meta"), ValueError),
        ("boxes", torch.zeros(2, 6).half(), TypeError),
        ("labels", torch.ones(2), TypeError),
        ("labels", torch.tensor([1]), ValueError),
        ("labels", torch.tensor([1, 2**31]), ValueError),
        ("scores", torch.tensor([1, 2]), TypeError),
        ("scores", torch.ones(3), ValueError),
        ("shape", (4, 4), ValueError),
        ("shape", (4, -1, 4), ValueError),
        ("threshold", 1.5, ValueError),
        ("threshold", float("nan"), ValueError),
    ],
)
def test_unusable_arguments_are_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        paste_masks_3d(**GOOD | {name: value})
