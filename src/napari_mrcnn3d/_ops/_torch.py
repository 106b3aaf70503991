"""The kernels in plain PyTorch: the reference for compiled ones, and what runs where there are none.

They trust their input: the public functions beside this module check it. ``_cpu`` and ``_cuda`` have the same kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_PAIRS_AT_ONCE = 1 << 17
"""Box pairs compared in one go, so that the temporaries stay in the processor's cache."""

_NMS_BLOCK = 256
"""Candidates that are compared with the kept boxes, and then with each other, at a time."""

_ROIS_AT_ONCE = 256
"""RoIs whose interpolation weights are in memory together."""

_VOXELS_AT_ONCE = 1 << 20
"""Voxels of a mask that are interpolated in one go."""


def describe(device: torch.device) -> str:
    """What computes, in words."""
    return "PyTorch"


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off for what runs inside, where the device has it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# ---------------------------------------------------------------------------------------------- boxes


def _volumes(columns: Tensor) -> Tensor:
    """Volumes [N] of boxes given as columns [6, N]; 0 where a side is negative."""
    sides = (columns[3:] - columns[:3]).clamp_(min=0)
    return sides[0] * sides[1] * sides[2]


def _overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union volumes [N, M] of boxes given as columns [6, N] and [6, M].

    The order of the roundings is part of the contract, so that compiled kernels can agree bit for bit:
    (z * y) * x for volumes, (volume of a + volume of b) - intersection for the union.
    """
    sides = [
        torch.minimum(a[k + 3, :, None], b[k + 3]).sub_(torch.maximum(a[k, :, None], b[k])).clamp_(min=0)
        for k in range(3)
    ]
    intersection = sides[0].mul_(sides[1]).mul_(sides[2])
    union = (_volumes(a)[:, None] + _volumes(b)).sub_(intersection)
    return intersection, union


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [N, M]; 0 for boxes without volume or with a coordinate that is not a number."""
    out = a.new_empty((len(a), len(b)))
    columns_a, columns_b = a.T.contiguous(), b.T.contiguous()
    step = max(1, _PAIRS_AT_ONCE // max(1, len(b)))
    for start in range(0, len(a), step):
        intersection, union = _overlaps(columns_a[:, start : start + step], columns_b)
        iou = intersection.div_(union)
        out[start : start + step] = torch.where(iou > 0, iou, 0)
    return out


# ---------------------------------------------------------------------------------------------- nms


class _Ranked(NamedTuple):
    """Boxes as columns [6, N] and their groups [N], best first."""

    columns: Tensor
    groups: Tensor | None

    def at(self, rows: Tensor) -> _Ranked:
        return _Ranked(self.columns[:, rows], None if self.groups is None else self.groups[rows])


def _hits(a: _Ranked, b: _Ranked, threshold: float) -> Tensor:
    """Whether each pair [N, M] is of one group and overlaps by more than the threshold."""
    intersection, union = _overlaps(a.columns, b.columns)
    hits = intersection > union.mul_(threshold)
    if a.groups is not None and b.groups is not None:
        hits &= a.groups[:, None] == b.groups
    return hits


def _greedy(hits: Tensor) -> list[int]:
    """Rows of hits [n, n] that survive when each surviving row suppresses the later ones that it hits."""
    packed = np.packbits(hits.cpu().numpy(), axis=1, bitorder="little")
    suppressed, kept = 0, []
    for row, bits in enumerate(packed):
        if not suppressed >> row & 1:
            kept.append(row)
            suppressed |= int.from_bytes(bits.tobytes(), "little")
    return kept


def nms_sorted(boxes: Tensor, threshold: float, groups: Tensor | None, max_keep: int | None) -> Tensor:
    """Positions kept by greedy suppression of float32 boxes [N, 6] that come best first.

    Block by block: candidates that a kept box hits are dropped with a few large comparisons, those left are
    compared with each other, and only that bit mask is walked one by one.
    """
    ranked = _Ranked(boxes.T.contiguous(), groups)
    limit = len(boxes) if max_keep is None else max_keep
    step = _PAIRS_AT_ONCE // _NMS_BLOCK
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for start in range(0, len(boxes), _NMS_BLOCK):
        if len(kept) >= limit:
            break
        alive = torch.arange(start, min(start + _NMS_BLOCK, len(boxes)), device=boxes.device)
        for first in range(0, len(kept), step):
            winners = ranked.at(kept[first : first + step])
            alive = alive[~_hits(ranked.at(alive), winners, threshold).any(1)]
        block = ranked.at(alive)
        kept = torch.cat([kept, alive[_greedy(_hits(block, block, threshold))]])
    return kept[:limit]


# ---------------------------------------------------------------------------------------------- roi align


class _Axis(NamedTuple):
    """One axis of every RoI: the cells' weights [K, P, L], and the range of cells that have any."""

    weights: Tensor
    first: list[int]
    stop: list[int]


class _RoI(NamedTuple):
    """A RoI that sees something: its row, its batch entry, the cells it touches, their weights [P, cells]."""

    row: int
    entry: int
    cells: tuple[slice, slice, slice]
    weights: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class RoIGrid:
    """How RoIs lie over a feature map.

    Attributes
    ----------
    size : tuple of int
        Bins along z, y, x.
    scale : tuple of float
        Feature cells per unit of the boxes along z, y, x.
    samples : int
        Per bin and axis.
    """

    size: tuple[int, int, int]
    scale: tuple[float, float, float]
    samples: int


def _roi_axis(low: Tensor, high: Tensor, bins: int, samples: int, length: int) -> _Axis:
    """Weights of the cells of one axis for RoIs [K] from ``low`` to ``high`` in cells.

    A sample outside [-1, length], or not a number, has no weight; one in the outer half cell takes the border's.
    """
    start = low - 0.5
    width = (high - 0.5 - start) / bins
    sample = torch.arange(bins * samples, device=low.device, dtype=low.dtype)
    steps = sample // samples + (sample % samples + 0.5) / samples
    position = start[:, None] + steps * width[:, None]
    inside = (position >= -1) & (position <= length)
    position = torch.where(inside, position.clamp(0, length - 1), 0)
    cells = torch.arange(length, device=low.device)
    weights = (1 - (position[..., None] - cells).abs()).clamp_(min=0).mul_(inside[..., None])
    first = torch.where(inside, position.floor(), length).amin(1)
    stop = torch.where(inside, position.ceil(), -1).amax(1) + 1
    return _Axis(weights.view(-1, bins, samples, length).mean(2), first.long().tolist(), stop.long().tolist())


def _roi_axes(boxes: Tensor, grid: RoIGrid, extent: tuple[int, ...]) -> list[_Axis]:
    """Weights along z, y and x."""
    cells = boxes.T * boxes.new_tensor(grid.scale * 2)[:, None]
    return [_roi_axis(cells[k], cells[k + 3], grid.size[k], grid.samples, extent[k]) for k in range(3)]


def _rois(boxes: Tensor, batch_index: Tensor, grid: RoIGrid, shape: tuple[int, ...]) -> Iterator[_RoI]:
    """Those of the RoIs [K, 6] that touch features of shape [N, C, D, H, W]."""
    for row, entry in enumerate(batch_index.tolist()):
        k = row % _ROIS_AT_ONCE
        if k == 0:
            axes = _roi_axes(boxes[row : row + _ROIS_AT_ONCE], grid, shape[2:])
        z, y, x = (slice(axis.first[k], axis.stop[k]) for axis in axes)
        if 0 <= entry < shape[0] and z.start < z.stop and y.start < y.stop and x.start < x.stop:
            wz, wy, wx = (axis.weights[k, :, cells] for axis, cells in zip(axes, (z, y, x), strict=True))
            yield _RoI(row, entry, (z, y, x), (wz, wy, wx))


def roi_align(features: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid) -> Tensor:
    """RoIAlign [K, C, PD, PH, PW] in channels_last_3d, computed in the boxes' dtype.

    Trilinear weights are products of one weight per axis, and so is the mean over the samples of a bin: three
    small matrix products per RoI, whatever the number of samples.
    """
    (depth, height, width), channels = grid.size, features.shape[1]
    maps = features.permute(0, 2, 3, 4, 1).contiguous()
    out = boxes.new_zeros((len(boxes), depth, height, width, channels))
    if out.numel():
        with full_precision(features.device):
            for roi in _rois(boxes, batch_index, grid, tuple(features.shape)):
                crop = maps[roi.entry][roi.cells].to(boxes.dtype)
                _, rows, columns, _ = crop.shape
                wz, wy, wx = roi.weights
                crop = (wz @ crop.flatten(1)).view(depth, rows, -1)
                crop = (wy @ crop).view(depth * height, columns, channels)
                torch.matmul(wx, crop, out=out[roi.row].view(depth * height, width, channels))
    return out.to(features.dtype).permute(0, 4, 1, 2, 3)


def roi_align_transposed(
    values: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid, shape: tuple[int, ...]
) -> Tensor:
    """Values [K, C, PD, PH, PW] spread over features of this shape: the transpose of :func:`roi_align`.

    RoIs are added in their order, one at a time: the same input gives the same bits.
    """
    batch, channels, *extent = shape
    dtype = values.dtype
    values = values.to(boxes.dtype).permute(0, 2, 3, 4, 1).contiguous()
    out = values.new_zeros((batch, *extent, channels))
    if out.numel() and values.numel():
        with full_precision(values.device):
            for roi in _rois(boxes, batch_index, grid, shape):
                wz, wy, wx = roi.weights
                part = (wx.T @ values[roi.row].flatten(0, 1)).view(grid.size[0], grid.size[1], -1)
                part = (wy.T @ part).view(grid.size[0], -1)
                target = out[roi.entry][roi.cells]
                target += (wz.T @ part).view(target.shape)
    return out.to(dtype).permute(0, 4, 1, 2, 3)


# ---------------------------------------------------------------------------------------------- paste masks


class _Span(NamedTuple):
    """Voxels of one axis whose centre a box holds, and the weights [voxels, cells] of its mask's cells for them."""

    voxels: slice
    weights: np.ndarray


def _span(low: float, high: float, cells: int, length: int) -> _Span | None:
    """Voxels of an axis that the side [low, high) of a box covers; None if it covers none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    first, stop = max(0, math.ceil(low - 0.5)), min(length, math.ceil(high - 0.5))
    if stop <= first:
        return None
    centres = np.arange(first, stop) + 0.5
    position = np.clip((centres - low) / (high - low) * cells - 0.5, 0, cells - 1)
    return _Span(slice(first, stop), np.clip(1 - np.abs(position[:, None] - np.arange(cells)), 0, None))


def _paint_mask(volume: Tensor, mask: Tensor, corners: list[float], label: int, threshold: float) -> None:
    """Write a label where a mask [mz, my, mx], stretched over its box, reaches the threshold.

    Slab by slab of bounded size, however large the box.
    """
    spans = []
    for axis in range(3):
        span = _span(corners[axis], corners[axis + 3], mask.shape[axis], volume.shape[axis])
        if span is None:
            return
        spans.append(span)
    in_z, in_y, in_x = (torch.from_numpy(span.weights).to(mask.dtype).to(mask.device) for span in spans)
    view = volume[tuple(span.voxels for span in spans)]
    planes = (in_y @ (mask @ in_x.T)).flatten(1)
    step = max(1, _VOXELS_AT_ONCE // planes.shape[1])
    for first in range(0, len(view), step):
        slab = view[first : first + step]
        slab.masked_fill_((in_z[first : first + step] @ planes).view(slab.shape) >= threshold, label)


def paste_masks(masks: Tensor, boxes: Tensor, labels: Tensor, shape: tuple[int, int, int], threshold: float) -> Tensor:
    """Int32 label volume of masks that come best first: where several claim a voxel the first has it."""
    volume = torch.zeros(shape, dtype=torch.int32, device=masks.device)
    corners, values = boxes.tolist(), labels.tolist()
    with full_precision(masks.device):
        for k in reversed(range(len(masks))):  # the best comes last and paints over the others
            _paint_mask(volume, masks[k].nan_to_num(), corners[k], values[k], threshold)
    return volume
