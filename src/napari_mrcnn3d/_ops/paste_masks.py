"""From box-relative masks to one label volume."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_mrcnn3d._ops.boxes import check_boxes, check_device, check_rows, check_size


def paste_masks_3d(
    masks: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    shape: tuple[int, int, int],
    threshold: float = 0.5,
) -> Tensor:
    """Paint every mask into its box; where several claim a voxel the best score wins.

    Parameters
    ----------
    masks : Tensor[K, mz, my, mx]
        Foreground probability in [0, 1] on a regular grid over the box, floating point.
    boxes : Tensor[K, 6]
        z1, y1, x1, z2, y2, x2 in voxels of the volume, not rounded; float32 or float64. They may leave the volume.
    labels : integer Tensor[K]
        What each mask paints; must fit int32.
    scores : Tensor[K]
        Equal scores: the lower index wins. One that is not a number ranks last.
    shape : tuple of int
        Extent of the volume (z, y, x).
    threshold : float
        In [0, 1]; a voxel is painted where the interpolated probability reaches it.

    Returns
    -------
    int32 Tensor[z, y, x]
        0 where nothing was painted.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong shape, type, device or range; the message names it.

    Notes
    -----
    Voxel i covers [i, i + 1). It is painted if its centre, i + 0.5, lies in the half-open box along each axis and
    the mask, interpolated trilinearly there (beyond its outer cell centres it keeps their value), reaches the
    threshold. Boxes without volume and boxes with a coordinate that is not finite paint nothing; a mask value
    that is not a number counts as 0.
    """
    check_boxes(boxes)
    _check_masks(masks, boxes)
    check_rows(labels, "labels", boxes, integer=True)
    check_rows(scores, "scores", boxes, integer=False)
    size = check_size(shape, "shape", minimum=0)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    volume: Tensor = torch.ops.mrcnn3d.paste_masks(
        masks.detach(), boxes.detach(), labels, scores.detach(), size, float(threshold)
    )
    return volume


def _check_masks(masks: Tensor, boxes: Tensor) -> None:
    """Refuse what is not a floating tensor [K, mz, my, mx] with one mask per box."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor, got {type(masks).__name__}")
    if masks.ndim != 4 or len(masks) != len(boxes) or 0 in masks.shape[1:]:
        raise ValueError(f"masks must have shape [{len(boxes)}, mz, my, mx] (one per box), got {list(masks.shape)}")
    if not masks.dtype.is_floating_point:
        raise TypeError(f"masks must be floating point in [0, 1], got {masks.dtype}")
    check_device(masks, "masks", boxes.device)
