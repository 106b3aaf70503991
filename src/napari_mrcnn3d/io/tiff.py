"""Image and label stacks as TIFF, with their voxel size.

Readable is what microscopes, Fiji, Python and QuPath write: any number type, byte order, tiling and compression. What
is not one grey stack (z, y, x) is refused with one sentence.

A stack of one slice is told from a flat image by what the file says. A stack declares its z axis, be it one slice long:
by an axis of its own (an array of shape 1, y, x saved from Python), by a slice count or spacing (ImageJ) or by a z
size (OME). A file that declares none is a flat image, and flat images are refused.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from napari_mrcnn3d._files import atomic_write, check_memory, input_file, read_failure, readable_bytes
from napari_mrcnn3d.io import _calibration
from napari_mrcnn3d.structures import ArrayLike, UserError, Volume, VoxelSize

__all__ = ["read_image", "read_labels", "write_image", "write_labels"]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF files begin."""
_IMAGEJ_DTYPES = "BHf"
_OME_DTYPES = "bBhHiIfd"
_CLASSIC_LIMIT = 2**32 - 2**25
"""Bytes that classic TIFF holds, with room for the directory; ImageJ reads no BigTIFF."""
_LARGEST_RATIO = {"NONE": 1, "PACKBITS": 64, "LZW": 4096, "ADOBE_DEFLATE": 1032, "DEFLATE": 1032}
"""How many times its stored size a block can have, by the construction of its compression."""
_REFUSED_AXES = {
    "T": ("time points", "save one of them as a z stack, in Fiji with Image > Duplicate"),
    "C": (
        "channels",
        "save one of them as a z stack, in Fiji with Image > Color > Split Channels "
        "(or swap channels and slices in Image > Properties if they are slices)",
    ),
    "S": (
        "colours",
        "save one of them, or the grey values, as a z stack, in Fiji with Image > Type > 8-bit "
        "(if they are slices, save them again as grey)",
    ),
}


def read_image(path: str | Path) -> Volume:
    """Read a grey z stack.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Volume
        ``data`` is a numpy array (z, y, x) in the machine's byte order; booleans become uint8. ``voxel_size`` is None
        where the file gives none, or an impossible one.

    Raises
    ------
    UserError
        If the file is no TIFF, damaged, too large for the memory, not one grey stack, or has complex, infinite or
        missing (NaN) values.
    """
    path = Path(path)
    data, voxel_size = _read_stack(path)
    _refuse_non_finite(data, path)
    return Volume(data.view(np.uint8) if data.dtype.kind == "b" else data, voxel_size, path.name)


def read_labels(path: str | Path) -> Volume:
    """Read a label stack: 0 is background, every object has its own whole number.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Volume
        ``data`` is a numpy array (z, y, x): uint16 if the largest label allows it, else int32, else int64.

    Raises
    ------
    UserError
        As :func:`read_image`, and if a label is negative or not a whole number.
    """
    path = Path(path)
    data, voxel_size = _read_stack(path)
    _refuse_non_finite(data, path)
    if data.dtype.kind == "f" and (fractional := data != np.rint(data)).any():
        raise UserError(
            f"{path} has labels that are no whole numbers, for example {data[fractional][0]:g}: "
            "give the label image, not an image of intensities or probabilities."
        )
    lowest, largest = int(data.min()), int(data.max())
    if lowest < 0:
        raise UserError(f"{path} has the negative label {lowest}: renumber, 0 is background and objects are above.")
    if largest > np.iinfo(np.int64).max:
        raise UserError(f"{path} has the label {largest}, which is too large: renumber the objects from 1.")
    return Volume(data.astype(_label_dtype(largest), copy=False), voxel_size, path.name)


def write_labels(path: str | Path, labels: ArrayLike, voxel_size: VoxelSize | None) -> None:
    """Write a label stack: uint16 with ImageJ calibration, or uint32 OME-TIFF above label 65,535, which ImageJ lacks.

    Parameters
    ----------
    path : path-like
        Replaced as a whole or not touched.
    labels : array-like of int, shape (z, y, x)
    voxel_size : VoxelSize or None
        In µm.

    Raises
    ------
    UserError
        If the file cannot be written.
    ValueError
        If the labels are no 3D array of whole numbers from 0 to 2**32 - 1.
    """
    data = np.asarray(labels)
    if data.dtype.kind not in "biu":
        raise ValueError(f"labels must be integers, got {data.dtype}")
    lowest, largest = (int(data.min()), int(data.max())) if data.size else (0, 0)
    if lowest < 0 or largest > np.iinfo(np.uint32).max:
        raise ValueError(f"labels must lie in 0..2**32 - 1, got {lowest}..{largest}")
    dtype = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
    _write_stack(path, data.astype(dtype, copy=False), voxel_size, compression="zlib")


def write_image(path: str | Path, image: ArrayLike, voxel_size: VoxelSize | None) -> None:
    """Write a grey stack, uncompressed: in ImageJ's format if uint8, uint16 or float32, else as OME-TIFF.

    Parameters
    ----------
    path : path-like
        Replaced as a whole or not touched.
    image : array-like, shape (z, y, x)
        Booleans are written as uint8, float16 as float32.
    voxel_size : VoxelSize or None
        In µm.

    Raises
    ------
    UserError
        If the file cannot be written.
    ValueError
        If the image is not 3D, or of a type that OME-TIFF lacks (64-bit integers, complex numbers).
    """
    data = np.asarray(image)
    data = data.astype({"?": np.uint8, "e": np.float32}.get(data.dtype.char, data.dtype), copy=False)
    if data.dtype.char not in _OME_DTYPES:
        raise ValueError(f"an image of {data.dtype} cannot be stored: convert it to uint16 or float32")
    _write_stack(path, data, voxel_size)


def _write_stack(
    path: str | Path, data: np.ndarray, voxel_size: VoxelSize | None, *, compression: str | None = None
) -> None:
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(f"only stacks (z, y, x) with voxels can be written, got shape {data.shape}")
    small = data.nbytes < _CLASSIC_LIMIT
    # (tifffile writes ImageJ files of one voxel in x as one wrong page)
    if small and data.dtype.char in _IMAGEJ_DTYPES and data.shape[2] > 1:
        options = {"imagej": True, **_calibration.imagej_metadata(voxel_size)}
        # Without a display range Fiji shows labels 1 to 100 of 16-bit stacks as black.
        options["metadata"] |= {"min": float(data.min()), "max": float(data.max())}
    else:
        options = {"ome": True, "bigtiff": not small, **_calibration.ome_metadata(voxel_size)}
    with atomic_write(path) as temporary:
        tifffile.imwrite(temporary, data, compression=compression, photometric="minisblack", **options)


def _label_dtype(largest: int) -> type[np.integer[Any]]:
    if largest <= np.iinfo(np.uint16).max:
        return np.uint16
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


def _refuse_non_finite(data: np.ndarray, path: Path) -> None:
    if data.dtype.kind != "f":
        return
    bad = sum(plane.size - int(np.isfinite(plane).sum()) for plane in data)  # plane by plane, to spare memory
    if bad:
        raise UserError(
            f"{path} has {bad} voxels (of {data.size}) that are no finite numbers (NaN or infinite): "
            "replace them, for example by 0, and save it again."
        )


def _read_stack(path: Path) -> tuple[np.ndarray, VoxelSize | None]:
    """Read data (z, y, x) in the machine's byte order, and voxel size."""
    if input_file(path, 4) not in _MAGIC:
        raise UserError(f"{path} is not a TIFF file: give a TIFF stack, or open it in Fiji and save it as TIFF.")
    with _failures_explained(path), tifffile.TiffFile(path) as tif:
        series = _only_stack(tif, path)
        _check_number_type(series, path)
        order = _axis_order(tif, series, path)
        _check_size(series, path)
        shape = series.get_shape(squeeze=False)
        data = series.asarray().reshape(shape)
        voxel_size = _calibration.voxel_size(tif, series)
    dropped = tuple(axis for axis in range(len(shape)) if axis not in order)  # all of length 1
    data = data.transpose(*dropped, *order).reshape([shape[axis] for axis in order])
    return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("=")), voxel_size


def _only_stack(tif: tifffile.TiffFile, path: Path) -> tifffile.TiffPageSeries:
    """Choose the stack; flat thumbnails and overviews may stand beside it."""
    if len(tif.series) == 1:
        return tif.series[0]
    if not tif.series:
        raise _undecodable(path)
    stacks = [series for series in tif.series if series.ndim > 2]
    if len(stacks) != 1:
        raise UserError(
            f"{path} holds {len(tif.series)} separate images (the first of shape {_by(tif.series[0].shape)}): "
            "save the wanted one as a z stack of its own."
        )
    return stacks[0]


def _check_number_type(series: tifffile.TiffPageSeries, path: Path) -> None:
    number = series.keyframe.dtype  # the series says float64 where the page says unknown
    kind = "" if number is None else number.kind
    if kind == "c":
        raise UserError(f"{path} has complex numbers ({number}): save their magnitude as a real image.")
    if kind not in tuple("biuf"):
        bits = series.keyframe.bitspersample
        raise UserError(f"{path} stores {bits} bits per voxel in an unknown way: save it as 8, 16 or 32 bits.")


def _axis_order(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> list[int]:
    """Where z, y and x are among the axes of the file; all others are one long."""
    axes, shape = _axes(tif, series), series.get_shape(squeeze=False)
    shown = [(axis, length) for axis, length in zip(axes, shape, strict=True) if length != 1 or axis in "YX"]
    found = f"axes {''.join(axis for axis, _ in shown)}, shape {_by(length for _, length in shown)}"
    if 0 in shape:
        raise UserError(f"{path} has no voxels ({found}): export it again.")
    declared = _calibration.declares_z(tif, series)
    stacked = [i for i, axis in enumerate(axes) if axis == "?" or (axis == "Z" and (declared or shape[i] > 1))]
    z = max(stacked, key=lambda i: (shape[i] > 1, axes[i] == "Z", shape[i]), default=-1)
    order = [z, axes.find("Y"), axes.find("X")]
    for axis, name in enumerate(axes):
        if shape[axis] > 1 and axis not in order:
            what, remedy = _REFUSED_AXES.get(name, ("images along a further axis", "save one z stack of them"))
            raise UserError(f"{path} has {shape[axis]} {what} ({found}): {remedy}.")
    if z < 0:
        raise UserError(f"{path} is a flat image without z axis ({found}): give the z stack that it belongs to.")
    if -1 in order:
        raise UserError(f"{path} has no y and x axes ({found}): save it as a z stack.")
    return order


def _axes(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> str:
    """Name the file's axes, ``?`` where it does not."""
    named = any("axes" in metadata for metadata in tif.shaped_metadata or ())
    if series.kind == "shaped" and not named and series.keyframe.samplesperpixel == 1:
        # tifffile guesses names by length here, and guesses wrong if y or x is one voxel long.
        return "YX".rjust(len(series.get_shape(squeeze=False)), "?")
    axes: str = series.get_axes(squeeze=False)
    return axes.replace("I", "?").replace("Q", "?")


def _check_size(series: tifffile.TiffPageSeries, path: Path) -> None:
    """Compare what the header announces with the file and with the memory, before any is taken."""
    voxels = math.prod(series.get_shape(squeeze=False))
    keyframe = series.keyframe
    packed = voxels * keyframe.bitspersample // 8 if keyframe.bitspersample else voxels * series.dtype.itemsize
    stored = packed if series.dataoffset is not None else 0
    missing = series.dataoffset is not None and series.dataoffset + packed > _file_size(keyframe)
    if series.dataoffset is None:
        for page in series.pages:
            if page is None:
                raise UserError(f"{path} keeps planes in other files that are not beside it: put them there.")
            ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
            stored += sum(page.databytecounts)
            missing |= len(ends) == 0 or min(page.databytecounts) == 0 or max(ends) > _file_size(page)
    ratio = _LARGEST_RATIO.get(tifffile.COMPRESSION(keyframe.compression).name, math.inf)
    if missing or packed > stored * ratio:
        raise UserError(
            f"{path} is damaged or cut off: it announces {readable_bytes(packed)} of image data ({_by(series.shape)} "
            f"{series.dtype}) and is {readable_bytes(_file_size(keyframe))} long; copy or export it again."
        )
    check_memory(voxels * series.dtype.itemsize, path)


def _file_size(page: tifffile.TiffPage | tifffile.TiffFrame) -> int:
    return int(page.parent.filehandle.size)


def _by(lengths: Iterable[int]) -> str:
    return " x ".join(map(str, lengths))


class _Damage(logging.Handler):
    """What tifffile reports of a damaged file and then works around, by giving fewer planes or zeros."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.thread = threading.get_ident()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.found.append(record.getMessage())

    def check(self) -> None:
        """Raise what was found."""
        if self.found:
            raise tifffile.TiffFileError(self.found[0])


@contextmanager
def _failures_explained(path: Path) -> Iterator[None]:
    """Turn whatever tifffile and the decoders raise or log at a bad file into one sentence."""
    log, damage = logging.getLogger("tifffile"), _Damage()
    log.addHandler(damage)
    try:
        yield
        damage.check()
    except MemoryError as error:
        raise UserError(f"{path} does not fit into the memory: cut the image into smaller files.") from error
    except OSError as error:
        raise UserError(read_failure(path, error)) from error
    except UserError:
        if not damage.found:
            raise
        # What follows from damage (one plane left: a flat image) is not the user's mistake.
        raise _undecodable(path) from tifffile.TiffFileError(damage.found[0])
    except Exception as error:
        # A bad file can make the parser and two dozen decoders fail in any way.
        raise _undecodable(path) from error
    finally:
        log.removeHandler(damage)


def _undecodable(path: Path) -> UserError:
    return UserError(
        f"{path} ({readable_bytes(path.stat().st_size)}) is damaged, cut off or packed in an unknown way: "
        "copy or export it again, or save it anew in Fiji."
    )
