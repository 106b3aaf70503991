"""Which kernels answer for a device: compiled ones where they can, plain PyTorch everywhere else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from napari_mrcnn3d._ops import _cpu, _cuda, _torch

logger = logging.getLogger(__name__)

_COMPILED = {"cpu": _cpu, "cuda": _cuda}
_left_out = os.environ.get("NAPARI_MRCNN3D_OPS") == "torch"


def kernels(device: torch.device) -> ModuleType:
    """Module with the kernels for tensors on a device.

    Each of ``_torch``, ``_cpu`` and ``_cuda`` has ``nms_sorted``, ``roi_align``, ``roi_align_transposed`` and
    ``paste_masks``. The environment variable ``NAPARI_MRCNN3D_OPS=torch`` leaves the compiled ones out.
    """
    return _torch if _left_out else _chosen(device)


@cache
def _chosen(device: torch.device) -> ModuleType:
    """Compiled kernels if they run on this device; else PyTorch's, with one warning that says why."""
    compiled = _COMPILED.get(device.type)
    if compiled is None:
        return _torch
    problem = compiled.problem(device)
    if problem is None:
        return compiled
    logger.warning(
        "The compiled operations are not used: %s Computing takes longer, the results are the same.", problem
    )
    return _torch


def describe(device: torch.device) -> str:
    """What computes on a device, in words; if it is plain PyTorch, why."""
    used = kernels(device)
    compiled = _COMPILED.get(device.type)
    if used is not _torch or compiled is None:
        return str(used.describe(device))
    why = compiled.problem(device) or "they were left out on purpose."
    return f"{_torch.describe(device)}, none compiled: {why}"


@contextmanager
def plain_torch() -> Iterator[None]:
    """Leave the compiled kernels out inside, in all threads: for comparisons."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before
