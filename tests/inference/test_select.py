"""The selection against a literal, voxel-by-voxel reading of its rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.structures import Candidates, Instances, VoxelSize

SHAPE = (6, 12, 12)


def crowd(seed: int, count: int = 12, size: VoxelSize | None = None) -> Candidates:
    """Solid boxes of whole voxels, many of them over each other."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, np.subtract(SHAPE, 2), (count, 3))
    high = np.minimum(low + rng.integers(1, 8, (count, 3)), SHAPE)
    return Candidates(
        np.concatenate([low, high], axis=1).astype(np.float32),
        np.sort(rng.choice([0.1, 0.3, 0.5, 0.7, 0.9], count))[::-1].astype(np.float32),
        rng.integers(1, 3, count),
        np.full((count, 2, 2, 2), 255, np.uint8),
        SHAPE,
        size,
        ("nucleus", "debris"),
    )


def row(*spans: tuple[int, int], size: VoxelSize | None = None) -> Candidates:
    """Objects along a line of 20 voxels, best first."""
    boxes = np.array([(0, 0, start, 1, 1, stop) for start, stop in spans], np.float32)
    count = len(boxes)
    scores = np.linspace(0.9, 0.6, count, dtype=np.float32)
    return Candidates(
        boxes, scores, np.ones(count, np.int64), np.full((count, 1, 1, 1), 255, np.uint8), (1, 1, 20), size
    )


def by_the_rule(candidates: Candidates, config: SelectConfig, classes: set[int] | None) -> tuple[list[int], list[int]]:
    """Positions kept and voxels left, counted in full volumes of solid boxes."""
    unit = math.prod(candidates.voxel_size) if candidates.voxel_size else 1.0
    taken = np.zeros(candidates.shape, bool)
    kept, voxels = [], []
    for index, box in enumerate(candidates.boxes.astype(int)):
        own = np.zeros(candidates.shape, bool)
        own[box[0] : box[3], box[1] : box[4], box[2] : box[5]] = True
        total, covered = own.sum(), (own & taken).sum()
        if candidates.scores[index] < np.float32(config.min_score) or total * unit < config.min_size:
            continue
        if classes is not None and candidates.classes[index] not in classes:
            continue
        left = total - covered
        if covered / total > config.max_overlap or left == 0 or left * unit < config.min_size:
            continue
        kept.append(index)
        voxels.append(int(left))
        taken |= own
    return kept, voxels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    min_score=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    max_overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1),
    min_size=st.sampled_from([0.0, 3.0, 12.0, 40.0]),
    size=st.sampled_from([None, VoxelSize(2.0, 0.5, 0.5)]),
    classes=st.sampled_from([None, {1}, {2}, {1, 2}, set()]),
)
def test_the_selection_follows_its_rule(
    seed: int,
    min_score: float,
    max_overlap: float,
    min_size: float,
    size: VoxelSize | None,
    classes: set[int] | None,
) -> None:
    candidates = crowd(seed, size=size)
    config = SelectConfig(min_score=min_score, max_overlap=max_overlap, min_size=min_size)
    kept, voxels = by_the_rule(candidates, config, classes)
    footprints = Footprints.of(candidates)
    instances = select(footprints, config, classes=classes)
    assert instances.index.tolist() == kept
    assert instances.voxels.tolist() == voxels
    np.testing.assert_array_equal(instances.candidates.boxes, candidates.boxes[kept])
    painted = np.bincount(paint(footprints, instances).ravel(), minlength=len(kept) + 1)[1:]
    assert painted.tolist() == voxels


def kept(candidates: Candidates, **settings: float) -> list[int]:
    return select(candidates, SelectConfig(**({"min_score": 0.0} | settings))).index.tolist()


def test_a_limit_is_still_kept() -> None:
    pair = row((0, 10), (7, 17))
    assert kept(pair, max_overlap=0.3) == [0, 1]
    assert kept(pair, max_overlap=0.29) == [0]
    assert kept(pair, max_overlap=0.3, min_size=7) == [0, 1]
    assert kept(pair, max_overlap=0.3, min_size=8) == [0]  # 7 voxels are left of the second
    assert kept(pair, min_score=0.6) == [0, 1]  # 0.6 in single precision, as the scores are


def test_voxels_of_several_neighbours_count_once() -> None:
    """The first two cover voxels 0 to 9 of the third together; 4 to 6 are in both and must not count twice."""
    three = row((0, 7), (4, 10), (0, 20))
    assert kept(three, max_overlap=0.5) == [0, 1, 2]
    assert select(three, SelectConfig(min_score=0, max_overlap=0.5)).voxels.tolist() == [7, 3, 10]


def test_what_was_left_out_takes_no_voxels() -> None:
    chain = row((0, 10), (5, 15), (10, 20))
    assert kept(chain, max_overlap=0.2) == [0, 2]


def test_an_object_that_is_covered_completely_is_left_out() -> None:
    assert kept(row((0, 10), (2, 8)), max_overlap=1.0) == [0]


def test_sizes_are_micrometres_where_the_voxel_size_is_known() -> None:
    spans = (0, 4), (10, 18)
    assert kept(row(*spans), min_size=5) == [1]
    assert kept(row(*spans, size=VoxelSize(2.0, 1.0, 1.0)), min_size=5) == [0, 1]
    assert kept(row(*spans, size=VoxelSize(0.5, 0.5, 0.5)), min_size=5) == []


def test_candidates_and_footprints_give_the_same() -> None:
    candidates = crowd(5)
    first, second = (select(source, SelectConfig()) for source in (candidates, Footprints.of(candidates)))
    assert isinstance(first, Instances)
    assert first.index.tolist() == second.index.tolist()


def test_unsorted_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by falling score"):
        select(row((0, 3), (5, 9)).take(np.array([1, 0])), SelectConfig())
