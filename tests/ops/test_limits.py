"""Inputs at the edge of what there is: strided, infinite, upside down, very many, very large."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d._ops import _backends, _torch, box_iou_3d, nms_3d, paste_masks_3d, roi_align_3d
from tests.ops.helpers import noise, random_boxes, zeros_index

pytestmark = pytest.mark.usefixtures("every_backend")

INF = float("inf")


def strided(tensor: Tensor) -> Tensor:
    """The same values in memory that is not contiguous, and not at the start of its storage."""
    wide = torch.stack([torch.full_like(tensor, 7), tensor], -1)
    return wide[..., 1]


def test_strided_tensors_give_the_same() -> None:
    boxes, scores = random_boxes(40, 0, extent=9.0), torch.rand(40, generator=torch.Generator().manual_seed(0))
    groups, features = torch.arange(40) % 3, noise(3, 5, 6, 7, 8)
    masks = torch.rand(40, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    for one, other in (
        (nms_3d(boxes, scores, 0.2, groups), nms_3d(strided(boxes), strided(scores), 0.2, strided(groups))),
        (box_iou_3d(boxes, boxes), box_iou_3d(strided(boxes), boxes.T.contiguous().T)),
        (
            roi_align_3d(features, boxes, groups, (2, 3, 2), (1.0, 0.5, 1.0)),
            roi_align_3d(strided(features), strided(boxes), strided(groups), (2, 3, 2), (1.0, 0.5, 1.0)),
        ),
        (
            paste_masks_3d(masks, boxes, groups + 1, scores, (9, 9, 9)),
            paste_masks_3d(strided(masks), strided(boxes), strided(groups) + 1, strided(scores), (9, 9, 9)),
        ),
    ):
        assert torch.equal(one, other)


def test_integers_of_any_width_count() -> None:
    boxes, features = random_boxes(9, 0, extent=9.0), noise(3, 2, 6, 6, 6)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        index = (torch.arange(9) % 3).to(dtype)
        pooled = roi_align_3d(features, boxes, index, (2, 2, 2), (1.0, 1.0, 1.0))
        assert torch.equal(pooled, roi_align_3d(features, boxes, index.long(), (2, 2, 2), (1.0, 1.0, 1.0)))
        kept = nms_3d(boxes, torch.arange(9.0), 0.1, groups=index)
        assert torch.equal(kept, nms_3d(boxes, torch.arange(9.0), 0.1, groups=index.long()))


def odd_boxes() -> Tensor:
    """Every corner of a good box once replaced by what no box should hold, and some boxes out of all proportion."""
    good = torch.tensor([1.0, 1, 1, 4, 4, 4])
    rows = [good]
    for corner, value in itertools.product(range(6), (float("nan"), INF, -INF, 3e38, -3e38, 1e-40)):
        rows.append(good.clone().index_fill_(0, torch.tensor(corner), value))
    rows += [
        good.flip(0),
        good.roll(3),
        torch.zeros(6),
        torch.full((6,), 2**31 + 0.0),
        torch.full((6,), -(2**62) + 0.0),
    ]
    rows += [torch.tensor([-3e38, -3e38, -3e38, 3e38, 3e38, 3e38]), torch.tensor([-INF, -INF, -INF, INF, INF, INF])]
    return torch.stack(rows)


def test_odd_boxes_are_pooled_to_finite_numbers() -> None:
    boxes = odd_boxes()
    features = noise(1, 3, 6, 6, 6, dtype=torch.float32).requires_grad_()
    pooled = roi_align_3d(features, boxes, zeros_index(len(boxes)), (2, 3, 2), (1.0, 1.0, 1.0), 2)
    assert pooled.isfinite().all()
    assert not pooled[boxes.isnan().any(1)].any()
    assert pooled[0].abs().sum() > 0
    pooled.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_odd_boxes_are_suppressed_by_the_rule_alone() -> None:
    boxes = odd_boxes()
    kept = nms_3d(boxes, torch.arange(len(boxes), 0.0, -1), 0.5).tolist()
    assert kept[0] == 0
    assert kept == sorted(set(kept))
    assert set(torch.nonzero(boxes.isnan().any(1))[:, 0].tolist()) <= set(kept)


def test_odd_boxes_paint_only_inside_the_volume_and_only_if_finite() -> None:
    boxes = odd_boxes()
    count = len(boxes)
    volume = paste_masks_3d(torch.ones(count, 2, 2, 2), boxes, torch.arange(1, count + 1), torch.ones(count), (6, 7, 8))
    broken = torch.nonzero(~boxes.isfinite().all(1))[:, 0] + 1
    assert not torch.isin(volume, broken.int()).any()
    assert (volume[1:4, 1:4, 1:4] == 1).all()
    whole = int(torch.nonzero((boxes == torch.tensor([-3e38] * 3 + [3e38] * 3)).all(1))) + 1
    assert volume[0, 0, 7] == whole


def test_a_million_boxes() -> None:
    boxes = random_boxes(1_000_000, 0, extent=2000.0)
    scores = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    kept = nms_3d(boxes, scores, 0.3, max_keep=200)
    best = scores.argsort(descending=True, stable=True)[:5000]
    assert torch.equal(kept, best[nms_3d(boxes[best], scores[best], 0.3, max_keep=200)])
    same = torch.tensor([[0.0, 0, 0, 4, 4, 4]]).repeat(1_000_000, 1)
    assert nms_3d(same, scores, 0.5, groups=torch.arange(1_000_000) % 2).sort().values.tolist() == sorted(
        int(scores[parity::2].argmax()) * 2 + parity for parity in (0, 1)
    )


def test_a_million_regions() -> None:
    """Plain PyTorch takes them one by one, so it gets fewer."""
    count = 20_000 if _backends.kernels(torch.device("cpu")) is _torch else 1_000_000
    boxes, features = random_boxes(count, 0, extent=8.0), noise(1, 1, 8, 8, 8, dtype=torch.float32)
    pooled = roi_align_3d(features, boxes, zeros_index(count), (1, 1, 1), (1.0, 1.0, 1.0))
    few = torch.cat([torch.arange(7), torch.arange(count - 7, count)])
    assert torch.equal(pooled[few], roi_align_3d(features, boxes[few], zeros_index(14), (1, 1, 1), (1.0, 1.0, 1.0)))
