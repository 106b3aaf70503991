"""Boxes to offsets and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.model.box_coder import clip_boxes, decode_boxes, encode_boxes
from tests.ops.helpers import few, random_boxes

weights = st.tuples(st.floats(0.5, 10), st.floats(0.5, 10))


@few
@given(seed=st.integers(0, 10**6), count=st.integers(0, 20), weights=weights)
def test_a_box_comes_back_from_its_offsets(seed: int, count: int, weights: tuple[float, float]) -> None:
    boxes, anchors = random_boxes(count, seed, sides=(0.5, 30)), random_boxes(count, seed + 1, sides=(2, 30))
    deltas = encode_boxes(boxes, anchors, weights)
    torch.testing.assert_close(decode_boxes(deltas, anchors, weights), boxes, atol=1e-3, rtol=1e-4)


def test_the_offsets_are_those_of_the_paper() -> None:
    anchor, box = torch.tensor([[0.0, 0, 0, 10, 20, 40]]), torch.tensor([[2.0, 2, 2, 22, 12, 42]])
    expected = [(12 - 5) / 10, (7 - 10) / 20, (22 - 20) / 40, math.log(20 / 10), math.log(10 / 20), math.log(40 / 40)]
    torch.testing.assert_close(encode_boxes(box, anchor, (1.0, 1.0)), torch.tensor([expected]))
    weighted = [10 * v for v in expected[:3]] + [5 * v for v in expected[3:]]
    torch.testing.assert_close(encode_boxes(box, anchor, (10.0, 5.0)), torch.tensor([weighted]))


def test_no_offset_gives_the_anchor_for_every_class() -> None:
    anchors = random_boxes(5, 0)
    found = decode_boxes(torch.zeros(5, 3, 6), anchors, (10.0, 5.0))
    torch.testing.assert_close(found, anchors[:, None].expand(5, 3, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_are_float32_whatever_the_network_computes_in(dtype: torch.dtype) -> None:
    anchors = random_boxes(4, 0) + 5000.25  # float16 has steps of four voxels there
    assert torch.equal(
        decode_boxes(torch.zeros(4, 6, dtype=dtype), anchors, (1.0, 1.0)).round(decimals=1), anchors.round(decimals=1)
    )


def test_absurd_offsets_do_not_overflow() -> None:
    anchors = torch.tensor([[0.0, 0, 0, 8, 8, 8]])
    box = decode_boxes(torch.full((1, 6), 1e4), anchors, (1.0, 1.0))
    assert torch.isfinite(box).all()
    torch.testing.assert_close(box[0, 3:] - box[0, :3], torch.full((3,), 8 * 1000 / 16), rtol=1e-3, atol=0)


@few
@given(seed=st.integers(0, 10**6))
def test_clipped_boxes_lie_in_the_volume_and_hold_the_same_voxels(seed: int) -> None:
    shape = (5, 17, 30)
    boxes = random_boxes(20, seed, sides=(1, 40))
    cut = clip_boxes(boxes.view(4, 5, 6), shape).view(-1, 6)
    limit = torch.tensor(shape)
    assert (cut >= 0).all()
    assert (cut[:, :3] <= limit).all()
    assert (cut[:, 3:] <= limit).all()
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(seed)) * limit
    for before, after in zip(boxes, cut, strict=True):
        inside = ((points >= before[:3]) & (points < before[3:])).all(1)
        assert torch.equal(inside, ((points >= after[:3]) & (points < after[3:])).all(1))
