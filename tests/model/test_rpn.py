"""Proposals: which cell an anchor belongs to, what is proposed, what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d._ops import box_iou_3d
from napari_mrcnn3d.model.box_coder import encode_boxes
from napari_mrcnn3d.model.rpn import RegionProposalNetwork, RPNOutput
from tests._tiny import tiny_config
from tests.ops.helpers import random_boxes

SHAPE = (16, 32, 32)
BOXES = torch.tensor([[2.0, 4, 4, 8, 16, 16], [8, 16, 16, 16, 32, 32]])


def pyramid(batch: int = 1) -> list[Tensor]:
    """Empty maps of the tiny network for a volume of SHAPE."""
    strides = tiny_config().level_strides
    return [torch.zeros(batch, 8, *(n // s for n, s in zip(SHAPE, stride, strict=True))) for stride in strides]


def output(rpn: RegionProposalNetwork) -> RPNOutput:
    """The untrained answer to nothing, to be changed."""
    out = rpn(pyramid())[0]
    return replace(out, objectness=out.objectness.detach().clone(), deltas=out.deltas.detach().clone())


def copying(rpn: RegionProposalNetwork) -> RegionProposalNetwork:
    """Make the head say the first channel of a cell as objectness of all its anchors."""
    for parameter in rpn.head.parameters():
        torch.nn.init.zeros_(parameter)
    rpn.head.conv.weight.data[0, 0, 1, 1, 1] = 1
    rpn.head.cls_logits.weight.data[:, 0] = 1
    return rpn


@pytest.mark.parametrize(("level", "cell"), [(1, (3, 5, 2)), (1, (0, 0, 0)), (2, (3, 0, 1))])
def test_the_anchors_of_an_active_cell_are_centred_in_it(level: int, cell: tuple[int, int, int]) -> None:
    maps = pyramid(batch=2)
    maps[level][1, 0][cell] = 5
    silent, active = copying(RegionProposalNetwork(tiny_config()))(maps)
    assert silent.objectness.max() == 0
    hot = torch.cat(active.levels)[active.objectness > 1]
    assert len(hot) == (2 if level == 1 else 1)  # sizes per cell of that level; the coarse one leaves outputs unused
    stride = torch.tensor(tiny_config().level_strides[level])
    torch.testing.assert_close((hot[:, :3] + hot[:, 3:]) / 2, ((torch.tensor(cell) + 0.5) * stride).expand(len(hot), 3))


def test_the_extra_level_is_as_coarse_as_its_anchors() -> None:
    config = tiny_config(rpn_extra_level=True, anchor_sizes=(((4, 8, 8),), ((10, 20, 20),), ((20, 40, 40),)))
    maps = pyramid()
    maps[2] = torch.zeros(1, 8, 3, 5, 1)  # odd extents
    levels = RegionProposalNetwork(config)(maps)[0].levels
    assert [len(level) for level in levels[1:]] == [3 * 5 * 1, 2 * 3 * 1]
    centres = (levels[2][:, :3] + levels[2][:, 3:]) / 2
    assert centres.max(0).values.tolist() == [1.5 * 8, 2.5 * 16, 0.5 * 16]


def test_proposals_are_the_best_boxes_inside_the_image() -> None:
    rpn = RegionProposalNetwork(tiny_config(rpn_nms_iou=0.3))
    out = output(rpn)
    torch.manual_seed(0)
    out = replace(out, objectness=torch.randn_like(out.objectness), deltas=0.3 * torch.randn_like(out.deltas))
    boxes, scores = rpn.proposals(out, (15, 30, 31), 20)
    assert 1 < len(boxes) <= 20
    assert (scores.diff() <= 0).all()
    assert scores[0] == out.objectness.max()
    assert (boxes >= 0).all()
    assert (boxes[:, 3:] <= torch.tensor([15, 30, 31])).all()
    overlap = box_iou_3d(boxes, boxes).fill_diagonal_(0)
    assert overlap.max() <= 0.3


def test_every_level_may_propose_before_suppression() -> None:
    rpn = RegionProposalNetwork(tiny_config(rpn_pre_nms_top_n=1, rpn_nms_iou=1.0))
    out = output(rpn)
    out.objectness[: len(out.levels[0])] += 10  # the coarse level would never win
    boxes, _ = rpn.proposals(out, SHAPE, 50)
    assert len(boxes) == 2


def test_slivers_and_numbers_gone_wrong_are_not_proposed() -> None:
    rpn = RegionProposalNetwork(tiny_config())
    out = output(rpn)
    out.objectness[0] = float("nan")
    out.deltas[1, 0] = float("nan")
    out.deltas[2:, 3] = -5  # 150 times thinner
    boxes, _ = rpn.proposals(out, SHAPE, 50)
    assert len(boxes) == 0


@pytest.mark.parametrize("assignment", ["atss", "iou"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("boxes", [BOXES, torch.zeros(0, 6), torch.tensor([[3.0, 3, 3, 4, 4, 4]])])
def test_losses_are_finite_whatever_the_objects(assignment: str, hard: bool, boxes: Tensor) -> None:
    rpn = RegionProposalNetwork(tiny_config(rpn_assignment=assignment, rpn_hard_negatives=hard))
    for size in (1, 32):  # of the sample
        rpn.config = tiny_config(rpn_assignment=assignment, rpn_hard_negatives=hard, rpn_batch_size=size)
        losses = rpn.loss(output(rpn), boxes)
        assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("assignment", ["atss", "iou"])
def test_the_right_answer_costs_nothing(assignment: str) -> None:
    rpn = RegionProposalNetwork(tiny_config(rpn_assignment=assignment, rpn_fg_iou=0.4))
    out = output(rpn)
    nearest = box_iou_3d(torch.cat(out.levels), BOXES)
    exact = encode_boxes(BOXES[nearest.argmax(1)], torch.cat(out.levels), rpn.config.rpn_box_weights)
    torch.manual_seed(0)
    losses = rpn.loss(replace(out, deltas=exact), BOXES)
    assert losses["loss_rpn_box_reg"] == 0
    torch.testing.assert_close(losses["loss_objectness"], torch.tensor(2.0).log(), atol=0.05, rtol=0)  # knows nothing
    assert rpn.loss(replace(out, deltas=exact + 1), BOXES)["loss_rpn_box_reg"] > 1


def test_objectness_is_pushed_up_on_objects_and_down_elsewhere() -> None:
    rpn = RegionProposalNetwork(tiny_config(rpn_hard_negatives=False))
    out = output(rpn)
    logits = out.objectness.detach().clone().requires_grad_()
    rpn.loss(replace(out, objectness=logits), random_boxes(3, 0, extent=16.0, sides=(6.0, 12.0)))[
        "loss_objectness"
    ].backward()
    assert logits.grad is not None
    raised, lowered = (logits.grad < 0).sum(), (logits.grad > 0).sum()
    assert 3 <= raised <= 16
    assert raised + lowered <= 32
