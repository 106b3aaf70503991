"""Opens saved candidates (``.mrcnn3d``) as labels.

TIFF files are left to napari's own reader: a second reader for them would make napari ask, for every file, which one to
use. What that reader drops, the voxel size, is read from the layer's file when an image is chosen in a widget
(:func:`napari_mrcnn3d.widgets._layers.calibration_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.io.candidates import SUFFIX, load_candidates
from napari_mrcnn3d.widgets._session import METADATA_KEY, centroids_of, feature_table

__all__ = ["get_reader", "read_candidates"]

LayerData = tuple[Any, dict[str, Any], str]
ReadFunction = Callable[[str | Sequence[str]], list[LayerData]]


def get_reader(path: str | Sequence[str]) -> ReadFunction | None:
    """Offer to open candidates files; None for anything else.

    Parameters
    ----------
    path : str or sequence of str
    """
    paths = [path] if isinstance(path, str) else list(path)
    return read_candidates if paths and all(Path(one).suffix.lower() == SUFFIX for one in paths) else None


def read_candidates(path: str | Sequence[str]) -> list[LayerData]:
    """Open candidates files as label layers, with the default selection.

    Parameters
    ----------
    path : str or sequence of str

    Returns
    -------
    list of (data, attributes, layer type)

    Raises
    ------
    UserError
        If a file is no candidates file.
    """
    return [_label_layer(Path(one)) for one in ([path] if isinstance(path, str) else path)]


def _label_layer(path: Path) -> LayerData:
    footprints = Footprints.of(load_candidates(path))
    config = SelectConfig()
    instances = select(footprints, config)
    attributes: dict[str, Any] = {
        "name": path.stem,
        "features": feature_table(instances, centroids_of(footprints)[instances.index]),
        "metadata": {METADATA_KEY: {"candidates": path.name, "config": {"select": config.model_dump()}}},
    }
    if size := footprints.candidates.voxel_size:
        attributes |= {"scale": tuple(size), "units": ("micrometer",) * 3}
    return paint(footprints, instances), attributes, "labels"
