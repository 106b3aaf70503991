"""Volumes in the form the network sees them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from napari_mrcnn3d.config import FloatTriple, ModelConfig
from napari_mrcnn3d.data.patches import TrainingVolume, objects_in
from napari_mrcnn3d.data.volumes import LabelledVolume
from napari_mrcnn3d.model.transform import intensity_range, normalize, resample, resample_factors

__all__ = ["model_voxel_size", "prepare", "sides_of"]

logger = logging.getLogger(__name__)


def model_voxel_size(volumes: Sequence[LabelledVolume]) -> FloatTriple | None:
    """Median voxel size in µm of the images that know theirs."""
    known = [v.voxel_size for v in volumes if v.voxel_size is not None]
    if not known:
        return None
    if len(known) < len(volumes):
        missing = len(volumes) - len(known)
        logger.warning("%d of %d images do not say their voxel size: taken as the others'.", missing, len(volumes))
    z, y, x = np.median(known, axis=0).tolist()
    return z, y, x


def prepare(volume: LabelledVolume, config: ModelConfig) -> TrainingVolume:
    """Volume normalised and at the model's voxel size, as prediction will do it."""
    factors = resample_factors(config, volume.voxel_size)
    image = normalize(volume.image, intensity_range(volume.image, config.intensity_percentiles))
    return TrainingVolume(resample(image, factors), resample(volume.labels, factors, nearest=True), volume.classes)


def sides_of(volumes: Sequence[LabelledVolume], config: ModelConfig) -> np.ndarray:
    """Sides float[N, 3] of all objects' boxes, z y x, in voxels of the model's size."""
    found = [np.zeros((0, 3))]
    for volume in volumes:
        boxes, _ = objects_in(volume.labels)
        found.append((boxes[:, 3:] - boxes[:, :3]) * resample_factors(config, volume.voxel_size))
    return np.concatenate(found)
