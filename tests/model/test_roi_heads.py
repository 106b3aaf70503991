"""The second stage: mask targets voxel by voxel, losses, detections."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d.model.roi_heads import Detections, RoIHeads, Target, mask_targets
from tests._tiny import EIGHT, ellipsoids, target_of, tiny_config
from tests.ops.helpers import few, random_boxes

SHAPE = (16, 24, 24)


def pyramid(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    strides = tiny_config().level_strides
    return [
        torch.randn(1, 8, *(n // s for n, s in zip(SHAPE, stride, strict=True)), generator=generator)
        for stride in strides
    ]


def boxes_inside(count: int, seed: int = 0) -> Tensor:
    return random_boxes(count, seed, extent=8.0, sides=(2.0, 8.0)) + torch.tensor([4.0, 8, 8]).repeat(2)


def share_at(labels: Tensor, wanted: int, point: list[float]) -> float:
    """Trilinear share of an object at a point; voxel i has its centre at i + 0.5, the border's value goes on."""
    where = [min(max(p - 0.5, 0.0), n - 1.0) for p, n in zip(point, labels.shape, strict=True)]
    below = [math.floor(w) for w in where]
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        index = tuple(min(b + c, n - 1) for b, c, n in zip(below, corner, labels.shape, strict=True))
        part = math.prod(1 - abs(w - b - c) for w, b, c in zip(where, below, corner, strict=True))
        total += part * (int(labels[index]) == wanted)
    return total


@few
@given(seed=st.integers(0, 10**6))
def test_mask_targets_against_a_loop_over_cells(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (4, 5, 6), generator=generator, dtype=torch.int32)
    boxes = random_boxes(3, seed, extent=5.0, sides=(0.5, 6.0)).double()
    ids, size = torch.tensor([1, 2, 7]), (2, 3, 4)
    found = mask_targets(labels, ids, boxes, size)
    for k, cell in itertools.product(range(3), itertools.product(*map(range, size))):
        low, high = boxes[k, :3].tolist(), boxes[k, 3:].tolist()
        point = [a + (c + 0.5) / n * (b - a) for a, b, c, n in zip(low, high, cell, size, strict=True)]
        share = share_at(labels, int(ids[k]), point)
        if abs(share - 0.5) > 1e-9:
            assert found[(k, *cell)] == (share > 0.5)


def test_a_mask_as_fine_as_its_box_is_the_object() -> None:
    labels = torch.from_numpy(ellipsoids((12, 14, 16), [((6, 7, 8), (4, 5, 6))]))
    found = mask_targets(labels, torch.tensor([1]), torch.tensor([[2.0, 2, 2, 10, 12, 14]]), (8, 10, 12))
    assert torch.equal(found[0], (labels[2:10, 2:12, 2:14] == 1).float())
    everything = mask_targets(labels, torch.tensor([1]), torch.tensor([[0.0, 0, 0, 12, 14, 16]]), (12, 14, 16))
    assert torch.equal(everything[0], (labels == 1).float())


def test_a_voxel_fills_its_mask() -> None:
    labels = torch.zeros(5, 5, 5, dtype=torch.int32)
    labels[2, 3, 4] = 9
    assert mask_targets(labels, torch.tensor([9]), torch.tensor([[2.0, 3, 4, 3, 4, 5]]), (1, 3, 1)).all()


def losses_of(heads: RoIHeads, proposals: Tensor, target: Target) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return heads.loss(pyramid(), [proposals], [target], SHAPE)


NO_OBJECT = target_of(ellipsoids(SHAPE, []))
ONE_VOXEL = target_of(ellipsoids(SHAPE, [((3.5, 4.5, 5.5), (0.4, 0.4, 0.4))]))
OBJECTS = target_of(ellipsoids(SHAPE, [((6, 8, 8), (4, 5, 5)), ((8, 18, 18), (5, 4, 4))]))


@pytest.mark.parametrize("target", [NO_OBJECT, ONE_VOXEL, OBJECTS], ids=["none", "voxel", "two"])
@pytest.mark.parametrize("proposals", [torch.zeros(0, 6), boxes_inside(30)], ids=["nothing", "many"])
def test_losses_are_finite_whatever_there_is(target: Target, proposals: Tensor) -> None:
    losses = losses_of(RoIHeads(tiny_config()), proposals, target)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values(), torch.zeros(())).backward()


def test_objects_themselves_are_learnt_from_when_nothing_is_proposed() -> None:
    losses = losses_of(RoIHeads(tiny_config()), torch.zeros(0, 6), OBJECTS)
    assert losses["loss_mask"] > 0
    assert losses["loss_box_reg"] < 1e-4  # an untrained head moves no box


def test_half_of_the_backgrounds_are_the_best_proposals_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals = random_boxes(200, 0, extent=2.0, sides=(1.0, 2.0))  # far from the objects, best first
    heads = RoIHeads(tiny_config(roi_hard_negatives=True))
    by_level, seen = heads.box_roi_pool.by_level, []

    def spy(boxes: Tensor) -> Tensor:
        seen.extend(boxes.tolist())
        return by_level(boxes)

    monkeypatch.setattr(heads.box_roi_pool, "by_level", spy)
    losses_of(heads, proposals, OBJECTS)
    assert len(seen) == 2 + 3 * 2
    assert sum(box in proposals[:6].tolist() for box in seen) >= 3


def test_boxes_are_learnt_where_they_are_wrong() -> None:
    heads = RoIHeads(tiny_config(roi_positive_fraction=1.0))
    off = OBJECTS.boxes + torch.tensor([0.0, 1, 0, 0, 1, 0])
    assert losses_of(heads, off, OBJECTS)["loss_box_reg"] > 0.1


def test_a_mask_is_learnt_for_its_own_class_only() -> None:
    heads = RoIHeads(tiny_config(class_names=("a", "b", "c"), roi_positive_fraction=1.0))
    target = target_of(OBJECTS.labels.numpy(), [1, 3])
    losses_of(heads, torch.zeros(0, 6), target)["loss_mask"].backward()
    grad = heads.mask_head.mask_fcn_logits.weight.grad
    assert grad is not None
    assert [bool(g.any()) for g in grad] == [True, False, True]


def test_the_class_is_learnt() -> None:
    heads = RoIHeads(tiny_config(class_names=("a", "b"), roi_positive_fraction=1.0))
    losses_of(heads, torch.zeros(0, 6), target_of(OBJECTS.labels.numpy(), [2, 2]))["loss_classifier"].backward()
    grad = heads.box_head.cls_score.bias.grad
    assert grad is not None
    assert [g < 0 for g in grad] == [False, False, True]


def detect(heads: RoIHeads, proposals: Tensor, valid: tuple[int, int, int] = SHAPE) -> tuple[Detections, list[float]]:
    """Detections, and the shares of work that were reported."""
    steps, shares = heads.detect_steps(pyramid(), proposals, SHAPE, valid), []
    with torch.no_grad():
        while True:
            try:
                shares.append(next(steps))
            except StopIteration as stop:
                return stop.value, shares


def test_detections_are_sorted_inside_the_image_and_above_the_floor() -> None:
    torch.manual_seed(1)
    heads = RoIHeads(tiny_config(class_names=("a", "b", "c"), score_floor=0.2, nms_iou=1.0))
    torch.nn.init.normal_(heads.box_head.cls_score.weight)
    found, shares = detect(heads, boxes_inside(150), valid=(9, 13, 14))
    assert len(found.boxes) > 20
    assert (found.scores.diff() <= 0).all()
    assert found.scores.min() >= 0.2
    assert set(found.classes.tolist()) <= {1, 2, 3}
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 3:] <= torch.tensor([9.0, 13, 14])).all()
    assert found.masks.shape == (len(found.boxes), 8, 8, 8)
    assert ((found.masks >= 0) & (found.masks <= 1)).all()
    assert shares == sorted(shares)
    assert len(shares) > 4
    assert 0.5 < shares[0] < shares[-1] == 1


def test_the_masks_are_those_of_the_detected_class() -> None:
    heads = RoIHeads(tiny_config(class_names=("a", "b"), score_floor=0.0))
    torch.nn.init.zeros_(heads.mask_head.mask_fcn_logits.weight)
    heads.mask_head.mask_fcn_logits.bias = torch.nn.Parameter(torch.tensor([-9.0, 9.0]))
    found, _ = detect(heads, boxes_inside(5))
    assert set(found.classes.tolist()) == {1, 2}
    torch.testing.assert_close(found.masks.mean((1, 2, 3)), (found.classes == 2).float(), atol=1e-3, rtol=0)


def test_only_detections_of_one_class_suppress_each_other() -> None:
    heads = RoIHeads(tiny_config(class_names=("a", "b"), score_floor=0.0, nms_iou=0.3))
    box = torch.tensor([[4.0, 8, 8, 8, 14, 14]])
    found, _ = detect(heads, box.repeat(10, 1))
    assert sorted(found.classes.tolist()) == [1, 2]
    torch.testing.assert_close(found.boxes, box.repeat(2, 1), atol=0.2, rtol=0)


@pytest.mark.parametrize("settings", [{"score_floor": 1.0}, {"max_candidates": 3, "score_floor": 0.0}])
def test_no_more_detections_than_wanted(settings: dict[str, float]) -> None:
    found, _ = detect(RoIHeads(tiny_config(**settings)), boxes_inside(50))
    assert len(found.boxes) == settings.get("max_candidates", 0) == len(found.masks)


def test_no_proposals_no_detections() -> None:
    found, shares = detect(RoIHeads(tiny_config()), torch.zeros(0, 6))
    assert found.masks.shape == (0, 8, 8, 8)
    assert found.boxes.shape == (0, 6)
    assert shares == []


def test_targets_move_together() -> None:
    target = target_of(ellipsoids((32, 44, 44), EIGHT)).to(torch.device("meta"))
    assert {t.device.type for t in (target.boxes, target.classes, target.ids, target.labels)} == {"meta"}
