"""Shape of an object inside its box."""

from __future__ import annotations

from torch import Tensor, nn

from napari_mrcnn3d.config import ModelConfig
from napari_mrcnn3d.model.backbone import conv3d, norm3d

__all__ = ["MaskHead"]


class MaskHead(nn.Module):
    """Convolutions on the pooled grid, one doubling of it, then a mask for every class (He et al. 2017, fig. 4).

    Parameters
    ----------
    config : ModelConfig
        ``mask_*``, ``fpn_channels``, ``norm``, ``num_classes``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = config.fpn_channels
        for channels in config.mask_head_channels:
            layers += [conv3d(width, channels, (3, 3, 3)), norm3d(config.norm, channels), nn.ReLU(inplace=True)]
            width = channels
        layers += [nn.ConvTranspose3d(width, width, 2, stride=2), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.mask_fcn_logits = nn.Conv3d(width, config.num_classes - 1, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits ``[K, classes - 1, 2d, 2h, 2w]`` in float32 for ``pooled[K, C, d, h, w]``."""
        logits: Tensor = self.mask_fcn_logits(self.features(pooled))
        return logits.float()
