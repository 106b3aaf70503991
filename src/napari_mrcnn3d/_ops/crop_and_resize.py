"""Crop and resize in 3D with the conventions of the predecessor's TensorFlow op."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from napari_mrcnn3d._ops import _torch
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
    _check_box_index(box_index, boxes, len(image))
    if method not in ("trilinear", "nearest"):
        raise ValueError(f'method must be "trilinear" or "nearest", got {method!r}')
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    samples = [_samples(boxes, axis, size[axis], image.shape[axis + 1]) for axis in range(3)]
    i, j, k = (inside for _, inside in samples)
    inside = i[:, :, None, None] & j[:, None, :, None] & k[:, None, None, :]
    values = _values(image, box_index, [position.to(image.dtype) for position, _ in samples], method)
    return torch.where(inside[..., None], values, extrapolation_value)


def _values(image: Tensor, box_index: Tensor, positions: list[Tensor], method: str) -> Tensor:
    """Values at the grid of three axes' positions, all of them inside the volume."""
    if method == "trilinear":
        return _torch.interpolate(image, box_index, positions)
    values = _torch.take(image, box_index, [_nearest(position.detach()) for position in positions])
    if any(position.requires_grad for position in positions):
        surrogate = _torch.interpolate(image.detach(), box_index, positions)
        values = _GradientOf.apply(values, surrogate)  # type: ignore[no-untyped-call]
    return values


class _GradientOf(torch.autograd.Function):
    """The first argument's value, with the gradient of both."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def _samples(boxes: Tensor, axis: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Sample positions [N, count] along an axis in voxels, and whether they are inside; 0 where they are not.

    The corners are weighted rather than stepped between, so that the last sample falls exactly on the second one.
    """
    if count == 1:
        share = boxes.new_full((1,), 0.5)
    else:
        share = torch.arange(count, device=boxes.device, dtype=boxes.dtype) / (count - 1)
    position = (boxes[:, axis, None] * (1 - share) + boxes[:, axis + 3, None] * share) * (length - 1)
    inside = (position >= 0) & (position <= length - 1)
    return torch.where(inside, position, 0), inside


def _nearest(position: Tensor) -> Tensor:
    """Nearest voxel, in a tie the farther one.

    Not ``floor(position + 0.5)``: for the float just below one half that sum rounds up to 1.
    """
    below = position.floor()
    return (below + (position - below >= 0.5)).long()


def _check_image(image: Tensor) -> None:
    """Refuse what is not a real tensor [B, H, W, D, C] with voxels along each spatial axis."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if image.ndim != 5 or 0 in image.shape[1:4]:
        raise ValueError(f"input image must be 5-D [B, H, W, D, C] with H, W, D > 0, got {list(image.shape)}")
    if image.dtype.is_complex:
        raise TypeError(f"image must be real, got {image.dtype}")


def _check_box_index(box_index: Tensor, boxes: Tensor, batch_size: int) -> None:
    """Refuse what is not one integer in [0, batch_size) per box."""
    check_rows(box_index, "box_index", boxes, integer=True)
    if len(box_index) and not 0 <= int(box_index.min()) <= int(box_index.max()) < batch_size:
        raise ValueError(f"box_index has values outside [0, batch_size), batch_size is {batch_size}")
