"""From kernel text to launched kernels: NVRTC through NVIDIA's cuda.core, for the very GPU, kept on disk.

The only module that imports cuda.*; :mod:`napari_mrcnn3d._ops._cuda` imports it once a CUDA device is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import threading
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import nvrtc
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions
from cuda.core import launch as enqueue
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

_log = logging.getLogger(__name__)

_CACHE_BYTES = 64 << 20
"""What all kept versions together may take; the least recently used goes first. One takes half a megabyte."""

_DIGEST_BYTES = 32

_lock = threading.RLock()
_kernels: dict[tuple[int, str], Kernel] = {}
_loaded: dict[int, ObjectCode] = {}


class UnusableError(RuntimeError):
    """Why the kernels cannot be compiled or loaded here, in one sentence."""


# ---------------------------------------------------------------------------------------------- compiling


def source() -> str:
    """Text of all kernels, with what it includes in place."""
    folder = files("napari_mrcnn3d._ops") / "csrc"
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        whole = (folder / name).read_text(encoding="utf-8")
        return re.sub(r'#include "(.+)"\n', lambda found: text(found[1]), whole)

    return text("cuda_kernels.cuh")


def version() -> tuple[int, int]:
    """Version of the NVRTC that is found (UnusableError if none is)."""
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # what cuda.pathfinder raises where it finds no library
        raise UnusableError("NVIDIA's run-time compiler NVRTC is not installed") from error
    _check(status)
    return int(major), int(minor)


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: the GPU itself, or the nearest older one of its generation that NVRTC knows."""
    major, minor = capability
    status, known = nvrtc.nvrtcGetSupportedArchs()
    _check(status)
    fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
    if not fitting:
        raise UnusableError(
            f"NVRTC {'.'.join(map(str, version()))} cannot compile for this GPU, of compute capability {major}.{minor}"
        )
    return f"sm_{max(fitting)}"


def options(target: str) -> ProgramOptions:
    """How the text is meant: without contraction, so that kernels sample and suppress exactly as on other devices."""
    return ProgramOptions(name="napari_mrcnn3d", arch=target, std="c++17", fma=False)


def binary(target: str) -> bytes:
    """Machine code of all kernels for an architecture such as ``sm_90``, from the cache if it is there."""
    text, settings = source(), options(target)
    kept = _open_cache()
    key = make_program_cache_key(code=text, code_type="c++", options=settings, target_type="cubin")
    image = _read(kept, key)
    if image is None:
        image = _compile(text, settings)
        _write(kept, key, image)
    return image


def _compile(text: str, settings: ProgramOptions) -> bytes:
    program = Program(text, "c++", options=settings)
    try:
        return bytes(program.compile("cubin").code)
    finally:
        program.close()


def _check(status: nvrtc.nvrtcResult) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnusableError(f"NVIDIA's run-time compiler NVRTC failed: {status.name}")


# ---------------------------------------------------------------------------------------------- keeping


def cache_folder() -> Path:
    """Where compiled kernels are kept: NAPARI_MRCNN3D_CACHE, or a folder of ours in the user's cache folder."""
    chosen = os.environ.get("NAPARI_MRCNN3D_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "napari-mrcnn3d" / "kernels"


def _open_cache() -> FileStreamProgramCache | None:
    """Cache that several processes may use at once; None where its folder cannot be made."""
    try:
        return FileStreamProgramCache(cache_folder(), max_size_bytes=_CACHE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _report_unkept(str(error))
        return None


def _read(kept: FileStreamProgramCache | None, key: bytes) -> bytes | None:
    """What was kept, if its digest in front says that it is whole."""
    try:
        entry: bytes | None = None if kept is None else kept.get(key)
    except OSError as error:
        _report_unkept(str(error))
        return None
    if entry is None or hashlib.sha256(entry[_DIGEST_BYTES:]).digest() != entry[:_DIGEST_BYTES]:
        return None
    return entry[_DIGEST_BYTES:]


def _write(kept: FileStreamProgramCache | None, key: bytes, image: bytes) -> None:
    if kept is None:
        return
    try:
        kept[key] = hashlib.sha256(image).digest() + image
    except OSError as error:
        _report_unkept(str(error))


@cache
def _report_unkept(reason: str) -> None:
    """Say once that the next start will compile again."""
    _log.warning("Compiled CUDA kernels cannot be kept, so each start compiles them again: %s", reason)


# ---------------------------------------------------------------------------------------------- launching


class _Stream:
    """A stream of PyTorch's, as cuda.core wants to be given it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def load(index: int) -> ObjectCode:
    """All kernels for a device, compiled and loaded once (UnusableError if that cannot be)."""
    with _lock:
        if index not in _loaded:
            _loaded[index] = _load(index)
        return _loaded[index]


def _load(index: int) -> ObjectCode:
    try:
        Device(index).set_current()
        target = architecture(torch.cuda.get_device_capability(index))
        loaded = ObjectCode.from_cubin(binary(target), name="napari_mrcnn3d")
        loaded.get_kernel("nms_keep")  # only now does the driver get it
    except UnusableError:
        raise
    except Exception as error:  # cuda.core does not export what it raises
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UnusableError(f"The CUDA kernels could not be compiled or loaded ({reason})") from error
    return loaded


def launch(
    index: int, name: str, grid: tuple[int, int], threads: int, shared: int, arguments: list[int | float]
) -> None:
    """Enqueue a kernel on PyTorch's current stream of a device.

    Parameters
    ----------
    index : int
        Of the device.
    name : str
    grid : (int, int)
        Blocks along x and y.
    threads : int
        Per block.
    shared : int
        Bytes of dynamic shared memory per block.
    arguments : list of int or float
        Addresses and integers, which the kernel takes as 64 bits, and doubles.
    """
    with torch.cuda.device(index):
        # The guard only tells PyTorch; a thread of autograd's may have no context of the driver's yet.
        Device(index).set_current()
        kernel = _kernels.get((index, name))
        if kernel is None:
            kernel = _kernels[index, name] = load(index).get_kernel(name)
        config = LaunchConfig(grid=grid, block=threads, shmem_size=shared)
        stream: Any = _Stream(torch.cuda.current_stream(index).cuda_stream)
        enqueue(stream, config, kernel, *arguments)
