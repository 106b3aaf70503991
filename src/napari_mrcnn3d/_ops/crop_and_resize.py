"""Crop and resize in 3D with the conventions of the predecessor's TensorFlow op."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from napari_mrcnn3d._ops.boxes import check_boxes, check_device, check_rows, check_size


def crop_and_resize_3d(
    image: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    crop_size: tuple[int, int, int],
    method: Literal["trilinear", "nearest"] = "trilinear",
    extrapolation_value: float = 0.0,
) -> Tensor:
    """Crops of a volume, resampled to one size, corner to corner.

    Parameters
    ----------
    image : Tensor[B, H, W, D, C]
        Three spatial axes, whatever their names, then channels; any real type.
    boxes : Tensor[N, 6]
        The three first corners, then the three second ones, in the order of the image's axes; 0 is the centre
        of an axis' first voxel and 1 the centre of its last. A second corner below the first flips the crop; boxes
        may leave [0, 1]. float32 or float64.
    box_index : integer Tensor[N]
        Which of the B volumes each box looks at.
    crop_size : tuple of int
        Samples along the three axes, the outer ones on the corners; a single sample lies in the middle.
    method : {"trilinear", "nearest"}
        "nearest" rounds halves away from zero.
    extrapolation_value : float
        Value of the samples outside the volume: a hard cut, nothing is blended across the border.

    Returns
    -------
    Tensor[N, ch, cw, cd, C]
        float64 for a float64 image, else float32. Gradients (first order only) go to ``image`` and to ``boxes``;
        with "nearest" the boxes get the gradient of the trilinear value, as their own is zero almost everywhere.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong shape, type, device or range; the message names it.

    Notes
    -----
    Reproduces CropAndResize3D of github.com/gdavid57/3d-nms-car-custom-op (revision d1f5411) where that op is
    right. Its gradient to the boxes scales the last axis by mistake with the second axis' corner, its
    "nearest" mode bounds the last axis by the crop of the second, and it never checks ``box_index``.
    A corner that is not a number samples nothing: the extrapolation value.
    """
    _check_image(image)
    check_boxes(boxes)
    check_device(boxes, "boxes", image.device)
    size = check_size(crop_size, "crop_size")
    check_rows(box_index, "box_index", boxes, integer=True)
    if method not in ("trilinear", "nearest"):
        raise ValueError(f'method must be "trilinear" or "nearest", got {method!r}')
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    crops: Tensor = torch.ops.mrcnn3d.crop_and_resize(
        image, boxes, box_index, size, method == "nearest", float(extrapolation_value)
    )
    return crops


def _check_image(image: Tensor) -> None:
    """Refuse what is not a real tensor [B, H, W, D, C] with voxels along each spatial axis."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if image.ndim != 5 or 0 in image.shape[1:4]:
        raise ValueError(f"input image must be 5-D [B, H, W, D, C] with H, W, D > 0, got {list(image.shape)}")
    if image.dtype.is_complex:
        raise TypeError(f"image must be real, got {image.dtype}")
