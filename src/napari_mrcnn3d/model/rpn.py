"""Region proposal network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_mrcnn3d._ops import nms_3d
from napari_mrcnn3d.config import ModelConfig
from napari_mrcnn3d.model.anchors import anchors_on_grid
from napari_mrcnn3d.model.box_coder import clip_boxes, decode_boxes, encode_boxes
from napari_mrcnn3d.model.matcher import match_atss, match_iou, sample_hard, sample_random

__all__ = ["RPNHead", "RPNOutput", "RegionProposalNetwork"]

MIN_SIDE = 0.5  # voxels; a thinner proposal covers no voxel centre


@dataclass(frozen=True)
class RPNOutput:
    """Answer of the proposal network for one image.

    Attributes
    ----------
    levels : list of Tensor[Ni, 6]
        Anchors of each level.
    objectness : Tensor[sum(Ni)]
        Logits, in the order of the joined levels.
    deltas : Tensor[sum(Ni), 6]
        Encoded boxes.
    """

    levels: list[Tensor]
    objectness: Tensor
    deltas: Tensor


class RPNHead(nn.Module):
    """A shared convolution, then objectness and box offsets for every anchor of a cell.

    Parameters
    ----------
    in_channels, channels : int
        Of the pyramid and of the hidden layer.
    num_anchors : int
        Anchors per cell; levels with fewer leave the surplus outputs unused.
    """

    def __init__(self, in_channels: int, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv3d(channels, num_anchors, 1)
        self.bbox_pred = nn.Conv3d(channels, 6 * num_anchors, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, D, H, W, A]`` and offsets ``[N, D, H, W, A, 6]``."""
        hidden = torch.relu(self.conv(x))
        logits = self.cls_logits(hidden).permute(0, 2, 3, 4, 1)
        deltas = self.bbox_pred(hidden).permute(0, 2, 3, 4, 1)
        return logits, deltas.unflatten(-1, (-1, 6))


class RegionProposalNetwork(nn.Module):
    """Proposes boxes that may hold an object.

    Parameters
    ----------
    config : ModelConfig
        Everything named ``rpn_*`` and ``anchor_*``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(config.fpn_channels, config.rpn_channels, max(len(g) for g in config.anchor_sizes))

    def forward(self, pyramid: list[Tensor]) -> list[RPNOutput]:
        """Anchors with objectness and offsets, for each image of the batch.

        Parameters
        ----------
        pyramid : list of Tensor[N, C, D, H, W]
            All levels, finest first.
        """
        config = self.config
        maps = [pyramid[level] for level in config.rpn_levels]
        strides = [config.level_strides[level] for level in config.rpn_levels]
        if config.rpn_extra_level:
            maps.append(F.max_pool3d(maps[-1], 1, stride=2))
            z, y, x = strides[-1]
            strides.append((2 * z, 2 * y, 2 * x))
        levels, logits, deltas = [], [], []
        for features, stride, sizes in zip(maps, strides, config.anchor_sizes, strict=True):
            score, delta = self.head(features)
            levels.append(
                anchors_on_grid(features.shape[2:], stride, sizes, offset=config.anchor_offset, device=features.device)
            )
            logits.append(score[..., : len(sizes)].flatten(1).float())
            deltas.append(delta[..., : len(sizes), :].flatten(1, 4).float())
        joined = zip(torch.cat(logits, 1), torch.cat(deltas, 1), strict=True)
        return [RPNOutput(levels, score, delta) for score, delta in joined]

    @torch.no_grad()
    def proposals(self, output: RPNOutput, shape: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
        """The best boxes of one image after suppression, and their objectness logits.

        Parameters
        ----------
        output : RPNOutput
        shape : tuple of int
            Extent of the image that boxes are cut to.
        count : int
            Most boxes to give.

        Returns
        -------
        Tensor[K, 6], Tensor[K]
            Best first.
        """
        keep, start = [], 0
        for anchors in output.levels:
            scores = output.objectness[start : start + len(anchors)]
            keep.append(start + scores.topk(min(self.config.rpn_pre_nms_top_n, len(anchors))).indices)
            start += len(anchors)
        index = torch.cat(keep)
        anchors = torch.cat(output.levels)[index]
        boxes = clip_boxes(decode_boxes(output.deltas[index], anchors, self.config.rpn_box_weights), shape)
        scores = output.objectness[index]
        solid = (boxes[:, 3:] - boxes[:, :3] >= MIN_SIDE).all(1) & torch.isfinite(scores)
        boxes, scores = boxes[solid], scores[solid]
        kept = nms_3d(boxes, scores, self.config.rpn_nms_iou, max_keep=count)
        return boxes[kept], scores[kept]

    def loss(self, output: RPNOutput, boxes: Tensor) -> dict[str, Tensor]:
        """Losses of one image against its objects.

        Parameters
        ----------
        output : RPNOutput
        boxes : Tensor[M, 6]
            Objects.

        Returns
        -------
        dict
            ``loss_objectness`` (cross-entropy over sampled anchors) and ``loss_rpn_box_reg`` (smooth L1 of positives).
        """
        config = self.config
        anchors = torch.cat(output.levels)
        if config.rpn_assignment == "atss":
            # All anchors of a cell are equally near, so cells are counted, not anchors.
            counts = [config.rpn_atss_candidates * len(sizes) for sizes in config.anchor_sizes]
            matched = match_atss(boxes, output.levels, counts)
        else:
            matched = match_iou(boxes, anchors, fg_iou=config.rpn_fg_iou, bg_iou=config.rpn_bg_iou, keep_best=True)
        count, share = config.rpn_batch_size, config.rpn_positive_fraction
        if config.rpn_hard_negatives:
            positive, negative = sample_hard(matched, output.objectness.detach(), count, positive_fraction=share)
        else:
            positive, negative = sample_random(matched, count, share)
        sampled = torch.cat([positive, negative])
        truth = torch.zeros(len(sampled), device=sampled.device)
        truth[: len(positive)] = 1
        objectness = F.binary_cross_entropy_with_logits(output.objectness[sampled], truth, reduction="sum")
        target = encode_boxes(boxes[matched[positive]], anchors[positive], config.rpn_box_weights)
        distance = F.smooth_l1_loss(output.deltas[positive], target, beta=config.rpn_smooth_l1_beta, reduction="sum")
        return {
            "loss_objectness": objectness / max(len(sampled), 1),
            "loss_rpn_box_reg": distance / max(len(positive), 1),
        }
