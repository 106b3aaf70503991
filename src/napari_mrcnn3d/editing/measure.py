"""Measurements of the objects in a label volume, one table row each."""

from __future__ import annotations

import numpy as np
from skimage.measure import regionprops_table
from skimage.segmentation import relabel_sequential

from napari_mrcnn3d.structures import Instances, VoxelSize

__all__ = ["instance_table"]

_AXES = "zyx"
_BOX = ("z1", "y1", "x1", "z2", "y2", "x2")


def instance_table(
    labels: np.ndarray,
    instances: Instances | None,
    voxel_size: VoxelSize | None,
    image: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Measure every object of a label volume.

    Parameters
    ----------
    labels : integer array [z, y, x]
        0 is background.
    instances : Instances or None
        Where score and class come from: row k belongs to label k + 1. Labels beyond (drawn by hand), or all if None,
        have the class "" and no score (NaN).
    voxel_size : VoxelSize or None
        Without it the columns in µm are NaN.
    image : array [z, y, x], optional
        Adds the columns ``mean_intensity`` and ``max_intensity``.

    Returns
    -------
    dict of str to array
        Columns of equal length, one entry per object, by rising label:

        ``label``, ``class`` (its name), ``score`` (0 to 1);
        ``z1, y1, x1, z2, y2, x2``: the box in voxels, half-open;
        ``z1_um, y1_um, x1_um, z2_um, y2_um, x2_um``: the same times the voxel size;
        ``centroid_z, centroid_y, centroid_x``: in voxels, where 0 is the centre of the first one, as napari counts;
        ``centroid_z_um, centroid_y_um, centroid_x_um``: the same times the voxel size;
        ``volume_voxels``, ``volume_um3``;
        ``touches_border``: whether the object meets a face of the image and may be cut there (axes that are one voxel
        long do not count).

    Raises
    ------
    ValueError
        If labels are not a 3D array of integers, or the image has another shape.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"labels must be a 3D array of integers from 0, got {labels.dtype} {labels.shape}")
    if image is not None and image.shape != labels.shape:
        raise ValueError(f"image {image.shape} and labels {labels.shape} differ in shape")
    measured = _regionprops(labels, image)
    size = voxel_size or VoxelSize(np.nan, np.nan, np.nan)
    box = [measured[f"bbox-{side}"] for side in range(6)]
    centroid = [measured[f"centroid-{axis}"] for axis in range(3)]
    volume = measured["num_pixels"].astype(np.int64)
    table = {"label": measured["label"], **_origin(measured["label"], instances)}
    table |= dict(zip(_BOX, box, strict=True))
    table |= {f"{name}_um": side * length for name, side, length in zip(_BOX, box, (*size, *size), strict=True)}
    table |= {f"centroid_{name}": along for name, along in zip(_AXES, centroid, strict=True)}
    table |= {f"centroid_{name}_um": along * length for name, along, length in zip(_AXES, centroid, size, strict=True)}
    table |= {"volume_voxels": volume, "volume_um3": volume * size.volume}
    table["touches_border"] = np.any(
        [(box[axis] == 0) | (box[axis + 3] == length) for axis, length in enumerate(labels.shape) if length > 1]
        or [np.zeros(len(volume), bool)],
        axis=0,
    )
    if image is not None:
        table |= {"mean_intensity": measured["intensity_mean"], "max_intensity": measured["intensity_max"]}
    return table


def _regionprops(labels: np.ndarray, image: np.ndarray | None) -> dict[str, np.ndarray]:
    """Measure with scikit-image."""
    properties = ["label", "bbox", "num_pixels", "centroid"]
    if image is not None:
        properties += ["intensity_mean", "intensity_max"]
    original = None
    if labels.max(initial=0) > labels.size:  # scikit-image takes memory for every number up to the largest label
        labels, _, original = relabel_sequential(labels)  # type: ignore[no-untyped-call]
    measured: dict[str, np.ndarray]
    measured = regionprops_table(labels, image, properties=properties)  # type: ignore[no-untyped-call]
    if original is not None:
        measured["label"] = np.asarray(original)[measured["label"]].astype(np.int64)
    return measured


def _origin(labels: np.ndarray, instances: Instances | None) -> dict[str, np.ndarray]:
    """Look up class name and score of every label."""
    names, scores = np.full(len(labels), "", dtype=object), np.full(len(labels), np.nan)
    if instances is not None:
        known = labels <= len(instances)
        rows, candidates = labels[known] - 1, instances.candidates
        names[known] = np.array(["", *candidates.class_names], dtype=object)[candidates.classes[rows]]
        scores[known] = candidates.scores[rows]
    return {"class": names.astype(str), "score": scores}
