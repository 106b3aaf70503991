"""Overlap of 3D boxes, and what every operation asks of the boxes it is given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_BOX_DTYPES = (torch.float32, torch.float64)


def check_boxes(boxes: Tensor, name: str = "boxes") -> None:
    """Refuse anything that is not a float32 or float64 tensor of shape [N, 6].

    Half precision is refused because float16 has steps of a whole voxel above 1024, and integers because
    a caller who rounds boxes should say so.

    Raises
    ------
    TypeError
        If it is no tensor, or not float32 or float64.
    ValueError
        If its shape is not [N, 6].
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(boxes).__name__}")
    if boxes.ndim != 2 or boxes.shape[1] != 6:
        raise ValueError(f"{name} must have shape [N, 6], got {list(boxes.shape)}")
    if boxes.dtype not in _BOX_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {boxes.dtype}")


def check_rows(value: Tensor, name: str, boxes: Tensor, *, integer: bool) -> None:
    """Refuse anything that is not one integer (or one real number) per box, on the boxes' device.

    Raises
    ------
    TypeError
        If it is no tensor, or of the wrong kind of number.
    ValueError
        If its shape is not [N] or it lives on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != boxes.shape[:1]:
        raise ValueError(f"{name} has incompatible shape {list(value.shape)}, expected [{len(boxes)}]: one per box")
    if integer and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if not integer and not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    check_device(value, name, boxes.device)


def check_device(value: Tensor, name: str, device: torch.device) -> None:
    """Refuse a tensor that lives elsewhere than the other arguments (ValueError)."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the other arguments are on {device}")


def check_size(size: Sequence[Any], name: str, *, minimum: int = 1) -> tuple[int, int, int]:
    """Three whole numbers of at least ``minimum``, as a tuple of int (else ValueError)."""
    if len(size) != 3 or not all(isinstance(n, Integral) and int(n) >= minimum for n in size):
        raise ValueError(f"{name} must be three whole numbers of at least {minimum}, got {size!r}")
    z, y, x = (int(n) for n in size)
    return z, y, x


def box_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of ``a`` with every box of ``b``.

    Parameters
    ----------
    a : Tensor[N, 6]
    b : Tensor[M, 6]
        z1, y1, x1, z2, y2, x2, half-open, both in the same unit; float32 or float64.

    Returns
    -------
    Tensor[N, M]
        In [0, 1]; float64 if either input is, else float32. A box without volume (a side that is zero or
        negative) or with a coordinate that is not a number overlaps nothing: 0. No gradient flows.

    Raises
    ------
    TypeError, ValueError
        If ``a`` or ``b`` is not a float32 or float64 tensor of shape [N, 6], or they are on different devices.
    """
    check_boxes(a, "a")
    check_boxes(b, "b")
    check_device(b, "b", a.device)
    dtype = torch.promote_types(a.dtype, b.dtype)
    result: Tensor = torch.ops.mrcnn3d.box_iou(a.detach().to(dtype), b.detach().to(dtype))
    return result
