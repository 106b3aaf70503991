"""The floor that any trained network must clear: Otsu's threshold and a watershed of the distance to the background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.segmentation import watershed

from napari_mrcnn3d.structures import VoxelSize


@dataclass(frozen=True)
class FloorSettings:
    """Lengths in µm, volume in µm³."""

    smooth: float
    seed_smooth: float
    seed_radius: float
    min_volume: float


def otsu_watershed(image: np.ndarray, voxel_size: VoxelSize, settings: FloorSettings) -> np.ndarray:
    """Segment bright roundish objects the classical way, isotropic in µm whatever the voxels.

    Parameters
    ----------
    image : array, shape (z, y, x)
    voxel_size : VoxelSize
    settings : FloorSettings

    Returns
    -------
    int32 array, shape (z, y, x)
        Labels without gaps.
    """
    smooth = gaussian(image, [settings.smooth / v for v in voxel_size], preserve_range=True)
    if smooth.min() == smooth.max():
        return np.zeros(image.shape, np.int32)
    mask = smooth > threshold_otsu(smooth)
    distance = ndimage.distance_transform_edt(mask, sampling=voxel_size)
    hills = ndimage.gaussian_filter(distance, [settings.seed_smooth / v for v in voxel_size])
    footprint = np.ones([2 * round(settings.seed_radius / v) + 1 for v in voxel_size], bool)
    parts, _ = ndimage.label(mask)
    seeds = np.zeros(image.shape, np.int32)
    peaks = peak_local_max(hills, footprint=footprint, labels=parts, exclude_border=False)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return drop_small(watershed(-hills, seeds, mask=mask), settings.min_volume / voxel_size.volume)


def drop_small(labels: np.ndarray, voxels: float) -> np.ndarray:
    """Remove objects of fewer voxels and close the gaps in the numbering."""
    keep = np.bincount(labels.ravel()) >= voxels
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
