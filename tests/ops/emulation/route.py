"""All four kernels from tensors to launches, on a machine whose CUDA driver is the stand-in; a program of its own."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from napari_mrcnn3d._ops import _cuda, _torch
from tests.ops.emulation.cases import nms_case, roi_case

STREAM = 0x1234
CARD = torch.device("cuda", 0)


def pretend() -> None:
    """Make PyTorch answer as if it had one card; its tensors stay where they are."""
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=STREAM)
    torch.cuda.device = lambda device: nullcontext()
    _cuda._index = lambda device: 0


def same() -> str:
    """Whether each kernel gives what the reference gives."""
    boxes, groups = nms_case(300, 0)
    suppression = (boxes, 0.25, groups, 100)
    good = torch.equal(_cuda.nms_sorted(*suppression), _torch.nms_sorted(*suppression))
    case = roi_case(8, (2, 3, 2), 2)
    good &= torch.allclose(_cuda.roi_align(*case[:4]), _torch.roi_align(*case[:4]), atol=1e-5)
    back = (case.values, *case[1:4], tuple(case.features.shape))
    good &= torch.allclose(_cuda.roi_align_transposed(*back), _torch.roi_align_transposed(*back), atol=1e-4)
    labels = torch.arange(1, 5, dtype=torch.int32)
    paste = (torch.ones(4, 2, 2, 2), boxes[10:14], labels, (9, 9, 9), 0.5)
    good &= torch.equal(_cuda.paste_masks(*paste), _torch.paste_masks(*paste))
    return "same" if good else "different"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> None:
    """Print the problem, and if there is none how the kernels get here and whether they are right."""
    pretend()
    problem = _cuda.problem(CARD)
    say(f"problem: {problem}")
    if problem is not None:
        return
    say(_cuda.describe(CARD))
    say(f"main: {same()}")
    thread = threading.Thread(target=lambda: say(f"another thread: {same()}"))
    thread.start()
    thread.join()
    last_stream = ctypes.CDLL("libcuda.so.1").stand_in_last_stream
    last_stream.restype = ctypes.c_void_p
    say(f"stream: {last_stream():#x}")


if __name__ == "__main__":
    main()
