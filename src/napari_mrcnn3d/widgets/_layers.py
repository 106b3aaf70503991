"""Between napari's layers and the core: what a layer says about its image, and how results lie over it.

Everything here runs in the main thread; jobs get the plain values this module returns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pint
import tifffile
from napari.layers import Image, Labels, Layer

from napari_mrcnn3d.io import _calibration
from napari_mrcnn3d.structures import UserError, Volume, VoxelSize

__all__ = [
    "Calibration",
    "box_edges",
    "box_outlines",
    "calibrate",
    "calibration",
    "calibration_of",
    "frame_count",
    "geometry_of",
    "is_uncalibrated",
    "volume_of",
]

logger = logging.getLogger(__name__)

_CORNERS = np.array(list(product((0, 1), repeat=3)))
_EDGES = np.array([pair for pair in combinations(range(8), 2) if np.abs(np.subtract(*_CORNERS[list(pair)])).sum() == 1])
_TIFF_SUFFIXES = {".tif", ".tiff"}


@dataclass(frozen=True)
class Calibration:
    """What is known about a layer's voxels.

    Attributes
    ----------
    voxel_size : VoxelSize or None
    origin : {"layer", "file", "guessed", "unknown"}
        Where it comes from: the layer's scale and units, the file that the layer was opened from, or the layer's scale
        without a unit.
    """

    voxel_size: VoxelSize | None
    origin: Literal["layer", "file", "guessed", "unknown"]


def is_uncalibrated(layer: Layer) -> bool:
    """Whether a layer of three or more axes has no voxel size of its own: a scale of 1, in pixels."""
    return layer.ndim >= 3 and calibration(layer.scale, layer.units).origin == "unknown"


def calibration(scale: Sequence[float], units: Sequence[Any]) -> Calibration:
    """Voxel size from a layer's scale and units, of which the last three axes count.

    Parameters
    ----------
    scale : sequence of float
    units : sequence of pint.Unit or str
    """
    steps = [abs(float(step)) for step in scale[-3:]]
    if len(steps) < 3 or not all(math.isfinite(step) and step > 0 for step in steps):
        return Calibration(None, "unknown")
    lengths = [length for unit in units[-3:] if (length := _micrometres(unit)) is not None]
    if len(lengths) == 3:
        return Calibration(VoxelSize.of(step * length for step, length in zip(steps, lengths, strict=True)), "layer")
    return Calibration(None, "unknown") if np.allclose(steps, 1) else Calibration(VoxelSize.of(steps), "guessed")


def calibration_of(layer: Image) -> Calibration:
    """Voxel size of an image layer, or of the TIFF file it was opened from.

    napari's own reader drops the calibration of TIFF files, so the file is asked when the layer knows nothing.
    """
    known = calibration(layer.scale, layer.units)
    in_file = _tiff_facts(layer)[0] if layer.ndim >= 3 else None
    if in_file and (known.voxel_size is None or np.allclose(known.voxel_size, in_file)):
        return Calibration(in_file, "file")
    return known


def calibrate(layers: Iterable[Layer], like: Image, size: VoxelSize) -> None:
    """Give an image this scale in µm, and with it every uncalibrated layer that lies over it.

    Those are images and labels of its extent, and all points, shapes and vectors: they stay in place over the image,
    and napari keeps drawing everything in one unit.
    """
    for layer in [like, *(other for other in layers if other != like and _lies_over(other, like))]:
        ratio = np.asarray(size) / layer.scale[-3:]
        layer.translate = [*layer.translate[:-3], *(layer.translate[-3:] * ratio)]
        layer.scale = [*layer.scale[:-3], *size]
        layer.units = [*(str(unit) for unit in layer.units[:-3]), *["micrometer"] * 3]


def frame_count(layer: Image) -> int | None:
    """Count the frames of a series (t, z, y, x); None for a single stack."""
    return int(_level(layer).shape[0]) if _level(layer).ndim == 4 and not layer.rgb else None


def volume_of(layer: Image, voxel_size: VoxelSize | None, *, frame: int = 0) -> Volume:
    """Take the stack to work on, still unread if the layer is lazy.

    Parameters
    ----------
    layer : napari.layers.Image
        A stack (z, y, x) or a series (t, z, y, x); of a multiscale image the full resolution is taken.
    voxel_size : VoxelSize or None
        In µm.
    frame : int
        Position along the first axis of a series.

    Raises
    ------
    UserError
        If the layer is no single-channel stack.
    """
    data = _level(layer)
    shape = " x ".join(map(str, data.shape))
    if layer.rgb:
        raise UserError(
            f"“{layer.name}” is a colour (RGB) image: right-click it in the layer list, choose Split RGB, and take the "
            "channel that shows the cells."
        )
    if data.ndim < 3:
        raise UserError(f"“{layer.name}” is a flat image ({shape}): a stack of slices (z, y, x) is needed.")
    axes = _tiff_facts(layer)[1] or "".join(label[:1].upper() for label in layer.axis_labels)
    if data.ndim > 4 or "C" in axes:
        raise UserError(
            f"“{layer.name}” has channels or too many axes ({shape}): right-click it in the layer list, choose Split "
            "Stack, and take the channel that shows the cells."
        )
    if data.ndim == 3 and "T" in axes:
        raise UserError(
            f"“{layer.name}” is a series of flat images, not a stack: if its frames are really slices, save it so (in "
            "Fiji: Image > Properties) and open it again."
        )
    return Volume(data if data.ndim == 3 else data[frame], voxel_size, layer.name)


def geometry_of(layer: Image, *, frame: int = 0) -> dict[str, Any]:
    """Where a result over this layer lies: arguments for a new layer of the same number of axes.

    Of a series, the result is one frame long and shifted to its frame.
    """
    translate = np.array(layer.translate, float)
    if frame_count(layer) is not None:
        translate[0] += frame * layer.scale[0]
    return {
        "scale": layer.scale,
        "translate": translate,
        "rotate": layer.rotate,
        "shear": layer.shear,
        "affine": layer.affine,
        "units": layer.units,
        "axis_labels": layer.axis_labels,
    }


def box_edges(boxes: np.ndarray, axes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Draw the twelve edges of every box, for a Vectors layer.

    Parameters
    ----------
    boxes : float[N, 6]
        z1, y1, x1, z2, y2, x2 in voxels, half-open.
    axes : int
        Axes of the layer; those before z are 0.

    Returns
    -------
    vectors : float32[12 N, 2, axes]
        Start and direction. napari puts voxel centres on whole numbers, so everything lies half a voxel lower.
    owner : int64[12 N]
        The box that each edge belongs to.
    """
    ends = np.asarray(boxes, np.float32).reshape(-1, 2, 3) - np.float32(0.5)
    corners = ends[:, _CORNERS, np.arange(3)]
    start, stop = corners[:, _EDGES[:, 0]].reshape(-1, 3), corners[:, _EDGES[:, 1]].reshape(-1, 3)
    return _vectors(start, stop, axes), np.repeat(np.arange(len(ends)), len(_EDGES))


def box_outlines(boxes: np.ndarray, along: int, axes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Draw a rectangle round every box in every slice that it reaches: what a flat view needs.

    The twelve edges of a box are seen in its first and last slice only.

    Parameters
    ----------
    boxes : float[N, 6]
        As for :func:`box_edges`.
    along : {0, 1, 2}
        The axis that is sliced.
    axes : int
        Axes of the layer; those before z are 0.

    Returns
    -------
    vectors : float32[M, 2, axes]
    owner : int64[M]
        The box that each line belongs to; four lines per box and slice.
    """
    ends = np.asarray(boxes, np.float32).reshape(-1, 2, 3) - np.float32(0.5)
    slices = np.ceil(ends[:, :, along]).astype(np.int64)
    counts = np.maximum(slices[:, 1] - slices[:, 0], 0)
    owner = np.repeat(np.arange(len(ends)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    corners = ends[owner][:, _ring(along), np.arange(3)]
    corners[:, :, along] = (slices[owner, 0] + within)[:, None]
    start, stop = corners.reshape(-1, 3), np.roll(corners, -1, axis=1).reshape(-1, 3)
    return _vectors(start, stop, axes), np.repeat(owner, 4)


def _ring(along: int) -> np.ndarray:
    """Which end (0 or 1) of each axis the four corners round an axis take, in turn."""
    first, second = (axis for axis in range(3) if axis != along)
    ring = np.zeros((4, 3), np.int64)
    ring[:, first], ring[:, second] = (0, 1, 1, 0), (0, 0, 1, 1)
    return ring


def _vectors(start: np.ndarray, stop: np.ndarray, axes: int) -> np.ndarray:
    vectors = np.zeros((len(start), 2, axes), np.float32)
    vectors[:, 0, -3:] = start
    vectors[:, 1, -3:] = stop - start
    return vectors


def _level(layer: Layer) -> Any:
    """Return the array of the layer, at full resolution."""
    return layer.data[0] if layer.multiscale else layer.data


def _lies_over(layer: Layer, image: Image) -> bool:
    """Whether a layer without a voxel size was made in the voxels of this image."""
    if not is_uncalibrated(layer):
        return False
    return not isinstance(layer, (Image, Labels)) or _level(layer).shape[-3:] == _level(image).shape[-3:]


def _micrometres(unit: Any) -> float | None:
    """Length of one unit in µm, None for pixels and whatever else is no length."""
    quantity = pint.get_application_registry().Quantity(1, unit)
    return float(quantity.to("micrometer").magnitude) if quantity.check("[length]") else None


def _tiff_facts(layer: Image) -> tuple[VoxelSize | None, str]:
    """Voxel size and axes that the layer's TIFF file states; nothing where it is no longer the layer's source."""
    path = Path(layer.source.path or "")
    if path.suffix.lower() not in _TIFF_SUFFIXES or not path.is_file():
        return None, ""
    try:
        with tifffile.TiffFile(path) as tif:
            series = tif.series[0]
            if series.shape != _level(layer).shape:
                return None, ""
            return _calibration.voxel_size(tif, series), series.axes
    except (OSError, ValueError, IndexError, tifffile.TiffFileError) as error:
        logger.info("The calibration of %s could not be read: %s", path, error)
        return None, ""
