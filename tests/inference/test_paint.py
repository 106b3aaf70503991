"""Footprints and painting against the definition, voxel by voxel, and against the detector's own operation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.structures import Candidates, Instances

SHAPE = (7, 9, 8)


def random_candidates(seed: int, count: int = 6, *, connected: bool = True) -> Candidates:
    """Boxes in and partly out of a small image; masks are noise, or a ball in noise that is one piece."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(-1, np.subtract(SHAPE, 1), (count, 3))
    boxes = np.concatenate([low, low + rng.uniform(0.3, 7, (count, 3))], axis=1)
    masks = rng.integers(0, 256, (count, 4, 5, 3))
    if connected:
        masks = np.stack([np.full((4, 5, 3), value) for value in rng.integers(60, 256, count)])
        masks[:, 1:3, 1:4, 1] = 255
    return Candidates(
        boxes.astype(np.float32),
        np.sort(rng.uniform(0.05, 1, count))[::-1].astype(np.float32),
        np.ones(count, np.int64),
        masks.astype(np.uint8),
        SHAPE,
    )


def probability_at(candidates: Candidates, index: int, voxel: tuple[int, int, int]) -> float:
    """Foreground probability (0 to 255) by the definition; -1 outside the box."""
    box, mask = candidates.boxes[index].astype(float), candidates.masks[index].astype(float)
    position = []
    for axis, at in enumerate(voxel):
        low, high, cells = box[axis], box[axis + 3], mask.shape[axis]
        if not low <= at + 0.5 < high:
            return -1.0
        position.append([(at + 0.5 - low) / (high - low) * cells - 0.5])
    return float(ndimage.map_coordinates(mask, position, order=1, mode="nearest")[0])


def all_of(candidates: Candidates) -> Instances:
    return Instances(candidates, np.arange(len(candidates)), np.zeros(len(candidates), np.int64))


@pytest.mark.parametrize("seed", range(6))
def test_painting_against_the_definition(seed: int) -> None:
    candidates = random_candidates(seed)
    labels = paint(candidates, all_of(candidates))
    checked = 0
    for voxel in product(*map(range, SHAPE)):
        chances = [probability_at(candidates, k, voxel) for k in range(len(candidates))]
        if any(abs(chance - 127.5) < 1e-3 for chance in chances):
            continue  # rounding decides
        checked += 1
        assert labels[voxel] == next((k + 1 for k, chance in enumerate(chances) if chance > 127.5), 0), voxel
    assert checked > 400
    assert len(np.unique(labels)) > 3


def test_painting_as_the_detectors_own_operation() -> None:
    torch = pytest.importorskip("torch")
    from napari_mrcnn3d._ops import paste_masks_3d

    painted = 0
    for seed in range(8):
        candidates = random_candidates(seed, 12)
        expected = paste_masks_3d(
            torch.from_numpy(candidates.masks.astype(np.float64) / 255),
            torch.from_numpy(candidates.boxes),
            torch.arange(1, 13),
            torch.from_numpy(candidates.scores),
            SHAPE,
        ).numpy()
        labels = paint(candidates, all_of(candidates))
        np.testing.assert_array_equal(labels, expected)
        painted += np.count_nonzero(labels)
    assert painted > 1000


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), connected=st.booleans())
def test_footprints_are_tight_connected_and_counted(seed: int, connected: bool) -> None:
    candidates = random_candidates(seed, 8, connected=connected)
    footprints = Footprints.of(candidates)
    whole = np.zeros((len(footprints), *SHAPE), bool)
    for index, (region, mask) in enumerate(zip(footprints.regions, footprints.masks, strict=True)):
        whole[index][region] = mask
        assert footprints.voxels[index] == np.count_nonzero(mask)
        if mask.size:
            assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1
            assert all(mask.any(axis=axes).take([0, -1]).all() for axes in ((1, 2), (0, 2), (0, 1)))
    for better, worse in product(range(8), range(8)):
        common = np.count_nonzero(whole[better] & whole[worse]) if better < worse else 0
        assert footprints.shared[worse].get(better, 0) == common
    for index in range(8):
        others = list(footprints.shared[index])
        assert others == sorted(others)
        union = whole[others].any(axis=0) & whole[index]
        assert footprints.covered(index, others) == np.count_nonzero(union)


def test_of_several_pieces_the_largest_is_kept() -> None:
    mask = np.zeros((1, 1, 1, 10), np.uint8)
    mask[..., [0, 1, 4, 5, 6, 8]] = 255
    box = np.array([[0, 0, 0, 1, 1, 10]], np.float32)
    candidates = Candidates(box, np.ones(1, np.float32), np.ones(1, np.int64), mask, (1, 1, 10))
    assert paint(candidates, all_of(candidates)).ravel().tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "box",
    [
        (2, 2, 2, 2, 5, 5),
        (4, 2, 2, 2, 5, 5),
        (2.6, 2, 2, 3.4, 5, 5),  # between two voxel centres
        (-9, 2, 2, -1, 5, 5),
        (8, 2, 2, 12, 5, 5),
        (np.nan, 2, 2, 4, 5, 5),
        (0, 0, 0, np.inf, 5, 5),
    ],
)
def test_boxes_without_voxels_paint_nothing(box: tuple[float, ...]) -> None:
    candidates = Candidates(
        np.array([box], np.float32),
        np.ones(1, np.float32),
        np.ones(1, np.int64),
        np.full((1, 3, 3, 3), 255, np.uint8),
        SHAPE,
    )
    footprints = Footprints.of(candidates)
    assert footprints.voxels.tolist() == [0]
    assert not paint(footprints, all_of(candidates)).any()


def test_an_empty_mask_paints_nothing() -> None:
    candidates = random_candidates(0).take(np.arange(1))
    empty = Candidates(
        candidates.boxes, candidates.scores, candidates.classes, np.full((1, 3, 3, 3), 127, np.uint8), SHAPE
    )
    assert Footprints.of(empty).voxels.tolist() == [0]


def test_no_candidates() -> None:
    nothing = Candidates.empty((3, 4, 5))
    labels = paint(nothing, select(nothing, SelectConfig()))
    assert (labels.shape, labels.dtype, labels.any()) == ((3, 4, 5), np.uint16, False)


def test_labels_above_65535_take_int32() -> None:
    candidates = random_candidates(1)
    one, other = np.flatnonzero(Footprints.of(candidates).voxels)[-2:]
    for repeats, dtype in ((65_534, np.uint16), (65_535, np.int32)):
        index = np.append(np.full(repeats, one), other)
        instances = Instances(candidates, index, np.zeros(len(index), np.int64))
        labels = paint(candidates, instances)
        assert labels.dtype == dtype
        assert set(np.unique(labels)) == {0, 1, len(index)}


def test_painting_over_what_was_there() -> None:
    candidates = random_candidates(3)
    expected = paint(candidates, all_of(candidates))
    out = np.full(SHAPE, 77, np.int32)
    assert paint(candidates, all_of(candidates), out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("out", [np.zeros((2, 2, 2), np.uint16), np.zeros(SHAPE, np.float32)], ids=["shape", "type"])
def test_what_cannot_be_painted_on_is_refused(out: np.ndarray) -> None:
    candidates = random_candidates(0)
    with pytest.raises(ValueError, match="out must be integers"):
        paint(candidates, all_of(candidates), out=out)


def test_labels_that_do_not_fit_are_refused() -> None:
    candidates = random_candidates(0, 200)
    with pytest.raises(ValueError, match="up to 200"):
        paint(candidates, all_of(candidates), out=np.zeros(SHAPE, np.int8))


def test_a_mix_up_is_refused() -> None:
    candidates = random_candidates(0)
    with pytest.raises(ValueError, match="not selected from these candidates"):
        paint(candidates.take(np.arange(2)), all_of(candidates))
    with pytest.raises(ValueError, match="sorted by falling score"):
        Footprints.of(candidates.take(np.array([3, 1])))
