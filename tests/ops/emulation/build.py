"""Builds the emulation of the CUDA kernels and puts it in the place of the launches."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d._ops import _cuda

HERE = Path(__file__).parent
KERNELS = Path(_cuda.__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
NOT_MEANT = ("-Wno-unknown-pragmas", "-Wno-dangling-pointer")  # those of nvcc; a pointer to what outlives its use
FAILURES = ("", "unknown kernel", "a size that no card takes", "threads wait forever", "shared memory overrun")


def required(program: str) -> str:
    """Path of a program that the test needs; without it the test is skipped, in CI it fails."""
    found = shutil.which(program)
    if found is None or sys.platform != "linux":
        message = f"{program} on Linux is needed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


def built(folder: Path) -> Path:
    """The stand-in for NVIDIA's driver library with the emulation in it, built once per run of the tests."""
    target = folder / "libcuda.so.1"
    if not target.is_file():
        sources = [str(HERE / name) for name in ("emulation.cpp", "driver.cpp")]
        command = [required("g++"), *FLAGS, *NOT_MEANT, f"-I{HERE}", f"-I{KERNELS}", *sources, "-o", str(target)]
        subprocess.run(command, check=True)
    return target


class Emulation:
    """Stands in for ``_cuda._launch``; remembers which kernels ran, and can deny a vector unit for atomics."""

    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emulate: Callable[..., int] = ctypes.CDLL(str(library)).emulate
        self.emulate.argtypes = (  # type: ignore[attr-defined]
            [ctypes.c_char_p] + [ctypes.c_uint] * 4 + [ctypes.POINTER(ctypes.c_void_p)]
        )
        self.launched: list[str] = []
        self.capability = (9, 0)
        monkeypatch.setattr(_cuda, "_launch", self.launch)
        monkeypatch.setattr(_cuda, "_capability", lambda device: self.capability)
        monkeypatch.setattr(_cuda, "_PASTE_BLOCKS", 8)  # thousands would have nothing to do

    def launch(
        self,
        device: torch.device,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: list[Tensor | int | float | None],
    ) -> None:
        assert device.type == "cpu"
        self.launched.append(name)
        plain = [_cuda._plain(argument) for argument in arguments]
        values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in plain]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        failed = self.emulate(name.encode(), *grid, threads, shared, pointers)
        assert not failed, f"{name}: {FAILURES[failed]}"
