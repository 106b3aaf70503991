"""From a microscope's volume to the network's input, and boxes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from napari_mrcnn3d.config import FloatTriple, ModelConfig, Triple
from napari_mrcnn3d.structures import VoxelSize

__all__ = ["intensity_range", "normalize", "padded_shape", "resample", "resample_factors"]

SAMPLE = 4_000_000  # voxels that percentiles are estimated from: their error is far below the noise of any image


def intensity_range(image: Any, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Grey values of an image that become 0 and 1.

    Parameters
    ----------
    image : array-like, shape (z, y, x)
        Sampled regularly if it is large.
    percentiles : tuple of 2 float

    Returns
    -------
    tuple of 2 float
    """
    step = max(1, round((np.prod(image.shape, dtype=float) / SAMPLE) ** (1 / 3)))
    sample = np.asarray(image[::step, ::step, ::step])
    low, high = np.percentile(sample.astype(_exact(sample.dtype), copy=False), percentiles)
    return float(low), float(high)


def normalize(image: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Image as float32 with these grey values at 0 and 1; all zero if they coincide.

    Brighter voxels are cut at 4: a few hot pixels must not drive the normalisation layers.
    """
    low, high = limits
    if not high > low:
        return np.zeros(image.shape, np.float32)
    scaled: np.ndarray = image.astype(_exact(image.dtype))
    scaled -= low
    scaled /= high - low
    return np.clip(scaled, -1, 4, out=scaled).astype(np.float32, copy=False)


def _exact(dtype: Any) -> Any:
    """Type to compute in: float32 would round large whole numbers and overflow on large floats."""
    return np.float32 if np.can_cast(dtype, np.float32) else np.float64


def resample_factors(
    config: ModelConfig, voxel_size: VoxelSize | None, object_size: float | None = None
) -> FloatTriple:
    """Network voxels per image voxel and axis; 1 along all axes if none differs more than the model tolerates.

    Parameters
    ----------
    config : ModelConfig
        ``voxel_size`` and ``object_size`` of the training images.
    voxel_size : VoxelSize or None
        Of the image in µm; taken as the model's if unknown.
    object_size : float, optional
        Diameter in µm of what is looked for, if it is not that of the training objects.
    """
    zoom = config.object_size / object_size if config.object_size and object_size else 1.0
    factors = [zoom, zoom, zoom]
    if config.voxel_size is not None and voxel_size is not None:
        factors = [zoom * have / want for have, want in zip(voxel_size, config.voxel_size, strict=True)]
    tolerance = config.resample_tolerance
    if all(1 / tolerance <= f <= tolerance for f in factors):
        return 1.0, 1.0, 1.0
    return factors[0], factors[1], factors[2]


def resample(image: np.ndarray, factors: FloatTriple, *, nearest: bool = False) -> np.ndarray:
    """Volume with another number of voxels over the same extent.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        Float32 image, or integer labels with ``nearest``.
    factors : tuple of 3 float
        New voxels per old voxel.
    nearest : bool
        Take the nearest voxel, for labels.

    Notes
    -----
    scikit-image's ``resize``: the image is smoothed first where voxels get larger, and voxel centres stay where they
    are, half a voxel from the border.
    """
    if tuple(factors) == (1.0, 1.0, 1.0):
        return image
    from skimage.transform import resize  # a second to import, needed by few

    shape = [max(1, round(n * f)) for n, f in zip(image.shape, factors, strict=True)]
    if nearest:
        settings, dtype = {"order": 0, "anti_aliasing": False}, image.dtype
    else:
        settings, dtype = {"order": 1, "anti_aliasing": True}, np.dtype(np.float32)
    return np.asarray(resize(image, shape, mode="edge", preserve_range=True, **settings), dtype)  # type: ignore[no-untyped-call]


def padded_shape(shape: Sequence[int], config: ModelConfig) -> Triple:
    """Smallest extent not below ``shape`` that every stride of the network divides."""
    top = config.level_strides[-1]
    z, y, x = (-(-n // s) * s for n, s in zip(shape, top, strict=True))
    return z, y, x
