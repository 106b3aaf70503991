"""Saves a label layer as TIFF with its voxel size, and beside it a table of the objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from napari_mrcnn3d._files import atomic_write
from napari_mrcnn3d.editing.measure import instance_table
from napari_mrcnn3d.io.tables import write_table
from napari_mrcnn3d.io.tiff import write_labels as write_tiff
from napari_mrcnn3d.structures import VoxelSize
from napari_mrcnn3d.widgets._layers import calibration
from napari_mrcnn3d.widgets._session import METADATA_KEY

__all__ = ["write_labels"]


def write_labels(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write a label layer and, under the same name, its table (``.csv``).

    napari may hand any label layer to this function: flat ones and series are written as they are, without a table.

    Parameters
    ----------
    path : str
        The TIFF file.
    data : array-like of int
        (z, y, x); axes of length one before these are dropped.
    attributes : dict
        The layer's: scale, units, features, metadata, name.

    Returns
    -------
    list of str
        The files written.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    labels = np.asarray(data[0] if attributes.get("multiscale") else data)
    target = Path(path)
    if not _is_stack(labels):
        with atomic_write(target) as temporary:
            tifffile.imwrite(temporary, labels, photometric="minisblack", compression="zlib")
        return [str(target)]
    labels = labels.reshape(labels.shape[-3:])
    size = _voxel_size(attributes)
    table = _with_origin(instance_table(labels, None, size), attributes)
    write_tiff(target, labels, size)
    write_table(target.with_suffix(".csv"), table)
    return [str(target), str(target.with_suffix(".csv"))]


def _is_stack(labels: np.ndarray) -> bool:
    """Whether these are labels of one volume, which a table can describe."""
    single = labels.ndim >= 3 and all(side == 1 for side in labels.shape[:-3]) and labels.size > 0
    return single and labels.min() >= 0 and labels.max() <= np.iinfo(np.uint32).max


def _voxel_size(attributes: dict[str, Any]) -> VoxelSize | None:
    """Take the layer's voxel size, or else the one that the run was given."""
    known = calibration(attributes["scale"], attributes["units"])
    given = attributes.get("metadata", {}).get(METADATA_KEY, {}).get("config", {}).get("voxel_size")
    return known.voxel_size or (VoxelSize.of(given) if given else None)


def _with_origin(table: dict[str, np.ndarray], attributes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Fill score and class of the objects that the layer's feature table knows."""
    features = attributes.get("features")
    if features is None or not {"index", "score", "class"} <= set(features.columns):
        return table
    known = features.set_index("index").reindex(table["label"])
    classes = known["class"].astype(object)
    return {
        **table,
        "score": known["score"].to_numpy(float),
        "class": classes.where(classes.notna(), "").to_numpy(str),
    }
