"""A network small enough for a test, images with known objects, and a model that finds them without learning."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from scipy import ndimage
from torch import Tensor, nn

from napari_mrcnn3d.config import ModelConfig
from napari_mrcnn3d.data.patches import objects_in
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Detections, Target

Shape = tuple[int, int, int]

_TINY: dict[str, Any] = {
    "stem_channels": 8,
    "stem_kernel": (3, 3, 3),
    "stem_stride": (1, 2, 2),
    "stage_channels": (8, 8, 16),
    "stage_blocks": (1, 1, 1),
    "stage_strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "fpn_channels": 8,
    "rpn_levels": (1, 2),
    "rpn_channels": 8,
    "anchor_sizes": (((4, 8, 8), (6, 12, 12)), ((10, 20, 20),)),
    "rpn_batch_size": 32,
    "rpn_pre_nms_top_n": 100,
    "rpn_post_nms_top_n_train": 32,
    "rpn_post_nms_top_n": 64,
    "roi_levels": (0, 1),
    "roi_canonical_size": 8.0,
    "box_pool_size": (3, 3, 3),
    "box_head_channels": (8,),
    "box_head_features": 16,
    "mask_pool_size": (4, 4, 4),
    "mask_head_channels": (8,),
    "roi_batch_size": 16,
    "mask_batch_size": 4,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """Settings of a network of a few thousand weights, strides 1, 2, 2 to 4, 8, 8."""
    return ModelConfig.model_validate(_TINY | changes)


def tiny_model(seed: int = 0, **changes: Any) -> MaskRCNN3D:
    """That network, untrained, in evaluation mode."""
    torch.manual_seed(seed)
    return MaskRCNN3D(tiny_config(**changes)).eval()


def ellipsoids(shape: Shape, objects: Sequence[tuple[Sequence[float], Sequence[float]]]) -> np.ndarray:
    """Label volume of ellipsoids (centre, half axes), both in voxels; voxel i covers [i, i + 1)."""
    grid = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in shape), indexing="ij"), -1)
    labels = np.zeros(shape, np.int32)
    for label, (centre, half) in enumerate(objects, start=1):
        labels[(((grid - centre) / half) ** 2).sum(-1) <= 1] = label
    return labels


def picture(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Microscope image (uint16) of labelled objects: bright on dark, with noise."""
    noise = np.random.default_rng(seed).normal(0, 20, labels.shape)
    return (100 + 400 * (labels > 0) + noise).clip(0).astype(np.uint16)


EIGHT = [((z, y, x), (4, 7, 7)) for z in (8, 24) for y in (10, 34) for x in (10, 34)]
"""Eight objects that do not touch in a volume of 32 x 44 x 44."""


def write_pairs(folder: Path, count: int = 2, shape: Shape = (32, 44, 44)) -> Path:
    """Folder of image and label TIFFs with eight objects each, every image a group of its own."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    labels = ellipsoids(shape, EIGHT)
    for k in range(count):
        tifffile.imwrite(folder / "images" / f"cells{k}.tif", picture(labels, k), metadata={"axes": "ZYX"})
        tifffile.imwrite(folder / "labels" / f"cells{k}.tif", labels.astype(np.uint16), metadata={"axes": "ZYX"})
    return folder


def target_of(labels: np.ndarray, classes: Sequence[int] | None = None) -> Target:
    """Training target of a label volume; all objects of class 1 if none are given."""
    boxes, ids = objects_in(labels)
    kinds = torch.ones(len(ids), dtype=torch.int64) if classes is None else torch.tensor(classes, dtype=torch.int64)
    return Target(torch.from_numpy(boxes), kinds, torch.from_numpy(ids), torch.from_numpy(labels))


class BlobModel(nn.Module):
    """Stands in for the network: everything brighter than half is an object, whose mask is its box.

    Parameters
    ----------
    config : ModelConfig
    most_voxels : int, optional
        Images of more voxels fill its memory.
    shift : float
        Boxes are moved by this along x, up in every other image, down in the others: neighbouring tiles disagree.
    """

    def __init__(self, config: ModelConfig, *, most_voxels: int | None = None, shift: float = 0.0) -> None:
        super().__init__()
        self.config, self.most_voxels, self.shift = config, most_voxels, shift
        self.seen: list[tuple[int, ...]] = []

    def detect_steps(self, image: Tensor) -> Generator[float, None, Detections]:
        """Yield a half, then give the detections, larger objects with better scores."""
        self.seen.append(tuple(image.shape))
        if self.most_voxels is not None and image.numel() > self.most_voxels:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        yield 0.5
        labels, _ = ndimage.label(image.numpy() > 0.5)
        boxes, ids = objects_in(labels)
        sizes = np.bincount(labels.ravel())[ids]
        order = np.argsort(-sizes, kind="stable")
        found = torch.from_numpy(boxes[order])
        found[:, [2, 5]] += self.shift if len(self.seen) % 2 else -self.shift
        scores = torch.from_numpy(sizes[order] / (sizes[order] + 10.0)).float()
        masks = torch.ones(len(found), *self.config.mask_size)
        return Detections(found, scores, torch.ones(len(found), dtype=torch.int64), masks)
