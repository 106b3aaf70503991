"""Variation of training patches, by MONAI's transforms."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from napari_mrcnn3d.config import Triple

__all__ = ["augment"]

_BOTH = ("image", "labels")


def augment(image: np.ndarray, labels: np.ndarray, size: Triple, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A varied patch: flipped, turned about z, stretched; contrast, brightness, blur and noise changed.

    Parameters
    ----------
    image : float32[D, H, W]
        Normalised, larger than ``size`` so that turned corners stay filled.
    labels : int32[D, H, W]
    size : tuple of 3 int
        Extent of the result, cut from the middle.
    seed : int
        The same seed gives the same variation.

    Returns
    -------
    float32[size], int32[size]
    """
    transforms = _transforms(size)
    transforms.set_random_state(seed)
    varied = transforms({"image": image[None], "labels": labels[None].astype(np.float32)})
    return (
        np.ascontiguousarray(varied["image"][0].numpy(), np.float32),
        np.ascontiguousarray(varied["labels"][0].numpy().round(), np.int32),
    )


@lru_cache(maxsize=4)
def _transforms(size: Triple) -> Any:
    """The chain, made once per patch size. Turns are about z only: z is blurred and sampled unlike y and x."""
    from monai import transforms as mt  # seconds to import

    turn = np.pi / 4
    stretch = 0.15
    return mt.Compose(
        [
            mt.RandAffined(
                _BOTH,
                prob=0.7,
                spatial_size=size,
                rotate_range=(turn, 0.0, 0.0),
                scale_range=(stretch, stretch, stretch),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",  # a mirrored object would carry its label twice
            ),
            mt.CenterSpatialCropd(_BOTH, size),
            *(mt.RandFlipd(_BOTH, prob=0.5, spatial_axis=axis) for axis in range(3)),
            mt.RandRotate90d(_BOTH, prob=0.5, max_k=3, spatial_axes=(1, 2))
            if size[1] == size[2]
            else mt.Identityd(_BOTH),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            mt.RandScaleIntensityd("image", prob=0.5, factors=0.3),
            mt.RandShiftIntensityd("image", prob=0.5, offsets=0.1),
            mt.RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.3, 0.8), sigma_y=(0.3, 1.2), sigma_z=(0.3, 1.2)),
            mt.RandGaussianNoised("image", prob=0.3, std=0.06),
        ]
    )
