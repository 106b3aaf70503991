"""Class and refined box of a region."""

from __future__ import annotations

import math

from torch import Tensor, nn

from napari_mrcnn3d.config import ModelConfig
from napari_mrcnn3d.model.backbone import conv3d, norm3d

__all__ = ["BoxHead"]


class BoxHead(nn.Module):
    """Convolutions and hidden layers over the pooled grid, then class logits and per-class box offsets.

    Parameters
    ----------
    config : ModelConfig
        ``box_*``, ``fpn_channels``, ``norm``, ``num_classes``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.classes = config.num_classes
        width, hidden = config.fpn_channels, config.box_head_features
        if config.box_head_kernel == 0:
            self.features = nn.Sequential(
                nn.Conv3d(width, hidden, config.box_pool_size, bias=False),
                norm3d(config.norm, hidden),
                nn.ReLU(inplace=True),
                nn.Conv3d(hidden, hidden, 1, bias=False),
                norm3d(config.norm, hidden),
                nn.ReLU(inplace=True),
                nn.Flatten(),
            )
        else:
            self.features = self._small_kernels(config)
        self.cls_score = nn.Linear(hidden, self.classes)
        self.bbox_pred = nn.Linear(hidden, 6 * self.classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    @staticmethod
    def _small_kernels(config: ModelConfig) -> nn.Sequential:
        """3³ convolutions, a pooling that halves the grid, and two hidden layers."""
        layers: list[nn.Module] = []
        width = config.fpn_channels
        for channels in config.box_head_channels:
            layers += [conv3d(width, channels, (3, 3, 3)), norm3d(config.norm, channels), nn.ReLU(inplace=True)]
            width = channels
        layers += [nn.MaxPool3d(2, ceil_mode=True), nn.Flatten()]
        cells = math.prod(-(-n // 2) for n in config.box_pool_size)
        hidden = config.box_head_features
        layers += [nn.Linear(width * cells, hidden), nn.ReLU(inplace=True)]
        layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[K, classes]`` and offsets ``[K, classes, 6]`` in float32, for ``pooled[K, C, d, h, w]``."""
        hidden = self.features(pooled)
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float().unflatten(-1, (self.classes, 6))
