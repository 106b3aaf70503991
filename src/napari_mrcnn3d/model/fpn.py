"""Feature pyramid."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FeaturePyramidNetwork3D"]


class FeaturePyramidNetwork3D(nn.Module):
    """Top-down pyramid over the stages of a backbone (Lin et al. 2017, arXiv:1612.03144).

    Parameters
    ----------
    in_channels : tuple of int
        Channels of the stages, finest first.
    channels : int
        Channels of every level.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv3d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """One ``[N, channels, D, H, W]`` map per stage, each with its stage's extent."""
        top = self.lateral[-1](features[-1])
        levels = [self.smooth[-1](top)]
        for i in range(len(features) - 2, -1, -1):
            side = self.lateral[i](features[i])
            top = F.interpolate(top, size=side.shape[2:], mode="nearest").add_(side)
            levels.append(self.smooth[i](top))
        return levels[::-1]
