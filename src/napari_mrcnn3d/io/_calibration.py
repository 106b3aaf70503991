"""Voxel sizes as TIFF files state them: ImageJ's description and OME-XML."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

import tifffile

from napari_mrcnn3d.structures import VoxelSize

__all__ = ["declares_z", "imagej_metadata", "ome_metadata", "voxel_size"]

_MICROMETRES = {
    "pm": 1e-6,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "nanometre": 1e-3,
    "um": 1.0,
    "\N{MICRO SIGN}m": 1.0,
    "\N{GREEK SMALL LETTER MU}m": 1.0,
    "\\u00b5m": 1.0,  # ImageJ's own spelling of the micro sign, where nobody decoded it
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "mm": 1e3,
    "millimeter": 1e3,
    "millimetre": 1e3,
    "cm": 1e4,
    "inch": 25400.0,
    "m": 1e6,
}
_OME_DEFAULT_UNIT = "\N{MICRO SIGN}m"


def imagej_metadata(voxel_size: VoxelSize | None) -> dict[str, Any]:
    """Keywords that make ``tifffile.imwrite`` store a voxel size as ImageJ does.

    An unknown size is stored as ImageJ's own "1 pixel", so that a stack of one slice still declares its z axis.
    """
    size = voxel_size or VoxelSize(1.0, 1.0, 1.0)
    metadata = {"axes": "ZYX", "spacing": size.z, "unit": "um" if voxel_size else "pixel"}
    return {"resolution": (1 / size.x, 1 / size.y), "metadata": metadata}


def ome_metadata(voxel_size: VoxelSize | None) -> dict[str, Any]:
    """Keywords that make ``tifffile.imwrite`` store a voxel size as OME-XML; unknown is "1 pixel" here, too."""
    size = voxel_size or VoxelSize(1.0, 1.0, 1.0)
    metadata: dict[str, Any] = {"axes": "ZYX"}
    for axis, length in zip("ZYX", size, strict=True):
        metadata[f"PhysicalSize{axis}"] = length
        metadata[f"PhysicalSize{axis}Unit"] = _OME_DEFAULT_UNIT if voxel_size else "pixel"
    return {"metadata": metadata}


def voxel_size(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> VoxelSize | None:
    """Voxel size of a series in µm, or None where the file gives none or an impossible one."""
    if series.kind == "ome":
        return _from_ome(_ome_pixels(tif, series))
    if series.kind == "imagej":
        return _from_imagej(tif.imagej_metadata or {}, tif.pages.first.tags)
    return None


def declares_z(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> bool:
    """Whether the file says that there is a z axis, even if it is one slice long."""
    if series.kind == "ome":  # SizeZ is always there, also in flat images
        return "PhysicalSizeZ" in _ome_pixels(tif, series)
    if series.kind == "imagej":
        return not {"slices", "spacing"}.isdisjoint(tif.imagej_metadata or {})
    return "Z" in series.get_axes(squeeze=False)


def _from_imagej(metadata: Mapping[str, Any], tags: tifffile.TiffTags) -> VoxelSize | None:
    """Read spacing, unit and pixels per unit; ImageJ leaves out a spacing that is exactly 1."""
    unit = _micrometres(metadata.get("unit"))
    resolution = [tags.valueof(name) for name in ("YResolution", "XResolution")]
    if unit is None or not all(isinstance(value, tuple) and len(value) == 2 and value[0] for value in resolution):
        return None
    in_plane = [unit * pixel / units for units, pixel in resolution]
    return _plausible(unit * _number(metadata.get("spacing", 1.0)), *in_plane)


def _from_ome(pixels: Mapping[str, str]) -> VoxelSize | None:
    lengths = []
    for axis in "ZYX":
        unit = _micrometres(pixels.get(f"PhysicalSize{axis}Unit", _OME_DEFAULT_UNIT))
        lengths.append(math.nan if unit is None else unit * _number(pixels.get(f"PhysicalSize{axis}")))
    return _plausible(*lengths)


def _ome_pixels(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Mapping[str, str]:
    """Attributes of the Pixels element that belongs to a series."""
    try:
        root = ET.fromstring(tif.ome_metadata or "")
    except ET.ParseError:
        return {}
    pixels = root.findall("{*}Image/{*}Pixels")
    index = tif.series.index(series)
    return pixels[index].attrib if index < len(pixels) else {}


def _micrometres(unit: object) -> float | None:
    """How many µm a named unit is; None for pixels and other names that are no lengths."""
    return _MICROMETRES.get(str(unit).strip().lower())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _plausible(z: float, y: float, x: float) -> VoxelSize | None:
    return VoxelSize(z, y, x) if all(math.isfinite(side) and side > 0 for side in (z, y, x)) else None
