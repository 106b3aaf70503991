"""Which anchors and proposals stand for which object, and which of them a loss looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from napari_mrcnn3d._ops import box_iou_3d

__all__ = ["BACKGROUND", "IGNORED", "match_atss", "match_iou", "sample_hard", "sample_random"]

BACKGROUND = -1
IGNORED = -2


def match_iou(boxes: Tensor, anchors: Tensor, *, fg_iou: float, bg_iou: float, keep_best: bool = False) -> Tensor:
    """Object of each anchor by IoU thresholds (Ren et al. 2015, section 3.1.2).

    Parameters
    ----------
    boxes : Tensor[M, 6]
        Objects.
    anchors : Tensor[N, 6]
    fg_iou, bg_iou : float
        Object from the first on, background below the second, ignored between.
    keep_best : bool
        Give every object its best anchors, however small their IoU.

    Returns
    -------
    int64[N]
        Row of ``boxes``, BACKGROUND or IGNORED.
    """
    matched = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    if len(boxes) == 0:
        return matched
    iou = box_iou_3d(boxes, anchors)
    best, index = iou.max(0)
    matched[best >= bg_iou] = IGNORED
    matched = torch.where(best >= fg_iou, index, matched)
    if keep_best:
        top = iou.max(1, keepdim=True).values
        rows, columns = torch.nonzero((iou == top) & (top > 0), as_tuple=True)
        matched[columns] = rows
    return matched


def match_atss(boxes: Tensor, levels: list[Tensor], candidates: Sequence[int]) -> Tensor:
    """Object of each anchor by adaptive training sample selection (Zhang et al. 2020, arXiv:1912.02424).

    Of every level the anchors whose centres lie nearest to an object's compete; those with an IoU of at least the
    competitors' mean plus one standard deviation, and a centre inside the object, are its positives. An anchor wanted
    by several objects goes to the one of highest IoU.

    Parameters
    ----------
    boxes : Tensor[M, 6]
        Objects.
    levels : list of Tensor[Ni, 6]
        Anchors of each level.
    candidates : sequence of int
        Competitors per object, for each level.

    Returns
    -------
    int64[sum(Ni)]
        Row of ``boxes`` or BACKGROUND.
    """
    anchors = torch.cat(levels)
    matched = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    if len(boxes) == 0:
        return matched
    index = _nearest(boxes, levels, candidates)
    near = anchors[index]
    iou = _paired_iou(boxes[:, None], near)
    spread = iou.std(1, correction=min(1, iou.shape[1] - 1), keepdim=True)  # 0 for a lone competitor
    enough = iou >= iou.mean(1, keepdim=True) + spread
    centre = (near[..., :3] + near[..., 3:]) / 2
    inside = ((centre > boxes[:, None, :3]) & (centre < boxes[:, None, 3:])).all(-1)
    # An object too small to hold any centre keeps its one best anchor instead of being lost.
    best = iou == iou.max(1, keepdim=True).values
    positive = (enough & inside) | (best & ~(enough & inside).any(1, keepdim=True))
    rows, columns = torch.nonzero(positive & (iou > 0), as_tuple=True)
    order = torch.argsort(iou[rows, columns], stable=True)  # the highest IoU is written last
    for row, target in zip(rows[order].tolist(), index[rows, columns][order].tolist(), strict=True):
        matched[target] = row
    return matched


def _nearest(boxes: Tensor, levels: list[Tensor], counts: Sequence[int]) -> Tensor:
    """Positions [M, K] in the joined levels of the anchors nearest to each object's centre."""
    centres = (boxes[:, :3] + boxes[:, 3:]) / 2
    found, start = [], 0
    for anchors, count in zip(levels, counts, strict=True):
        distance = torch.cdist(centres, (anchors[:, :3] + anchors[:, 3:]) / 2)
        found.append(start + distance.topk(min(count, len(anchors)), largest=False).indices)
        start += len(anchors)
    return torch.cat(found, 1)


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes [..., 6] that broadcast against each other."""
    low, high = torch.maximum(a[..., :3], b[..., :3]), torch.minimum(a[..., 3:], b[..., 3:])
    inter = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 3:] - a[..., :3]).prod(-1) + (b[..., 3:] - b[..., :3]).prod(-1) - inter
    return inter / union.clamp(min=1e-6)


def sample_random(matched: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Positions of at most ``count`` randomly drawn positives and backgrounds (positives up to their share)."""
    positive, negative = torch.nonzero(matched >= 0)[:, 0], torch.nonzero(matched == BACKGROUND)[:, 0]
    positive = _draw(positive, int(count * positive_fraction))
    return positive, _draw(negative, count - len(positive))


def sample_hard(
    matched: Tensor, scores: Tensor, count: int, *, positive_fraction: float, pool: int = 16
) -> tuple[Tensor, Tensor]:
    """Like :func:`sample_random`, half of the backgrounds drawn among the ``pool`` times as many that score highest.

    In a volume nearly all background is easy; drawn blindly it teaches nothing. Three backgrounds come with each
    positive, but an eighth of ``count`` at least: with more, few objects would be talked down.
    """
    positive, negative = torch.nonzero(matched >= 0)[:, 0], torch.nonzero(matched == BACKGROUND)[:, 0]
    positive = _draw(positive, int(count * positive_fraction))
    wanted = min(count - len(positive), max(3 * len(positive), count // 8))
    top = scores[negative].topk(min(pool * wanted, len(negative))).indices
    hard = _draw(negative[top], (wanted + 1) // 2)
    return positive, torch.cat([hard, _draw(negative, wanted // 2)])


def _draw(index: Tensor, count: int) -> Tensor:
    """At most ``count`` of these positions, at random (drawn on the CPU, so that a run repeats on any device)."""
    if len(index) <= count:
        return index
    return index[torch.randperm(len(index))[:count].to(index.device)]
