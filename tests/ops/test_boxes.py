"""Box overlap against a scalar oracle, and what every operation refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d._ops import _torch, box_iou_3d
from tests.ops.helpers import few, random_boxes


def iou(a: list[float], b: list[float]) -> float:
    """Scalar oracle."""

    def volume(box: list[float]) -> float:
        z, y, x = (max(0.0, box[k + 3] - box[k]) for k in range(3))
        return z * y * x

    shared = volume([max(a[k], b[k]) for k in range(3)] + [min(a[k], b[k]) for k in range(3, 6)])
    union = volume(a) + volume(b) - shared
    return shared / union if union > 0 else 0.0


@few
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 99))
def test_every_pair_matches_the_scalar_oracle(n: int, m: int, seed: int) -> None:
    a = random_boxes(n, seed, extent=8.0, sides=(-1.0, 6.0), step=0.5)
    b = random_boxes(m, seed + 1, extent=8.0, sides=(-1.0, 6.0), step=0.5)
    result = box_iou_3d(a, b)
    assert result.shape == (n, m)
    expected = torch.tensor([[iou(p, q) for q in b.tolist()] for p in a.tolist()]).reshape(n, m)
    torch.testing.assert_close(result, expected)


def test_known_overlaps() -> None:
    unit = torch.tensor([[0.0, 0, 0, 2, 2, 2]])
    others = torch.tensor(
        [[0.0, 0, 0, 2, 2, 2], [1, 0, 0, 3, 2, 2], [2, 0, 0, 4, 2, 2], [1, 1, 1, 1, 2, 2], [2, 2, 2, 0, 0, 0]]
    )
    expected = torch.tensor([[1, 1 / 3, 0, 0, 0]])
    torch.testing.assert_close(box_iou_3d(unit, others), expected)


def test_many_rows_are_split_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_boxes(50, 0, extent=10.0), random_boxes(7, 1, extent=10.0)
    whole = box_iou_3d(a, b)
    monkeypatch.setattr(_torch, "_PAIRS_AT_ONCE", 20)
    assert torch.equal(box_iou_3d(a, b), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_coordinate_that_is_not_finite_overlaps_nothing(value: float) -> None:
    box = torch.tensor([[0.0, 0, 0, 2, 2, 2]])
    broken = box.repeat(6, 1)
    broken[range(6), range(6)] = value
    assert torch.equal(box_iou_3d(broken, broken).isfinite(), torch.ones(6, 6, dtype=torch.bool))
    assert not box_iou_3d(broken, box)[broken.isnan().any(1)].any()


def test_float64_stays_float64_and_no_gradient_is_recorded() -> None:
    box = torch.tensor([[0.0, 0, 0, 2, 2, 2]], requires_grad=True)
    assert box_iou_3d(box, box).dtype == torch.float32
    assert box_iou_3d(box.double(), box).dtype == torch.float64
    assert not box_iou_3d(box, box).requires_grad


@pytest.mark.parametrize(
    ("a", "error"),
    [
        (torch.zeros(6), ValueError),
        (torch.zeros(2, 4), ValueError),
        (torch.zeros(2, 6, dtype=torch.float16), TypeError),
        (torch.zeros(2, 6, dtype=torch.int64), TypeError),
        ([[0.0] * 6], TypeError),
        (torch.zeros(2, 6, device="meta"), ValueError),
    ],
)
def test_unusable_boxes_are_refused_by_name(a: Tensor, error: type[Exception]) -> None:
    good = torch.zeros(3, 6)
    with pytest.raises(error, match=r"^b "):
        box_iou_3d(good, a)
