"""Variation of patches: repeatable, image and labels alike, nothing invented."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from napari_mrcnn3d.data.augment import augment
from tests._tiny import ellipsoids

SIZE = (16, 24, 24)
LABELS = ellipsoids((20, 32, 32), [((10, 16, 16), (5, 9, 6)), ((3, 4, 4), (2, 3, 3)), ((15, 27, 6), (3, 4, 4))])
IMAGE = ndimage.gaussian_filter((LABELS > 0).astype(np.float32), 0.6)


@pytest.fixture(scope="module")
def varied() -> list[tuple[np.ndarray, np.ndarray]]:
    return [augment(IMAGE, LABELS, SIZE, seed) for seed in range(16)]


def test_shapes_and_types(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, labels in varied:
        assert image.shape == labels.shape == SIZE
        assert [image.dtype, labels.dtype] == [np.float32, np.int32]
        assert np.isfinite(image).all()
        assert set(np.unique(labels)) <= {0, 1, 2, 3}
        assert image.flags.c_contiguous
        assert labels.flags.c_contiguous


def test_a_variation_repeats_with_its_seed_whatever_came_before(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for seed in (5, 0, 11):
        image, labels = augment(IMAGE, LABELS, SIZE, seed)
        np.testing.assert_array_equal(image, varied[seed][0])
        np.testing.assert_array_equal(labels, varied[seed][1])
    assert len({image.tobytes() for image, _ in varied}) == 16
    assert len({labels.tobytes() for _, labels in varied}) > 8


def test_the_inputs_stay_as_they_are() -> None:
    image, labels = IMAGE.copy(), LABELS.copy()
    augment(image, labels, SIZE, 3)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(labels, LABELS)


def test_image_and_labels_move_together(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, labels in varied:
        bright = image > (image.min() + image.max()) / 2
        overlap = (bright & (labels > 0)).sum() / (bright | (labels > 0)).sum()
        assert overlap > 0.75


def test_the_middle_of_the_cut_is_the_middle_of_the_patch(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, labels in varied:
        centre = np.array(ndimage.center_of_mass(labels == 1))
        np.testing.assert_allclose(centre, (np.array(SIZE) - 1) / 2, atol=0.6)  # the first object is in the middle
        weight = image * (labels == 1)
        np.testing.assert_allclose(ndimage.center_of_mass(weight), centre, atol=0.5)


def test_objects_keep_about_their_volume(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    original = (LABELS == 1).sum()
    for _, labels in varied:
        assert 0.85**3 * 0.9 < (labels == 1).sum() / original < 1.15**3 * 1.1


def test_turns_leave_z_alone(varied: list[tuple[np.ndarray, np.ndarray]]) -> None:
    depths = [np.ptp(np.flatnonzero((labels == 1).any((1, 2)))) for _, labels in varied]
    assert max(depths) - min(depths) <= 4  # 10 slices stretched by up to 15 %; a quarter turn would make it 18


def test_patches_longer_than_wide_are_not_turned_by_quarters() -> None:
    image, labels = augment(IMAGE, LABELS, (16, 20, 24), 1)
    assert image.shape == labels.shape == (16, 20, 24)
