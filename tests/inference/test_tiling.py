"""Tiles: they cover the volume, overlap enough, and together answer for everything."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.inference.tiling import Tile, default_tile, make_tiles
from tests.ops.helpers import few

lengths = st.tuples(*[st.integers(1, 40)] * 3)


@few
@given(shape=lengths, tile=lengths, overlap=st.tuples(*[st.integers(0, 50)] * 3))
def test_the_cores_part_the_volume(
    shape: tuple[int, int, int], tile: tuple[int, int, int], overlap: tuple[int, int, int]
) -> None:
    count = np.zeros(shape, int)
    for part in make_tiles(shape, tile, overlap):
        core = tuple(slice(a, b) for a, b in zip(part.core_start, part.core_stop, strict=True))
        assert count[core].size > 0
        count[core] += 1
        for k in range(3):
            assert 0 <= part.start[k] <= part.core_start[k] < part.core_stop[k] <= part.stop[k] <= shape[k]
            assert part.stop[k] - part.start[k] == min(tile[k], shape[k])
    assert (count == 1).all()


@few
@given(length=st.integers(1, 200), tile=st.integers(1, 60), overlap=st.integers(0, 60))
def test_neighbours_overlap_enough_and_the_rest_is_evenly_spread(length: int, tile: int, overlap: int) -> None:
    tiles = make_tiles((length, 1, 1), (tile, 1, 1), (overlap, 0, 0))
    wanted = min(overlap, tile // 2)
    shared = [a.stop[0] - b.start[0] for a, b in pairwise(tiles)]
    assert all(s >= wanted for s in shared)
    assert max(shared, default=0) - min(shared, default=0) <= 1
    if len(tiles) > 1:  # one tile fewer would not do
        assert (len(tiles) - 1) * (tile - wanted) + wanted < length


@few
@given(shape=lengths, seed=st.integers(0, 10**6))
def test_every_box_has_a_tile_that_sees_it_whole_and_answers_for_it(shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    overlap = 8
    tiles = make_tiles(shape, (20, 20, 20), (overlap,) * 3)
    side = np.minimum(rng.uniform(0.5, overlap, (30, 3)), shape)
    low = rng.random((30, 3)) * (shape - side)
    boxes = np.concatenate([low, low + side], 1)
    owned = np.stack([tile.owns(boxes) for tile in tiles])
    whole = np.stack([np.all((low >= t.start) & (low + side <= t.stop), 1) for t in tiles])
    assert (owned & whole).any(0).all()


def test_a_box_that_neighbours_place_differently_is_lost_by_neither() -> None:
    left, right = make_tiles((1, 1, 60), (1, 1, 40), (0, 0, 20))
    border = left.core_stop[2]
    for beyond, before in [(0.3, 0.3), (2.4, 2.4), (4, 1), (1, 4)]:  # each holds that it is the other's
        seen_left, seen_right = ([[0, 0, border + d - 5, 1, 1, border + d + 5]] for d in (beyond, -before))
        assert left.owns(np.array(seen_left)).all() or right.owns(np.array(seen_right)).all()
    far = np.array([[0.0, 0, border + 4, 1, 1, border + 14]])
    assert not left.owns(far).any()
    assert right.owns(far).all()


def test_the_outer_tiles_own_up_to_the_border() -> None:
    tile = Tile((0, 0, 0), (4, 4, 4), (0, 0, 0), (4, 4, 4))
    boxes = np.array([[0, 0, 0, 0.5, 0.5, 0.5], [3.5, 3.5, 3.5, 4, 4, 4], [0, 0, 0, 4, 4, 4]], float)
    assert tile.owns(boxes).all()
    assert tile.owns(np.zeros((0, 6))).shape == (0,)


@few
@given(shape=lengths, voxels=st.integers(1, 50_000))
def test_a_default_tile_fits_and_is_no_smaller_than_needed(shape: tuple[int, int, int], voxels: int) -> None:
    tile = default_tile(shape, voxels)
    assert np.prod(tile) <= voxels
    assert all(1 <= t <= n for t, n in zip(tile, shape, strict=True))
    assert tile == shape or np.prod(tile) * 8 > voxels  # halving rounds up: never more than one halving per axis away


def test_a_volume_that_fits_is_not_cut() -> None:
    assert default_tile((10, 20, 30), 6000) == (10, 20, 30)
    assert default_tile((10, 20, 30), 5999) == (10, 20, 15)
    (tile,) = make_tiles((10, 20, 30), (99, 99, 99), (5, 5, 5))
    assert tile.slices == (slice(0, 10), slice(0, 20), slice(0, 30))
