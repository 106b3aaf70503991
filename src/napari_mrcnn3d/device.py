"""Where and how precisely to compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

from napari_mrcnn3d.structures import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["autocast", "choose_device", "free_memory", "is_out_of_memory"]

# What torch says, in lower case: of graphics cards, of the processor's memory on Linux and macOS, and on Windows.
_MEMORY_IS_FULL = ("out of memory", "can't allocate memory", "not enough memory")


def choose_device(name: str = "auto") -> torch.device:
    """Device by name; "auto" takes CUDA, then Apple's MPS, then the processor.

    Raises
    ------
    UserError
        If the device does not exist here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device {name!r}: use auto, cpu, cuda, cuda:1 or mps.") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise UserError(f"Device {name!r} is not available on this machine: use auto or cpu.")
    return device


def autocast(
    device: torch.device, precision: Literal["auto", "bf16", "fp32"] = "auto"
) -> AbstractContextManager[object]:
    """Context in which convolutions run in bfloat16 where that is faster than float32, or as told.

    Notes
    -----
    Measured on a processor with AVX-512 BF16, 64 channels, 24³: 1020 against 550 GFLOP/s in float32. Processors
    without such instructions emulate bfloat16 and are slower with it.
    """
    import torch

    if precision == "fp32" or (precision == "auto" and not _fast_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _fast_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # torch names the instruction set publicly but not its bfloat16 part.
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(probe is not None and probe())
    return False


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device (for the processor: of the machine's memory)."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's or the machine's memory is full."""
    import torch

    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _MEMORY_IS_FULL)
