"""Network settings that follow from the sizes of the training objects."""

from __future__ import annotations

import numpy as np
from scipy.cluster.vq import kmeans2

from napari_mrcnn3d.config import FloatTriple, ModelConfig, Triple

__all__ = ["anchor_coverage", "fit_anchors", "fit_model", "fit_patch"]

ANCHORS = 6
CELLS_PER_ANCHOR = 5.0  # side of an anchor in cells of its level: small enough to be placed, large enough to be seen
FINE_SIDE = 12.0  # voxels; along axes where objects are thinner no resolution is given away
FINE_VOXEL = 1.5  # nor along axes whose voxels are longer than the shortest by more than this factor
PATCH_VOXELS = 450_000  # one step in about half a second on two cores


def fit_model(config: ModelConfig, sides: np.ndarray) -> ModelConfig:
    """Strides, mask grid and anchors for objects of these sizes.

    Parameters
    ----------
    config : ModelConfig
        What the fit starts from; its pyramid levels are kept.
    sides : float[N, 3]
        Sides of the training objects' boxes in network voxels, z y x.

    Returns
    -------
    ModelConfig
    """
    if len(sides) == 0:
        return config
    voxel = np.array(config.voxel_size or (1.0, 1.0, 1.0))
    thick = (np.median(sides, axis=0) >= FINE_SIDE) & (voxel <= FINE_VOXEL * voxel.min())
    config = config.model_copy(
        update={
            "stem_stride": _per_axis(thick, 2, 1),
            "stem_kernel": _per_axis(thick, 5, 3),
            "box_pool_size": _per_axis(thick, 7, 5),
            "mask_pool_size": _per_axis(thick, 14, 10),
            "object_size": float(f"{np.median((sides * voxel).prod(1) ** (1 / 3)):.3g}"),
            "rpn_extra_level": False,
        }
    )
    levels, anchors = fit_anchors(config, sides)
    return config.model_copy(update={"rpn_levels": levels, "anchor_sizes": anchors})


def fit_anchors(config: ModelConfig, sides: np.ndarray) -> tuple[tuple[int, ...], tuple[tuple[FloatTriple, ...], ...]]:
    """Anchor sizes by clustering the objects' log sides, each on the level whose cells suit it.

    Parameters
    ----------
    config : ModelConfig
        ``level_strides`` are used.
    sides : float[N, 3]
        In network voxels.

    Returns
    -------
    levels : tuple of int
        Pyramid levels that have anchors; the finest of several, dear and full of easy background, is left out.
    sizes : tuple of tuples of 3 float
        Anchors of each of them.

    Notes
    -----
    Clustering after Redmon & Farhadi 2017 (arXiv:1612.08242), section 2, with Euclidean distance of log sides.
    """
    logs = np.log(np.maximum(sides, 1.0))
    count = min(ANCHORS, len(np.unique(logs, axis=0)))
    centres, _ = kmeans2(logs, count, minit="++", seed=0, missing="warn")
    sizes = np.exp(centres[np.argsort(centres.sum(1))])
    strides = np.array(config.level_strides, dtype=float).prod(1) ** (1 / 3)
    usable = np.arange(min(1, len(strides) - 1), len(strides))
    cells = sizes.prod(1)[:, None] ** (1 / 3) / strides[usable]
    chosen = usable[np.abs(np.log(cells / CELLS_PER_ANCHOR)).argmin(1)]
    levels = tuple(int(level) for level in np.unique(chosen))
    groups = tuple(tuple(_rounded(size) for size in sizes[chosen == level]) for level in levels)
    return levels, groups


def anchor_coverage(config: ModelConfig, sides: np.ndarray, iou: float) -> float:
    """Share of objects for which an anchor of the same centre reaches this IoU: the most that anchors can cover."""
    anchors = np.array([size for group in config.anchor_sizes for size in group])
    inter = np.minimum(sides[:, None], anchors[None]).prod(2)
    union = sides.prod(1)[:, None] + anchors.prod(1)[None] - inter
    return float(((inter / union).max(1) >= iou).mean()) if len(sides) else 0.0


def fit_patch(config: ModelConfig, shapes: list[Triple]) -> Triple:
    """Patch whose sides are multiples of the network's strides, in the proportions of an object, inside the images.

    Parameters
    ----------
    config : ModelConfig
    shapes : list of tuples
        Extents of the training images in network voxels.
    """
    top = np.array(config.level_strides[-1])
    aspect = np.array(config.stem_stride, dtype=float)
    aspect *= (PATCH_VOXELS / aspect.prod()) ** (1 / 3)
    largest = np.ceil(np.max(shapes, axis=0) / top) * top
    size = np.minimum(np.maximum(np.round(aspect / top), 1) * top, largest)
    return int(size[0]), int(size[1]), int(size[2])


def _per_axis(thick: np.ndarray, yes: int, no: int) -> Triple:
    z, y, x = (yes if t else no for t in thick)
    return z, y, x


def _rounded(size: np.ndarray) -> FloatTriple:
    z, y, x = (round(float(v), 1) for v in size)
    return z, y, x
