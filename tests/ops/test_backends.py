"""Which kernels answer, and what is said where compiled ones cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from napari_mrcnn3d._ops import _backends, _cpu, _torch, nms_3d

CPU = torch.device("cpu")
BOXES = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 2]])
IMPORTED = "import sys, napari_mrcnn3d._ops; print([name for name in sys.modules if name.startswith('cuda.core')])"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No choice is remembered, before or after."""
    _backends._chosen.cache_clear()
    yield
    _backends._chosen.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels that cannot be used."""
    stand_in = SimpleNamespace(problem=lambda device: "the library is a teapot.")
    monkeypatch.setitem(_backends._COMPILED, "cpu", cast(ModuleType, stand_in))


@pytest.mark.usefixtures("broken")
def test_without_compiled_kernels_pytorch_answers_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert nms_3d(BOXES, torch.tensor([0.1, 0.9]), 0.5).tolist() == [1]
    (record,) = caplog.records
    assert "the library is a teapot." in record.getMessage()
    assert "the library is a teapot." in _backends.describe(CPU)
    assert _backends.kernels(CPU) is _torch


def test_compiled_kernels_are_used_and_can_be_left_out() -> None:
    if _cpu.problem(CPU) is not None and os.environ.get("CI") != "true":
        pytest.skip(str(_cpu.problem(CPU)))
    assert _backends.kernels(CPU) is _cpu
    assert "compiled" in _backends.describe(CPU)
    with _backends.plain_torch():
        assert _backends.kernels(CPU) is _torch
        assert "left out on purpose" in _backends.describe(CPU)
    assert _backends.kernels(CPU) is _cpu


def test_devices_without_compiled_kernels_have_pytorchs_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert _backends.kernels(torch.device("mps")) is _torch
    assert not caplog.records


def run(code: str, **variables: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_variable_leaves_them_out() -> None:
    code = "import torch; from napari_mrcnn3d._ops import _backends; print(_backends.describe(torch.device('cpu')))"
    assert "left out on purpose" in run(code, NAPARI_MRCNN3D_OPS="torch")
    assert "left out on purpose" not in run(code, NAPARI_MRCNN3D_OPS="")


def test_importing_the_operations_leaves_cuda_core_alone() -> None:
    """PyTorch itself imports what else there is of ``cuda``."""
    assert run(IMPORTED) == "[]"
