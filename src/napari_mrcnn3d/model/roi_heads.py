"""Second stage: what each proposal is, where exactly, and its shape."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_mrcnn3d._ops import nms_3d
from napari_mrcnn3d.config import ModelConfig, Triple
from napari_mrcnn3d.model.box_coder import clip_boxes, decode_boxes, encode_boxes
from napari_mrcnn3d.model.box_head import BoxHead
from napari_mrcnn3d.model.mask_head import MaskHead
from napari_mrcnn3d.model.matcher import match_iou, sample_hard, sample_random
from napari_mrcnn3d.model.poolers import MultiScaleRoIAlign3D
from napari_mrcnn3d.model.rpn import MIN_SIDE

__all__ = ["Detections", "RoIHeads", "Target", "mask_targets"]

CHUNK = 64  # regions per pass through a head: bounds the memory, and larger blocks cost page faults, not time


@dataclass(frozen=True)
class Target:
    """Objects of one training image.

    Attributes
    ----------
    boxes : Tensor[M, 6]
    classes : int64[M]
        1 and up.
    ids : int64[M]
        Value of each object in ``labels``.
    labels : Tensor[D, H, W]
        Label volume, integer.
    """

    boxes: Tensor
    classes: Tensor
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Target:
        """The same on another device."""
        return Target(*(t.to(device) for t in (self.boxes, self.classes, self.ids, self.labels)))


@dataclass(frozen=True)
class Detections:
    """Answer for one image, best first.

    Attributes
    ----------
    boxes : Tensor[N, 6]
    scores : Tensor[N]
    classes : int64[N]
    masks : Tensor[N, mz, my, mx]
        Probabilities over the box.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor


def mask_targets(labels: Tensor, ids: Tensor, boxes: Tensor, size: Triple) -> Tensor:
    """Masks of objects resampled onto a grid over boxes.

    Parameters
    ----------
    labels : Tensor[D, H, W]
        Label volume, integer.
    ids : int64[K]
        Object of each box.
    boxes : Tensor[K, 6]
    size : tuple of 3 int
        Grid over each box.

    Returns
    -------
    Tensor[K, *size]
        1 where the trilinear share of the object at the cell's centre is at least one half, else 0.
    """
    low, high, weight = [], [], []
    for axis, (cells, extent) in enumerate(zip(size, labels.shape, strict=True)):
        start, stop = boxes[:, axis, None], boxes[:, axis + 3, None]
        step = (torch.arange(cells, device=boxes.device) + 0.5) / cells
        position = (start + step * (stop - start) - 0.5).clamp(0, extent - 1)
        floor = position.floor()
        low.append(floor.long())
        high.append((floor.long() + 1).clamp(max=extent - 1))
        weight.append(position - floor)
    share = boxes.new_zeros((len(boxes), *size))
    wanted = ids.view(-1, 1, 1, 1)
    for corner in range(8):
        index, part = [], share.new_ones(())
        for axis in range(3):
            shape = [len(boxes), 1, 1, 1]
            shape[axis + 1] = size[axis]
            upper = corner >> axis & 1
            index.append((high if upper else low)[axis].view(shape))
            part = part * (weight[axis] if upper else 1 - weight[axis]).view(shape)
        share += part * (labels[index[0], index[1], index[2]] == wanted)
    return (share >= 0.5).to(boxes.dtype)


class RoIHeads(nn.Module):
    """Class, box and mask of proposals.

    Parameters
    ----------
    config : ModelConfig
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.box_roi_pool = MultiScaleRoIAlign3D(config, config.box_pool_size)
        self.mask_roi_pool = MultiScaleRoIAlign3D(config, config.mask_pool_size)
        self.box_head = BoxHead(config)
        self.mask_head = MaskHead(config)

    def loss(
        self, pyramid: list[Tensor], proposals: list[Tensor], targets: list[Target], shape: Triple
    ) -> dict[str, Tensor]:
        """Losses of the heads on sampled proposals.

        Parameters
        ----------
        pyramid : list of Tensor[N, C, D, H, W]
        proposals : list of Tensor[K, 6]
            Of each image; its objects' own boxes are added.
        targets : list of Target
        shape : tuple of int
            Extent of the input.

        Returns
        -------
        dict
            ``loss_classifier``, ``loss_box_reg``, ``loss_mask``.
        """
        with torch.no_grad():
            samples = [self._sample(p, t) for p, t in zip(proposals, targets, strict=True)]
        boxes = torch.cat([s[0] for s in samples])
        classes = torch.cat([s[1] for s in samples])
        truth = torch.cat([s[2] for s in samples])
        batch_index = torch.cat([torch.full_like(s[1], i) for i, s in enumerate(samples)])
        order = self.box_roi_pool.by_level(boxes)
        boxes, classes, truth, batch_index = (rows[order] for rows in (boxes, classes, truth, batch_index))
        logits, deltas = self.box_head(self.box_roi_pool(pyramid, boxes, batch_index, shape))
        positive = torch.nonzero(classes > 0)[:, 0]
        wanted = encode_boxes(truth[positive], boxes[positive], self.config.box_weights)
        distance = F.smooth_l1_loss(deltas[positive, classes[positive]], wanted, beta=1.0, reduction="sum")
        return {
            "loss_classifier": F.cross_entropy(logits, classes, reduction="sum") / max(len(boxes), 1),
            "loss_box_reg": distance / max(len(boxes), 1),
            "loss_mask": self._mask_loss(pyramid, samples, targets, shape),
        }

    def _sample(self, proposals: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes, classes, true boxes and object rows of a random choice of proposals, objects first."""
        config = self.config
        boxes = torch.cat([proposals, target.boxes])
        matched = match_iou(target.boxes, boxes, fg_iou=config.roi_fg_iou, bg_iou=config.roi_fg_iou)
        count, share = config.roi_batch_size, config.roi_positive_fraction
        if config.roi_hard_negatives:
            order = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)  # proposals come best first
            positive, negative = sample_hard(matched, order, count, positive_fraction=share, pool=1)
        else:
            positive, negative = sample_random(matched, count, share)
        rows = matched[positive]
        index = torch.cat([positive, negative])
        classes = torch.zeros_like(index)
        classes[: len(positive)] = target.classes[rows]
        truth = boxes[index].clone()
        truth[: len(positive)] = target.boxes[rows]
        return boxes[index], classes, truth, rows

    def _mask_loss(
        self,
        pyramid: list[Tensor],
        samples: list[tuple[Tensor, Tensor, Tensor, Tensor]],
        targets: list[Target],
        shape: Triple,
    ) -> Tensor:
        """Cross-entropy of the true class's mask, over the first positives of each image."""
        boxes, classes, batch_index, truth = [], [], [], []
        for i, ((box, label, _, rows), target) in enumerate(zip(samples, targets, strict=True)):
            count = min(len(rows), self.config.mask_batch_size)
            boxes.append(box[:count])
            classes.append(label[:count])
            batch_index.append(torch.full_like(label[:count], i))
            truth.append(mask_targets(target.labels, target.ids[rows[:count]], box[:count], self.config.mask_size))
        joined = torch.cat(boxes)
        if len(joined) == 0:
            return pyramid[0].sum() * 0.0
        order = self.mask_roi_pool.by_level(joined)
        logits = self.mask_head(self.mask_roi_pool(pyramid, joined[order], torch.cat(batch_index)[order], shape))
        wanted = torch.cat(truth)[order]
        return F.binary_cross_entropy_with_logits(_of_class(logits, torch.cat(classes)[order]), wanted)

    def detect_steps(
        self, pyramid: list[Tensor], proposals: Tensor, shape: Triple, valid: Triple
    ) -> Generator[float, None, Detections]:
        """Detections of a single image down to the score floor.

        Parameters
        ----------
        pyramid : list of Tensor[1, C, D, H, W]
        proposals : Tensor[K, 6]
        shape, valid : tuple of int
            Extent of the network's input, and of the image in it that boxes are cut to.

        Yields
        ------
        float
            Share of the whole detection done, 0.5 at the start, after each chunk of regions.
        """
        config = self.config
        classes = config.num_classes - 1
        proposals = proposals[self.box_roi_pool.by_level(proposals)]
        scores, boxes = [proposals.new_zeros((0, classes))], [proposals.new_zeros((0, classes, 6))]
        for done, chunk in enumerate(_chunks(proposals)):
            logits, deltas = self.box_head(self._pool(self.box_roi_pool, pyramid, chunk, shape))
            scores.append(logits.softmax(1)[:, 1:])
            boxes.append(decode_boxes(deltas[:, 1:], chunk, config.box_weights))
            yield 0.5 + 0.25 * min(1.0, (done + 1) * CHUNK / len(proposals))
        score, box = torch.cat(scores).flatten(), clip_boxes(torch.cat(boxes), valid).flatten(0, 1)
        kind = torch.arange(1, config.num_classes, device=score.device).repeat(len(score) // classes)
        good = (score >= config.score_floor) & (box[:, 3:] - box[:, :3] >= MIN_SIDE).all(1)
        score, box, kind = score[good], box[good], kind[good]
        kept = nms_3d(box, score, config.nms_iou, groups=kind, max_keep=config.max_candidates)
        box, score, kind = box[kept], score[kept], kind[kept]
        masks = [box.new_zeros((0, *config.mask_size))]
        for done, (part, classes_of) in enumerate(zip(_chunks(box), _chunks(kind), strict=True)):
            masks.append(self.masks(pyramid, part, classes_of, shape))
            yield 0.75 + 0.25 * min(1.0, (done + 1) * CHUNK / len(box))
        return Detections(box, score, kind, torch.cat(masks))

    def masks(self, pyramid: list[Tensor], boxes: Tensor, classes: Tensor, shape: Triple) -> Tensor:
        """Mask probabilities ``[K, mz, my, mx]`` of the given classes over the given boxes of a single image."""
        return _of_class(self.mask_head(self._pool(self.mask_roi_pool, pyramid, boxes, shape)), classes).sigmoid()

    @staticmethod
    def _pool(pool: MultiScaleRoIAlign3D, pyramid: list[Tensor], boxes: Tensor, shape: Triple) -> Tensor:
        return pool(pyramid, boxes, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), shape)


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Mask logits ``[K, mz, my, mx]`` of one class each, out of those of all classes from 1 on."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), classes - 1]


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """At most CHUNK rows at a time; nothing for no rows, which not every layer accepts."""
    return rows.split(CHUNK) if len(rows) else ()
