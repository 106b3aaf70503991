"""Features of regions, each pooled from the pyramid level that suits its size."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_mrcnn3d._ops import crop_and_resize_3d, roi_align_3d
from napari_mrcnn3d.config import ModelConfig, Triple

__all__ = ["MultiScaleRoIAlign3D"]


class MultiScaleRoIAlign3D:
    """Pools boxes to a fixed grid.

    Parameters
    ----------
    config : ModelConfig
        ``roi_*`` and ``sampling_ratio``.
    output_size : tuple of 3 int
        Grid over each box, z y x.
    """

    def __init__(self, config: ModelConfig, output_size: Triple) -> None:
        self.config = config
        self.output_size = output_size

    def levels_of(self, boxes: Tensor) -> Tensor:
        """Pyramid level of each box ``[K, 6]``.

        Notes
        -----
        Lin et al. 2017 (arXiv:1612.03144), eq. 1, rounded, with the geometric mean side in place of sqrt(w h) and the
        model's own canonical size in place of ImageNet's 224.
        """
        config = self.config
        side = (boxes[:, 3:] - boxes[:, :3]).clamp(min=1e-3).prod(1) ** (1 / 3)
        level = config.roi_canonical_level + torch.log2(side / config.roi_canonical_size).round()
        return level.clamp(min(config.roi_levels), max(config.roi_levels)).long()

    def by_level(self, boxes: Tensor) -> Tensor:
        """Order that puts boxes ``[K, 6]`` of one pyramid level side by side; in this order pooling copies nothing."""
        return torch.argsort(self.levels_of(boxes), stable=True)

    def __call__(self, pyramid: list[Tensor], boxes: Tensor, batch_index: Tensor, shape: Triple) -> Tensor:
        """Pooled features.

        Parameters
        ----------
        pyramid : list of Tensor[N, C, D, H, W]
            All levels, finest first.
        boxes : Tensor[K, 6]
            In voxels of the network's input.
        batch_index : int64[K]
            Image of each box.
        shape : tuple of int
            Extent of the network's input.

        Returns
        -------
        Tensor[K, C, *output_size]
        """
        levels = self.levels_of(boxes)
        order = torch.argsort(levels, stable=True)
        counts = torch.bincount(levels, minlength=len(pyramid)).tolist()
        pooled = [
            self._pool(pyramid[level], boxes[rows], batch_index[rows], level, shape)
            for level, rows in enumerate(order.split(counts))
            if len(rows)
        ]
        if not pooled:
            return pyramid[0].new_zeros((0, pyramid[0].shape[1], *self.output_size))
        joined = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
        # Compared on the boxes, which are few, to spare a copy of the features, which are not.
        return joined if torch.equal(levels, levels[order]) else joined[torch.argsort(order)]

    def _pool(self, features: Tensor, boxes: Tensor, batch_index: Tensor, level: int, shape: Triple) -> Tensor:
        if self.config.roi_sampling == "roi_align":
            z, y, x = self.config.level_strides[level]
            return roi_align_3d(
                features,
                boxes,
                batch_index,
                output_size=self.output_size,
                spatial_scale=(1 / z, 1 / y, 1 / x),
                sampling_ratio=self.config.sampling_ratio,
            )
        last = torch.tensor([*shape, *shape], device=boxes.device).clamp(min=2) - 1.0
        far = torch.tensor([0.0, 0, 0, 1, 1, 1], device=boxes.device)
        crops = crop_and_resize_3d(
            features.permute(0, 2, 3, 4, 1).float(), (boxes - far) / last, batch_index, crop_size=self.output_size
        )
        return crops.permute(0, 4, 1, 2, 3)
