"""Assignment of anchors to objects, against brute force and by hand; sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d.model.anchors import anchors_on_grid
from napari_mrcnn3d.model.matcher import (
    BACKGROUND,
    IGNORED,
    match_atss,
    match_iou,
    sample_hard,
    sample_random,
)
from tests.ops.helpers import few, random_boxes

NOTHING = torch.zeros(0, 6)


def iou(a: list[float], b: list[float]) -> float:
    shared = math.prod(max(0.0, min(a[k + 3], b[k + 3]) - max(a[k], b[k])) for k in range(3))
    return shared / (
        math.prod(a[k + 3] - a[k] for k in range(3)) + math.prod(b[k + 3] - b[k] for k in range(3)) - shared
    )


def cells(grid: int, stride: int, *sizes: float) -> Tensor:
    """Cubic anchors of these sides in every cell of a cubic grid."""
    triples = [(s, s, s) for s in sizes]
    return anchors_on_grid((grid,) * 3, (stride,) * 3, triples, offset=0.5, device=torch.device("cpu"))


@few
@given(seed=st.integers(0, 10**6), objects=st.integers(0, 6), keep_best=st.booleans())
def test_thresholds_against_brute_force(seed: int, objects: int, keep_best: bool) -> None:
    boxes = random_boxes(objects, seed, extent=16.0)
    anchors = random_boxes(40, seed + 1, extent=16.0)
    table = [[iou(b, a) for b in boxes.tolist()] for a in anchors.tolist()]
    found = match_iou(boxes, anchors, fg_iou=0.3, bg_iou=0.1, keep_best=keep_best).tolist()
    best = [max((row[k] for row in table), default=0.0) for k in range(objects)]
    for match, row in zip(found, table, strict=True):
        top = max(row, default=0.0)
        favoured = [k for k in range(objects) if row[k] > 0 and row[k] == pytest.approx(best[k], rel=1e-5)]
        if keep_best and favoured:
            assert match in favoured
        elif top >= 0.3:
            assert row[match] == pytest.approx(top, rel=1e-5)
        else:
            assert match == (IGNORED if top >= 0.1 else BACKGROUND)


def test_between_the_thresholds_nothing_is_learnt() -> None:
    box = torch.tensor([[0.0, 0, 0, 10, 10, 10]])
    anchors = torch.tensor([[0.0, 0, 0, 10, 10, 8], [0, 0, 0, 10, 10, 4], [0, 0, 0, 10, 10, 2]])
    assert match_iou(box, anchors, fg_iou=0.5, bg_iou=0.3).tolist() == [0, IGNORED, BACKGROUND]


def atss(boxes: Tensor, levels: list[Tensor], counts: list[int]) -> list[int]:
    """Section 4.1 of the paper in plain loops; no two anchors may tie."""
    anchors = torch.cat(levels).tolist()
    wanted: dict[int, tuple[float, int]] = {}
    for row, box in enumerate(boxes.tolist()):
        middle = [(box[k] + box[k + 3]) / 2 for k in range(3)]
        near, start = [], 0
        for level, count in zip(levels, counts, strict=True):
            index = range(start, start + len(level))
            near += sorted(
                index, key=lambda i: math.dist(middle, [(anchors[i][k] + anchors[i][k + 3]) / 2 for k in range(3)])
            )[:count]
            start += len(level)
        overlaps = [iou(box, anchors[i]) for i in near]
        mean = sum(overlaps) / len(overlaps)
        limit = mean + (sum((o - mean) ** 2 for o in overlaps) / (len(overlaps) - 1)) ** 0.5
        centres = [[(anchors[i][k] + anchors[i][k + 3]) / 2 for k in range(3)] for i in near]
        inside = [all(box[k] < c[k] < box[k + 3] for k in range(3)) for c in centres]
        chosen = [k for k, o in enumerate(overlaps) if o >= limit and inside[k]]
        for k in chosen or [overlaps.index(max(overlaps))]:
            if overlaps[k] > wanted.get(near[k], (0.0, 0))[0]:
                wanted[near[k]] = (overlaps[k], row)
    return [wanted.get(i, (0.0, BACKGROUND))[1] for i in range(len(anchors))]


@few
@given(seed=st.integers(0, 10**6), objects=st.integers(1, 6))
def test_adaptive_selection_against_the_paper_in_loops(seed: int, objects: int) -> None:
    boxes = random_boxes(objects, seed, extent=20.0, sides=(2.0, 10.0))
    levels = [random_boxes(count, seed + k, extent=20.0) for k, count in enumerate((60, 25, 3), start=1)]
    assert match_atss(boxes, levels, [9, 9, 9]).tolist() == atss(boxes, levels, [9, 9, 9])


@few
@given(seed=st.integers(0, 10**6), side=st.floats(1, 24))
def test_a_lone_object_of_any_size_anywhere_has_an_anchor(seed: int, side: float) -> None:
    levels = [cells(8, 4, 5.0, 8.0), cells(4, 8, 16.0)]
    corner = torch.rand(3, generator=torch.Generator().manual_seed(seed)) * (32 - side)
    box = torch.cat([corner, corner + side])[None]
    matched = match_atss(box, levels, [18, 9])
    assert (matched == 0).any()
    assert all(iou(box[0].tolist(), a) > 0 for a in torch.cat(levels)[matched == 0].tolist())


def test_an_object_smaller_than_a_cell_gets_its_best_anchor() -> None:
    levels = [cells(4, 8, 9.0)]
    voxel = torch.tensor([[8.0, 8, 8, 9, 9, 9]])  # in the corner of a cell, no centre inside
    matched = match_atss(voxel, levels, [9])
    best = max(range(64), key=lambda i: iou(voxel[0].tolist(), levels[0][i].tolist()))
    assert matched[best] == 0


def test_an_anchor_wanted_twice_goes_to_the_object_it_fits_better() -> None:
    levels = [cells(2, 8, 8.0)]
    small, good = [2.0, 2, 2, 6, 6, 6], [0.0, 0, 0, 8, 8, 7]
    for boxes, winner in ([small, good], 1), ([good, small], 0):
        assert match_atss(torch.tensor(boxes), levels, [1]).tolist() == [winner] + [BACKGROUND] * 7


def test_without_objects_everything_is_background() -> None:
    levels = [cells(2, 8, 8.0), cells(1, 16, 16.0)]
    assert match_atss(NOTHING, levels, [9, 9]).tolist() == [BACKGROUND] * 9
    assert match_iou(NOTHING, torch.cat(levels), fg_iou=0.5, bg_iou=0.3, keep_best=True).tolist() == [BACKGROUND] * 9


@pytest.mark.filterwarnings("error")
def test_a_lone_anchor_is_enough() -> None:
    assert match_atss(torch.tensor([[1.0, 1, 1, 3, 3, 3]]), [cells(1, 8, 8.0)], [9]).tolist() == [0]


MATCHED = torch.tensor([0, BACKGROUND, IGNORED, 1] * 25)


@few
@given(count=st.integers(1, 200), share=st.floats(0, 1))
def test_a_random_sample_holds_its_share_once_each_and_nothing_ignored(count: int, share: float) -> None:
    positive, negative = sample_random(MATCHED, count, share)
    assert len(positive) == min(50, int(count * share))
    assert len(negative) == min(25, count - len(positive))
    assert (MATCHED[positive] >= 0).all()
    assert (MATCHED[negative] == BACKGROUND).all()
    for sample in (positive, negative):
        assert len(sample.unique()) == len(sample)


def test_samples_differ_but_repeat_with_the_seed() -> None:
    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return sample_random(MATCHED, 20, 0.5)[0].tolist()

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(("positives", "negatives"), [(0, 32), (1, 32), (10, 32), (20, 60), (64, 192), (200, 128)])
def test_three_backgrounds_come_with_a_positive(positives: int, negatives: int) -> None:
    matched = torch.full((5000,), BACKGROUND)
    matched[:positives] = 0
    found, background = sample_hard(matched, torch.randn(5000), 256, positive_fraction=0.5)
    assert len(found) == min(positives, 128)
    assert len(background) == negatives
    assert (matched[background] == BACKGROUND).all()


def test_half_of_the_backgrounds_look_like_objects() -> None:
    matched = torch.full((10_000,), BACKGROUND)
    matched[:10] = 0
    matched[10:20] = IGNORED
    scores = torch.arange(10_000.0).flip(0)  # the best are the positives and the ignored ones
    positive, negative = sample_hard(matched, scores, 256, positive_fraction=0.5, pool=2)
    assert sorted(positive.tolist()) == list(range(10))
    hard, easy = negative[:16], negative[16:]
    assert hard.min() >= 20
    assert hard.max() < 20 + 2 * 32
    assert easy.float().mean() > 2000  # drawn from all of them


def test_a_volume_full_of_objects_gives_what_background_there_is() -> None:
    matched = torch.zeros(100, dtype=torch.int64)
    matched[:3] = BACKGROUND
    positive, negative = sample_hard(matched, torch.zeros(100), 64, positive_fraction=0.5)
    assert len(positive) == 32
    assert set(negative.tolist()) == {0, 1, 2}
