"""What one would otherwise use for the 3D operations: the usual ways to write them in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ranked(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Order by score, and the boxes in it as columns [7, N]: corners and volume."""
    order = scores.argsort(descending=True, stable=True)
    columns = boxes[order].T
    z, y, x = columns[3:] - columns[:3]
    return order, torch.cat([columns, (z * y * x)[None]])


def covers(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """Whether boxes [7, N] overlap boxes [7, M] by more than the threshold; [N, M]."""
    sides = torch.minimum(a[3:6, :, None], b[3:6, None]).sub_(torch.maximum(a[:3, :, None], b[:3, None])).clamp_(min=0)
    shared = sides[0].mul_(sides[1]).mul_(sides[2])
    return shared > (a[6, :, None] + b[6]).sub_(shared).mul_(threshold)


def nms_loop(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """Take the best box that is left, and drop those that it covers."""
    order, columns = ranked(boxes, scores)
    corners, volumes, left = boxes[order], columns[6], torch.arange(len(order))
    kept: list[Tensor] = []
    while len(left) and len(kept) < limit:
        best, left = left[0], left[1:]
        kept.append(best)
        others = corners[left]
        sides = torch.minimum(corners[best, 3:], others[:, 3:]) - torch.maximum(corners[best, :3], others[:, :3])
        z, y, x = sides.clamp(min=0).unbind(1)
        shared = z * y * x
        left = left[shared <= (volumes[best] + volumes[left] - shared) * threshold]
    return order[torch.stack(kept)]


def nms_careful_loop(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """The same in place on columns, and the boxes that are left are copied only after a hit."""
    left, columns = ranked(boxes, scores)
    kept: list[Tensor] = []
    while len(left) and len(kept) < limit:
        kept.append(left[:1])
        hit = covers(columns[:, :1], columns[:, 1:], threshold)[0]
        left, columns = left[1:], columns[:, 1:]
        if hit.any():
            rows = (~hit).nonzero()[:, 0]
            left, columns = left[rows], columns.index_select(1, rows)
    return torch.cat(kept)


def nms_bitmask(boxes: Tensor, scores: Tensor, threshold: float, limit: int, block: int = 256) -> Tensor:
    """Blocks of boxes, settled among themselves, against all later ones in parts that fit the processor's cache."""
    order, columns = ranked(boxes, scores)
    alive = torch.ones(len(order), dtype=torch.bool)
    for start in range(0, len(order), block):
        if alive[:start].sum() >= limit:
            break
        rows = start + alive[start : start + block].nonzero()[:, 0]
        hits = covers(columns[:, rows], columns[:, rows], threshold).triu_(1)
        keep, before = torch.ones_like(rows, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):
            keep, before = ~(hits & keep[:, None]).any(0), keep
        alive[rows] = keep
        for part in range(start + block, len(order), 8 * block):
            later = slice(part, part + 8 * block)
            alive[later] &= ~covers(columns[:, rows[keep]], columns[:, later], threshold).any(0)
    return order[alive.nonzero()[:limit, 0]]


def by_roi(features: Tensor, rois: Tensor, bins: int, samples: int) -> Tensor:
    """A call for each RoI."""
    return torch.cat([grid_sample(features, roi[None], bins, samples, 1) for roi in rois])


def at_once(features: Tensor, rois: Tensor, bins: int, samples: int) -> Tensor:
    """Threads share a batch: each RoI is an entry; if each entry needs a gradient like the features, each thread."""
    entries = math.gcd(len(rois), torch.get_num_threads()) if features.requires_grad else len(rois)
    return grid_sample(features, rois, bins, samples, entries)


def grid_sample(features: Tensor, rois: Tensor, bins: int, samples: int, entries: int) -> Tensor:
    """RoIAlign inside the features, which are repeated (not copied) for the entries of a batch."""
    side = features.shape[2]
    at = (torch.arange(bins * samples) + 0.5) / (bins * samples)
    at = (rois[:, :3, None] + (rois[:, 3:] - rois[:, :3])[..., None] * at) * 2 / side - 1
    z, y, x = at[:, 0, :, None, None], at[:, 1, None, :, None], at[:, 2, None, None, :]
    points = torch.stack(torch.broadcast_tensors(x, y, z), -1).unflatten(0, (entries, -1)).flatten(1, 2)
    maps = features.expand(entries, -1, -1, -1, -1)
    out = F.grid_sample(maps, points, padding_mode="border", align_corners=False)
    out = out.unflatten(2, (-1, bins * samples)).transpose(1, 2).flatten(0, 1)
    return F.avg_pool3d(out, samples) if samples > 1 else out


def paste_loop(masks: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize each mask to its rounded box, the best last."""
    volume, corners, values = torch.zeros(shape, dtype=torch.int32), boxes.round().long().tolist(), labels.tolist()
    for k in scores.argsort(stable=True).tolist():
        low, high = corners[k][:3], corners[k][3:]
        size = [b - a for a, b in zip(low, high, strict=True)]
        mask = F.interpolate(masks[k, None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
        z, y, x = map(slice, low, high)
        volume[z, y, x].masked_fill_(mask >= 0.5, values[k])
    return volume


def broadcast_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU with the sides of all pairs in memory."""
    sides = (torch.minimum(a[:, None, 3:], b[:, 3:]) - torch.maximum(a[:, None, :3], b[:, :3])).clamp(min=0)
    shared, volumes_a, volumes_b = sides.prod(2), (a[:, 3:] - a[:, :3]).prod(1), (b[:, 3:] - b[:, :3]).prod(1)
    return shared / (volumes_a[:, None] + volumes_b - shared)
