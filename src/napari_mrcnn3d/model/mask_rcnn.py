"""The whole network."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_mrcnn3d.config import ModelConfig, Triple
from napari_mrcnn3d.model.backbone import ResNet3D
from napari_mrcnn3d.model.fpn import FeaturePyramidNetwork3D
from napari_mrcnn3d.model.roi_heads import Detections, RoIHeads, Target
from napari_mrcnn3d.model.rpn import RegionProposalNetwork
from napari_mrcnn3d.model.transform import padded_shape

__all__ = ["MaskRCNN3D"]


class MaskRCNN3D(nn.Module):
    """3D Mask R-CNN (He et al. 2017, arXiv:1703.06870, with a third axis).

    Parameters
    ----------
    config : ModelConfig
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet3D(config)
        self.fpn = FeaturePyramidNetwork3D(config.stage_channels, config.fpn_channels)
        self.rpn = RegionProposalNetwork(config)
        self.roi_heads = RoIHeads(config)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps, finest first, of normalised images ``[N, 1, D, H, W]`` of any extent, zero-padded behind."""
        missing = [p - n for p, n in zip(padded_shape(images.shape[2:], self.config), images.shape[2:], strict=True)]
        padded = F.pad(images, (0, missing[2], 0, missing[1], 0, missing[0]))
        levels: list[Tensor] = self.fpn(self.backbone(padded.contiguous(memory_format=torch.channels_last_3d)))
        return levels

    def loss(self, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Training losses.

        Parameters
        ----------
        images : Tensor[N, 1, D, H, W]
            Normalised.
        targets : sequence of Target
            Objects of each image.

        Returns
        -------
        dict
            ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``, ``loss_mask``: scalars.
        """
        valid, shape = _triple(images.shape[2:]), padded_shape(images.shape[2:], self.config)
        pyramid = self.pyramid(images)
        outputs = self.rpn(pyramid)
        parts = [self.rpn.loss(o, t.boxes) for o, t in zip(outputs, targets, strict=True)]
        losses = {name: torch.stack([p[name] for p in parts]).mean() for name in parts[0]}
        count = self.config.rpn_post_nms_top_n_train
        proposals = [self.rpn.proposals(o, valid, count)[0] for o in outputs]
        return losses | self.roi_heads.loss(pyramid, proposals, list(targets), shape)

    def detect_steps(self, image: Tensor) -> Generator[float, None, Detections]:
        """Detections in one normalised image ``[D, H, W]``, in its voxels.

        Yields
        ------
        float
            Share of the work done, after each part of it: a chance to stop in between.
        """
        valid, shape = _triple(image.shape), padded_shape(image.shape, self.config)
        pyramid = self.pyramid(image[None, None])
        yield 0.4
        output = self.rpn(pyramid)[0]
        boxes, _ = self.rpn.proposals(output, valid, self.config.rpn_post_nms_top_n)
        yield 0.5
        found: Detections = yield from self.roi_heads.detect_steps(pyramid, boxes, shape, valid)
        return found


def _triple(shape: Sequence[int]) -> Triple:
    z, y, x = shape
    return z, y, x
