"""The kernels compiled for the CPU: a plain C library beside this module, called through ctypes.

It knows neither Python nor PyTorch, so one file serves all versions of both. ctypes releases the GIL while it runs.
Results do not depend on the number of threads nor on the processor's instruction set.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from napari_mrcnn3d._ops import _torch
from napari_mrcnn3d._ops._torch import RoIGrid

_LIBRARY = Path(__file__).with_name("_ops_cpu" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_SIGNATURE = b"napari-mrcnn3d ops"
_ABI = 1

_MOST_ALONG_AN_AXIS = 1 << 30
"""Cells, bins, samples per bin: the library counts them with 32 bits."""

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""What RoIAlign reads as it is (Type in cpu_kernels.h); from the last it gives float32."""

_PROCESS = os.getpid()
"""Whose threads torch's pool has: a fork does not copy them, and its child would wait for them forever."""


class _RoIAlignCall(ctypes.Structure):
    """Mirrors RoIAlignCall of cpu_kernels.h, as the classes below mirror theirs."""

    _fields_ = (
        ("input", c_void_p),
        ("boxes", c_void_p),
        ("batch_index", c_void_p),
        ("output", c_void_p),
        ("rois", c_int64),
        ("entries", c_int64),
        ("channels", c_int64),
        ("extent", c_int64 * 3),
        ("bins", c_int64 * 3),
        ("samples", c_int64),
        ("scale", c_double * 3),
        ("type", c_int64),
        ("is_transposed", c_int64),
        ("threads", c_int64),
    )


class _NMSCall(ctypes.Structure):
    _fields_ = (
        ("boxes", c_void_p),
        ("groups", c_void_p),
        ("kept", c_void_p),
        ("count", c_int64),
        ("max_keep", c_int64),
        ("threshold", c_double),
        ("threads", c_int64),
    )


class _PasteCall(ctypes.Structure):
    _fields_ = (
        ("masks", c_void_p),
        ("boxes", c_void_p),
        ("labels", c_void_p),
        ("volume", c_void_p),
        ("count", c_int64),
        ("cells", c_int64 * 3),
        ("extent", c_int64 * 3),
        ("threshold", c_double),
        ("threads", c_int64),
    )


# --- the library


class _UnusableError(Exception):
    """The library is missing or not ours; says so in a sentence."""


@cache
def _load(path: Path) -> ctypes.CDLL:
    """The library, once it is known to be ours, with torch's threads at its disposal."""
    if not path.exists():
        raise _UnusableError(f"{path.name} is missing, the package was installed without a C++ compiler.")
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error).replace(str(path), path.name)
        raise _UnusableError(f"{path.name} cannot be loaded ({reason}).") from error
    try:
        library.mrcnn3d_signature.restype = library.mrcnn3d_instruction_set.restype = ctypes.c_char_p
        signature, abi = library.mrcnn3d_signature(), library.mrcnn3d_abi()
    except AttributeError:
        signature = abi = None
    if signature != _SIGNATURE:
        raise _UnusableError(f"{path.name} is another library than that of napari-mrcnn3d.")
    if abi != _ABI:
        raise _UnusableError(f"{path.name} has interface {abi} instead of {_ABI}, install the package again.")
    library.mrcnn3d_use_pool(c_void_p(_torch_pool()))
    return library


def _check_whole(path: Path) -> None:
    """Refuse (OSError) an ELF file that is cut off: Linux would load it, and end the process at the missing part."""
    with path.open("rb") as file:
        header = file.read(64)
    if header.startswith(b"\x7fELF") and len(header) == 64:
        table, entry, entries = struct.unpack_from("<40xQ10xHH", header)  # of sections, at the end of the file
        if path.stat().st_size < table + entry * entries:
            raise OSError("it is cut off")


@cache
def _torch_pool() -> int | None:
    """Address of torch's parallel loop, in the library that torch has loaded; None before PyTorch 2.10."""
    windows = sys.platform == "win32"  # elsewhere a search goes on in the libraries that a library needs
    holder = Path(torch.__file__).parent / "lib" / "torch_cpu.dll" if windows else torch._C.__file__
    try:
        function = ctypes.CDLL(str(holder)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, c_void_p).value


def _run(function: str, *arguments: Any) -> None:
    """Call a function of the library that returns 0 unless memory runs out."""
    if getattr(_load(_LIBRARY), function)(*arguments):
        raise MemoryError(f"there is not enough memory for the temporaries of {function.removeprefix('mrcnn3d_')}")


def _threads() -> int:
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def problem(device: torch.device) -> str | None:
    """Why these kernels cannot run on a device, in a sentence; None if they can."""
    if device.type != "cpu":
        return f"these kernels run on the CPU, not on {device.type}."
    try:
        _load(_LIBRARY)
    except _UnusableError as error:
        return str(error)
    return None


def describe(device: torch.device) -> str:
    """What computes, in words: the instruction set in use and whose threads."""
    instructions = _load(_LIBRARY).mrcnn3d_instruction_set().decode()
    whose = "its own" if _torch_pool() is None else "PyTorch's"
    return f"compiled ({_LIBRARY.name}), {instructions}, {whose} threads"


@contextmanager
def baseline() -> Iterator[None]:
    """Do without newer instruction sets inside, in all threads: for comparisons."""
    library = _load(_LIBRARY)
    library.mrcnn3d_force_baseline(1)
    try:
        yield
    finally:
        library.mrcnn3d_force_baseline(0)


# --- the kernels


def nms_sorted(boxes: Tensor, threshold: float, groups: Tensor | None, max_keep: int | None) -> Tensor:
    """Positions kept by greedy suppression of float32 boxes [N, 6] that come best first."""
    boxes = boxes.contiguous()
    groups = None if groups is None else groups.contiguous()
    most = len(boxes) if max_keep is None else min(max_keep, len(boxes))
    kept, count = boxes.new_empty(most, dtype=torch.int64), c_int64()
    call = _NMSCall(
        boxes=boxes.data_ptr(),
        groups=None if groups is None else groups.data_ptr(),
        kept=kept.data_ptr(),
        count=len(boxes),
        max_keep=most,
        threshold=threshold,
        threads=_threads(),
    )
    _run("mrcnn3d_nms", byref(call), byref(count))
    return kept[: count.value].clone()


def roi_align(features: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid) -> Tensor:
    """RoIAlign [K, C, PD, PH, PW] in channels_last_3d, in the features' dtype."""
    shape = tuple(features.shape)
    if not _countable(grid, shape):
        return _torch.roi_align(features, boxes, batch_index, grid)
    out = boxes.new_empty((len(boxes), *grid.size, shape[1])).permute(0, 4, 1, 2, 3)
    _run_roi_align(features, boxes, batch_index, grid, shape, out)
    return out.to(features.dtype)


def roi_align_transposed(
    values: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid, shape: tuple[int, ...]
) -> Tensor:
    """Values [K, C, PD, PH, PW] spread over features of this shape: the transpose of :func:`roi_align`."""
    if not _countable(grid, shape):
        return _torch.roi_align_transposed(values, boxes, batch_index, grid, shape)
    batch, channels, *extent = shape
    out = boxes.new_empty((batch, *extent, channels)).permute(0, 4, 1, 2, 3)
    _run_roi_align(values, boxes, batch_index, grid, shape, out, transposed=True)
    return out.to(values.dtype)


def _countable(grid: RoIGrid, shape: tuple[int, ...]) -> bool:
    """Whether the library can count what lies along the axes."""
    return all(1 <= count <= _MOST_ALONG_AN_AXIS for count in (*shape[2:], *grid.size, grid.samples))


def _run_roi_align(
    source: Tensor,
    boxes: Tensor,
    batch_index: Tensor,
    grid: RoIGrid,
    shape: tuple[int, ...],
    out: Tensor,
    *,
    transposed: bool = False,
) -> None:
    """Write RoIAlign of features, or its transpose of values, into ``out``."""
    if source.dtype not in _TYPES:
        source = source.to(out.dtype)
    source = source.contiguous(memory_format=torch.channels_last_3d)
    boxes, batch_index = boxes.contiguous(), batch_index.contiguous()
    call = _RoIAlignCall(
        input=source.data_ptr(),
        boxes=boxes.data_ptr(),
        batch_index=batch_index.data_ptr(),
        output=out.data_ptr(),
        rois=len(boxes),
        entries=shape[0],
        channels=shape[1],
        extent=shape[2:],
        bins=grid.size,
        samples=grid.samples,
        scale=grid.scale,
        type=_TYPES[source.dtype],
        is_transposed=transposed,
        threads=_threads(),
    )
    _run("mrcnn3d_roi_align", byref(call))


def paste_masks(masks: Tensor, boxes: Tensor, labels: Tensor, shape: tuple[int, int, int], threshold: float) -> Tensor:
    """Label volume of masks [K, mz, my, mx] that come best first: the first to claim a voxel keeps it."""
    if masks.dtype != torch.float32:
        return _torch.paste_masks(masks, boxes, labels, shape, threshold)
    masks, boxes, labels = masks.contiguous(), boxes.double().contiguous(), labels.contiguous()
    volume = masks.new_empty(shape, dtype=torch.int32)
    call = _PasteCall(
        masks=masks.data_ptr(),
        boxes=boxes.data_ptr(),
        labels=labels.data_ptr(),
        volume=volume.data_ptr(),
        count=len(masks),
        cells=tuple(masks.shape[1:]),
        extent=shape,
        threshold=threshold,
        threads=_threads(),
    )
    _run("mrcnn3d_paste_masks", byref(call))
    return volume
