"""Inputs that several of the operations' tests need."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

few = settings(max_examples=40, deadline=None)
"""Hypothesis settings: the oracles are slow on purpose."""


def random_boxes(
    count: int, seed: int, *, extent: float = 40.0, sides: tuple[float, float] = (2.0, 12.0), step: float | None = None
) -> Tensor:
    """Boxes around centres in [0, extent)³; with ``step``, corners are multiples of it, so that ties are exact."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 3, generator=generator) * extent
    half = (torch.rand(count, 3, generator=generator) * (sides[1] - sides[0]) + sides[0]) / 2
    boxes = torch.cat([centre - half, centre + half], 1)
    return boxes if step is None else (boxes / step).round() * step


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def zeros_index(count: int) -> Tensor:
    """Index 0 for each box."""
    return torch.zeros(count, dtype=torch.int64)
