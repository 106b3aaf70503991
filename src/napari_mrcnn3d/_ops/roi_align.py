"""RoIAlign in 3D: box-shaped crops of a feature map on a regular grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from napari_mrcnn3d._ops.boxes import check_boxes, check_device, check_rows, check_size


def roi_align_3d(
    features: Tensor,
    boxes: Tensor,
    batch_index: Tensor,
    output_size: tuple[int, int, int],
    spatial_scale: tuple[float, float, float],
    sampling_ratio: int = 1,
) -> Tensor:
    """Features inside each box, resampled to one grid size.

    Parameters
    ----------
    features : Tensor[N, C, D, H, W]
        float32, float64, or half precision (which is computed in float32). Fastest in channels_last_3d.
    boxes : Tensor[K, 6]
        z1, y1, x1, z2, y2, x2 in voxels of the network's input, half-open; float32 or float64. They may leave
        the feature map.
    batch_index : integer Tensor[K]
        Which of the N feature maps each box looks at.
    output_size : tuple of int
        Bins per box along z, y, x.
    spatial_scale : tuple of float
        Feature cells per input voxel along z, y, x, e.g. (1, 1/4, 1/4).
    sampling_ratio : int
        Samples per bin along each axis; their mean is the bin's value.

    Returns
    -------
    Tensor[K, C, PD, PH, PW]
        In the type of ``features``, channels_last_3d. The gradient goes to ``features`` only.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong shape, type, device or range; the message names it.

    Notes
    -----
    He et al. 2017 (arXiv:1703.06870) with the half-pixel convention of torchvision's ``aligned=True``, along
    three axes: the centre of cell i is at i + 0.5. A sample more than half a cell outside the map, or at no
    number, contributes 0; one within that half cell takes the border's value. A box of zero or negative size
    samples one point, or mirrored; a box whose ``batch_index`` is not in [0, N) gives zeros. Positions, weights and
    sums are float32 (float64 for float64 features), with or without autocast. What features that are not finite
    do to the other bins of a box is not defined.
    """
    _check_features(features)
    check_boxes(boxes)
    check_device(boxes, "boxes", features.device)
    check_rows(batch_index, "batch_index", boxes, integer=True)
    size = check_size(output_size, "output_size")
    if len(spatial_scale) != 3 or not all(math.isfinite(s) and s > 0 for s in spatial_scale):
        raise ValueError(f"spatial_scale must be three positive numbers, got {spatial_scale!r}")
    if int(sampling_ratio) != sampling_ratio or sampling_ratio < 1:
        raise ValueError(f"sampling_ratio must be a whole number of at least 1, got {sampling_ratio}")
    result: Tensor = torch.ops.mrcnn3d.roi_align(
        features, boxes.detach(), batch_index, size, [float(s) for s in spatial_scale], int(sampling_ratio)
    )
    return result


def _check_features(features: Tensor) -> None:
    """Refuse what is not a floating tensor [N, C, D, H, W] with cells along each spatial axis."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.ndim != 5 or 0 in features.shape[2:]:
        raise ValueError(f"features must have shape [N, C, D, H, W] with D, H, W > 0, got {list(features.shape)}")
    if not features.dtype.is_floating_point:
        raise TypeError(f"features must be floating point, got {features.dtype}")
