"""Anchors: the boxes that proposals start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from napari_mrcnn3d.config import FloatTriple, Triple

__all__ = ["anchors_on_grid"]


def anchors_on_grid(
    grid: Sequence[int], stride: Triple, sizes: Sequence[FloatTriple], *, offset: float, device: torch.device
) -> Tensor:
    """Boxes of given sizes centred in every cell of a feature map.

    Parameters
    ----------
    grid : sequence of 3 int
        Extent of the feature map (D, H, W).
    stride : tuple of 3 int
        Input voxels per cell and axis.
    sizes : sequence of 3 float each
        Sides in input voxels, z y x.
    offset : float
        Centre of cell ``i`` is ``(i + offset) * stride``; one half is its middle.
    device : torch.device

    Returns
    -------
    Tensor[D * H * W * len(sizes), 6]
        float32; cells in C order, sizes fastest.
    """
    axes = [(torch.arange(n, device=device) + offset) * s for n, s in zip(grid, stride, strict=True)]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, 3)
    half = torch.tensor(sizes, device=device, dtype=torch.float32)[None] / 2
    return torch.cat([centres - half, centres + half], -1).reshape(-1, 6).float()
