"""Non-maximum suppression of 3D boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_mrcnn3d._ops.boxes import check_boxes, check_rows


def nms_3d(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    groups: Tensor | None = None,
    max_keep: int | None = None,
) -> Tensor:
    """Keep the boxes that no better-scoring box covers.

    Greedy: boxes are visited by descending score, equal scores by ascending index; a visited box is kept
    unless its IoU with a kept box is above the threshold.

    Parameters
    ----------
    boxes : Tensor[N, 6]
        z1, y1, x1, z2, y2, x2, half-open; float32 or float64 (the decision is made in float32).
    scores : Tensor[N]
        Any floating type and any sign. One that is not a number ranks last.
    iou_threshold : float
        In [0, 1].
    groups : integer Tensor[N], optional
        Class or image of each box; boxes of different groups never suppress each other.
    max_keep : int, optional
        Stop when this many are kept.

    Returns
    -------
    int64 Tensor[K]
        Positions in ``boxes``, by descending score.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong shape, type, device or range; the message names it.

    Notes
    -----
    "IoU above the threshold" is decided as ``intersection > iou_threshold * union`` in float32, in one fixed
    order of rounding and without fused multiply-add, so that every device keeps the same boxes.

    Boxes without volume (a zero or negative side) and boxes with a coordinate that is not a number neither
    suppress nor are suppressed: filter them before. The TensorFlow op of 3d-mask-r-cnn differs in two points:
    it suppresses at IoU *equal to* the threshold too, and it accepts corners in any order. Sort them with
    ``torch.minimum`` and ``torch.maximum`` where they may be flipped.
    """
    check_boxes(boxes)
    check_rows(scores, "scores", boxes, integer=False)
    if groups is not None:
        check_rows(groups, "groups", boxes, integer=True)
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if max_keep is not None and max_keep < 0:
        raise ValueError(f"max_keep must not be negative, got {max_keep}")
    kept: Tensor = torch.ops.mrcnn3d.nms(
        boxes.detach(), scores.detach(), float(iou_threshold), None if groups is None else groups, max_keep
    )
    return kept
