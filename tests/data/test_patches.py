"""Patches and their targets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.config import DataConfig
from napari_mrcnn3d.data.patches import Patch, PatchSampler, TrainingVolume, objects_in
from tests._tiny import EIGHT, ellipsoids
from tests.ops.helpers import few

SHAPE = (32, 44, 44)
LABELS = ellipsoids(SHAPE, EIGHT)


def volume(labels: np.ndarray = LABELS) -> TrainingVolume:
    """A volume whose image says where each voxel comes from."""
    classes = np.arange(labels.max() + 1) % 3 + 1
    return TrainingVolume(np.arange(labels.size, dtype=np.float32).reshape(labels.shape), labels, classes)


def sampler(
    volumes: list[TrainingVolume], size: tuple[int, int, int] = (16, 24, 24), seed: int = 0, **config: Any
) -> PatchSampler:
    settings = DataConfig(**({"augment": False} | config))
    return PatchSampler(volumes, settings, size=size, seed=seed, length=100, augment=None)


def same(a: Patch, b: Patch) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("image", "labels", "boxes", "ids"))


@few
@given(seed=st.integers(0, 10**6))
def test_objects_are_boxed_exactly(seed: int) -> None:
    labels = np.random.default_rng(seed).choice([0, 0, 0, 1, 3, 7], (3, 4, 5)).astype(np.int32)
    boxes, ids = objects_in(labels)
    assert ids.tolist() == [k for k in (1, 3, 7) if (labels == k).any()]
    for box, label in zip(boxes, ids, strict=True):
        where = np.argwhere(labels == label)
        np.testing.assert_array_equal(box, [*where.min(0), *(where.max(0) + 1)])


def test_an_empty_volume_has_no_objects() -> None:
    boxes, ids = objects_in(np.zeros((2, 3, 4), np.int32))
    assert boxes.shape == (0, 6)
    assert [boxes.dtype, ids.dtype, len(ids)] == [np.float32, np.int64, 0]


@pytest.mark.parametrize("index", range(10))
def test_image_and_labels_are_cut_alike_and_targets_belong_to_them(index: int) -> None:
    patch = sampler([volume()], min_visible=0.0)[index]
    assert patch.image.shape == patch.labels.shape == (16, 24, 24)
    np.testing.assert_array_equal(patch.labels, LABELS.ravel()[patch.image.astype(int).ravel()].reshape(16, 24, 24))
    boxes, ids = objects_in(patch.labels)
    np.testing.assert_array_equal(patch.boxes, boxes)
    np.testing.assert_array_equal(patch.ids, ids)
    np.testing.assert_array_equal(patch.classes, ids % 3 + 1)


def test_a_patch_depends_on_seed_and_number_alone() -> None:
    first, second = sampler([volume(), volume()]), sampler([volume(), volume()])
    forward = [first[k] for k in range(6)]
    assert all(same(a, second[k]) for k, a in reversed(list(enumerate(forward))))
    assert not all(same(a, b) for a, b in pairwise(forward))
    assert not all(same(forward[k], sampler([volume(), volume()], seed=1)[k]) for k in range(6))
    assert len(first) == 100


def test_objects_cut_to_a_sliver_are_no_targets() -> None:
    patches = sampler([volume()], min_visible=0.5)
    seen = 0
    for k in range(20):
        patch = patches[k]
        share = np.bincount(patch.labels.ravel(), minlength=9) / np.bincount(LABELS.ravel(), minlength=9)
        present = set(np.unique(patch.labels)) - {0}
        assert set(patch.ids) == {k for k in present if share[k] >= 0.5}
        seen += len(present) - len(patch.ids)
    assert seen > 0


def test_patches_show_objects_as_often_as_asked() -> None:
    lone = volume(ellipsoids((20, 400, 400), [((10, 50, 50), (4, 8, 8))]))
    often = sum(len(sampler([lone], object_centred=1.0)[k].ids) for k in range(30))
    seldom = sum(len(sampler([lone], object_centred=0.0)[k].ids) for k in range(30))
    assert often >= 25
    assert seldom <= 5


@pytest.mark.parametrize("shape", [(3, 44, 44), (32, 5, 5), (1, 1, 1)])
def test_a_patch_larger_than_the_volume_is_filled_with_nothing(shape: tuple[int, int, int]) -> None:
    small = TrainingVolume(np.ones(shape, np.float32), np.ones(shape, np.int32), np.array([0, 1]))
    patch = sampler([small])[0]
    assert patch.image.shape == (16, 24, 24)
    inside = np.prod(np.minimum(shape, (16, 24, 24)))
    assert patch.image.sum() == (patch.labels == 1).sum() == inside


def test_a_volume_without_objects_gives_background() -> None:
    patch = sampler([volume(np.zeros((20, 30, 30), np.int32))])[3]
    assert patch.boxes.shape == (0, 6)
    assert len(patch.classes) == 0


def test_crowded_volumes_are_drawn_more_often_but_not_alone() -> None:
    empty = np.zeros(SHAPE, np.int32)
    share = sampler([volume(), volume(empty)]).share
    assert share.tolist() == pytest.approx([0.75, 0.25])  # 3 to 1: roots of 9 and 1


def test_augmentation_gets_a_margin_around_the_same_middle() -> None:
    calls = []

    def record(
        image: np.ndarray, labels: np.ndarray, size: tuple[int, int, int], seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        calls.append((image.shape, seed))
        z, y, x = ((n - s) // 2 for n, s in zip(image.shape, size, strict=True))
        middle = slice(z, z + size[0]), slice(y, y + size[1]), slice(x, x + size[2])
        return image[middle], labels[middle]

    for size in [(16, 24, 24), (8, 16, 20), (24, 64, 64), (5, 7, 9)]:
        patches = PatchSampler([volume()], DataConfig(), size=size, seed=0, length=9, augment=record)
        plain = sampler([volume()], size=size, min_visible=DataConfig().min_visible)
        assert all(same(patches[k], plain[k]) for k in range(4))
        assert all((n - s) % 2 == 0 and n >= s for n, s in zip(calls[-1][0], size, strict=True))
    assert len({seed for _, seed in calls}) == 4  # one for each patch
