"""Boxes as offsets from other boxes, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["clip_boxes", "decode_boxes", "encode_boxes"]

MAX_LOG_RATIO = math.log(1000 / 16)  # torchvision's bound: exp() of anything larger is no box but an overflow


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Regression targets that move each anchor onto its box.

    Parameters
    ----------
    boxes, anchors : Tensor[N, 6]
        Paired row by row, of positive extent.
    weights : tuple of 2 float
        Factors of the centre and of the size targets.

    Returns
    -------
    Tensor[N, 6]
        dz, dy, dx in anchor sizes, then log ratios of depth, height, width, weighted.

    Notes
    -----
    Ren et al. 2015 (arXiv:1506.01497), eq. 2, with a third axis.
    """
    size, anchor_size = boxes[:, 3:] - boxes[:, :3], anchors[:, 3:] - anchors[:, :3]
    shift = (boxes[:, :3] + boxes[:, 3:] - anchors[:, :3] - anchors[:, 3:]) / (2 * anchor_size)
    return torch.cat([weights[0] * shift, weights[1] * torch.log(size / anchor_size)], 1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Inverse of :func:`encode_boxes`, in float32 whatever the precision around it.

    Parameters
    ----------
    deltas : Tensor[N, ..., 6]
    anchors : Tensor[N, 6]
    weights : tuple of 2 float

    Returns
    -------
    Tensor[N, ..., 6]
    """
    deltas, anchors = deltas.float(), anchors.float()
    anchors = anchors.reshape(len(anchors), *([1] * (deltas.ndim - 2)), 6)
    anchor_size = anchors[..., 3:] - anchors[..., :3]
    centre = (anchors[..., :3] + anchors[..., 3:]) / 2 + deltas[..., :3] / weights[0] * anchor_size
    half = anchor_size * torch.exp((deltas[..., 3:] / weights[1]).clamp(max=MAX_LOG_RATIO)) / 2
    return torch.cat([centre - half, centre + half], -1)


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes ``[..., 6]`` cut to a volume of this extent."""
    limit = torch.tensor([*shape, *shape], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limit)
