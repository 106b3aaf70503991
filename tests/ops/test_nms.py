"""Suppression against a quadratic oracle, and the predecessor's published cases 18 to 27."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d._ops import _torch, nms_3d
from tests.ops.helpers import few, random_boxes

pytestmark = pytest.mark.usefixtures("every_backend")

A = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1],
        [0, 0.1, 0, 1, 1.1, 1],
        [0, -0.1, 0, 1, 0.9, 1],
        [0, 10, 0, 1, 11, 1],
        [0, 10.1, 0, 1, 11.1, 1],
        [0, 100, 0, 1, 101, 1],
    ]
)
A_FLIPPED = torch.tensor(
    [
        [1, 1, 1, 0, 0, 0],
        [0, 0.1, 1, 1, 1.1, 0],
        [0, 0.9, 1, 1, -0.1, 0],
        [0, 10, 1, 1, 11, 0],
        [1, 10.1, 1, 0, 11.1, 0],
        [1, 101, 1, 0, 100, 0],
    ]
)
S = torch.tensor([0.9, 0.75, 0.6, 0.95, 0.5, 0.3])
UNIT = torch.tensor([[0.0, 0, 0, 1, 1, 1]])


def greedy(boxes: Tensor, scores: Tensor, threshold: Fraction, groups: list[int]) -> list[int]:
    """Quadratic oracle in exact arithmetic."""

    def volume(box: list[Fraction]) -> Fraction:
        z, y, x = (max(Fraction(0), box[k + 3] - box[k]) for k in range(3))
        return z * y * x

    rows = [[Fraction(v) for v in row] for row in boxes.tolist()]
    values = scores.tolist()
    kept: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-values[i], i)):
        for j in kept:
            a, b = rows[i], rows[j]
            shared = volume([max(a[k], b[k]) for k in range(3)] + [min(a[k], b[k]) for k in range(3, 6)])
            if groups[i] == groups[j] and shared > threshold * (volume(a) + volume(b) - shared):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize(
    ("boxes", "scores", "max_keep", "expected"),
    [
        pytest.param(A, S, 3, [3, 0, 5], id="18"),
        pytest.param(A, S, 2, [3, 0], id="20"),
        pytest.param(A, S - 10, 6, [3, 0, 5], id="21"),
        pytest.param(A, S, 30, [3, 0, 5], id="22"),
        pytest.param(UNIT, torch.tensor([0.9]), 3, [0], id="23"),
        pytest.param(UNIT.repeat(10, 1), torch.full((10,), 0.9), 3, [0], id="24"),
        pytest.param(torch.zeros(0, 6), torch.zeros(0), 30, [], id="27"),
    ],
)
def test_published_case(boxes: Tensor, scores: Tensor, max_keep: int, expected: list[int]) -> None:
    kept = nms_3d(boxes, scores, 0.5, max_keep=max_keep)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_published_case_19_flipped_corners_once_sorted() -> None:
    near, far = A_FLIPPED[:, :3], A_FLIPPED[:, 3:]
    boxes = torch.cat([torch.minimum(near, far), torch.maximum(near, far)], 1)
    assert torch.equal(boxes, A)
    assert nms_3d(boxes, S, 0.5, max_keep=3).tolist() == [3, 0, 5]


def test_flipped_corners_as_they_are_have_no_volume() -> None:
    assert nms_3d(A_FLIPPED, S, 0.5).tolist() == S.argsort(descending=True).tolist()


def test_published_case_25_scores_of_another_length() -> None:
    with pytest.raises(ValueError, match="scores has incompatible shape"):
        nms_3d(A, S[:5], 0.5)


@pytest.mark.parametrize("threshold", [1.2, -0.1, float("nan")])
def test_published_case_26_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"iou_threshold must be in \[0, 1\]"):
        nms_3d(A, S, threshold)


def test_overlap_equal_to_the_threshold_is_kept_unlike_in_the_predecessor() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert nms_3d(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms_3d(boxes, scores, 0.49).tolist() == [0]


@few
@given(
    st.integers(0, 40),
    st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)]),
    st.integers(1, 3),
    st.integers(0, 999),
)
def test_half_integer_boxes_with_ties_match_the_oracle(count: int, threshold: Fraction, kinds: int, seed: int) -> None:
    boxes = random_boxes(count, seed, extent=6.0, sides=(-0.5, 5.0), step=0.5)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (count,), generator=generator).float()
    groups = torch.randint(0, kinds, (count,), generator=generator)
    expected = greedy(boxes, scores, threshold, groups.tolist())
    assert nms_3d(boxes, scores, float(threshold), groups=groups).tolist() == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_many_boxes_cross_the_blocks(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = random_boxes(300, 5, extent=20.0, step=0.5)
    scores = torch.rand(300, generator=torch.Generator().manual_seed(5))
    groups = torch.arange(300) % 3 if grouped else None
    expected = greedy(boxes, scores, Fraction(1, 4), [0] * 300 if groups is None else groups.tolist())
    assert 50 < len(expected) < 290
    monkeypatch.setattr(_torch, "_NMS_BLOCK", 64)
    monkeypatch.setattr(_torch, "_PAIRS_AT_ONCE", 64 * 16)
    assert nms_3d(boxes, scores, 0.25, groups=groups).tolist() == expected
    assert nms_3d(boxes, scores, 0.25, groups=groups, max_keep=70).tolist() == expected[:70]
    assert nms_3d(boxes, scores, 0.25, groups=groups, max_keep=0).tolist() == []


def test_groups_of_far_apart_numbers_never_meet() -> None:
    boxes, scores = UNIT.repeat(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4])
    groups = torch.tensor([2**62, -(2**62), 2**62 + 1, 2**62])
    assert nms_3d(boxes, scores, 0.5, groups=groups).tolist() == [3, 2, 1]


def test_what_is_not_a_number_neither_suppresses_nor_is_suppressed() -> None:
    boxes = UNIT.repeat(3, 1)
    boxes[0, 4] = float("nan")
    assert nms_3d(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1]
    assert nms_3d(boxes, torch.tensor([0.9, float("nan"), 0.7]), 0.5).tolist() == [0, 2]
    assert nms_3d(UNIT.repeat(2, 1), torch.tensor([float("nan"), -float("inf")]), 0.5).tolist() == [0]


def test_half_scores_are_fine_and_boxes_decide_in_float32() -> None:
    scores = S.half()
    assert nms_3d(A, scores, 0.5).tolist() == [3, 0, 5]
    assert nms_3d(A.double(), S.double(), 0.5).tolist() == [3, 0, 5]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"boxes": A.half()}, TypeError),
        ({"boxes": A[:, :5]}, ValueError),
        ({"scores": S.long()}, TypeError),
        ({"scores": S.tolist()}, TypeError),
        ({"scores": S.to("meta")}, ValueError),
        ({"groups": torch.zeros(5, dtype=torch.int64)}, ValueError),
        ({"groups": torch.zeros(6)}, TypeError),
        ({"groups": torch.zeros(6, dtype=torch.bool)}, TypeError),
        ({"max_keep": -1}, ValueError),
    ],
)
def test_unusable_arguments_are_refused_by_name(changed: dict[str, Any], error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"boxes": A, "scores": S, "iou_threshold": 0.5} | changed
    with pytest.raises(error, match=next(iter(changed))):
        nms_3d(**arguments)
