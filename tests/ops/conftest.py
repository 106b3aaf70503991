"""The tests of an operation's meaning run on every set of kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from napari_mrcnn3d._ops import _backends, _cpu


@pytest.fixture(params=["compiled", "torch"])
def every_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with the compiled kernels, once with plain PyTorch."""
    if request.param == "torch":
        with _backends.plain_torch():
            yield
        return
    problem = _cpu.problem(torch.device("cpu"))
    if problem is not None and os.environ.get("CI") != "true":
        pytest.skip(problem)
    assert problem is None
    yield
