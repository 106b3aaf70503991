"""Training volumes in the form the network sees them."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from napari_mrcnn3d.data.volumes import LabelledVolume
from napari_mrcnn3d.structures import VoxelSize
from napari_mrcnn3d.training.preparation import model_voxel_size, prepare, sides_of
from tests._tiny import EIGHT, ellipsoids, picture, tiny_config

SHAPE = (32, 44, 44)


def labelled(voxel_size: tuple[float, ...] | None = (2, 1, 1), objects: int = 8) -> LabelledVolume:
    labels = ellipsoids(SHAPE, EIGHT[:objects])
    classes = np.r_[0, np.ones(objects, np.int64)]
    size = VoxelSize.of(voxel_size) if voxel_size else None
    return LabelledVolume(picture(labels), labels, classes, size, "a", "a")


def test_the_model_takes_the_middle_of_the_voxel_sizes(caplog: pytest.LogCaptureFixture) -> None:
    assert model_voxel_size([labelled((1, 1, 1)), labelled((2, 1, 1)), labelled((9, 3, 0.5))]) == (2, 1, 1)
    assert caplog.text == ""
    assert model_voxel_size([labelled(None)]) is None
    with caplog.at_level(logging.WARNING):
        assert model_voxel_size([labelled(None), labelled((2, 1, 1))]) == (2, 1, 1)
    assert "1 of 2 images do not say their voxel size" in caplog.text


def test_a_volume_of_the_models_size_is_only_normalised() -> None:
    volume = labelled()
    ready = prepare(volume, tiny_config(voxel_size=(2, 1, 1), intensity_percentiles=(0, 100)))
    np.testing.assert_array_equal(ready.labels, volume.labels)
    assert ready.objects == 8
    assert (ready.image.min(), ready.image.max()) == (0, 1)
    np.testing.assert_allclose(np.corrcoef(ready.image.ravel(), volume.image.ravel())[0, 1], 1, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 2, 2), (1, 0.5, 0.5), (1, 2, 2)])
def test_other_volumes_are_resampled_with_their_labels(size: tuple[float, float, float]) -> None:
    volume, config = labelled(size), tiny_config(voxel_size=(2, 1, 1))
    factors = np.divide(size, (2, 1, 1))
    ready = prepare(volume, config)
    assert ready.image.shape == ready.labels.shape == tuple(np.round(SHAPE * factors).astype(int))
    assert ready.objects == 8
    bright = ready.image[ready.labels > 0].mean() - ready.image[ready.labels == 0].mean()
    assert bright > 0.5
    found = ready.boxes[:, 3:] - ready.boxes[:, :3]
    assert (np.abs(found - sides_of([volume], config)) <= 1.5).all()


def test_sides_of_all_objects_of_all_volumes() -> None:
    found = sides_of(
        [labelled((4, 1, 1)), labelled((2, 1, 1), 3), labelled(objects=0)], tiny_config(voxel_size=(2, 1, 1))
    )
    assert found.shape == (11, 3)
    np.testing.assert_array_equal(found[0], [16, 14, 14])
    np.testing.assert_array_equal(found[8], [8, 14, 14])
    assert sides_of([], tiny_config()).shape == (0, 3)
