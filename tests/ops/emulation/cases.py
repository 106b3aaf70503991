"""Inputs on which the CUDA kernels are compared with the reference, emulated and on a card."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from napari_mrcnn3d._ops._torch import RoIGrid
from tests.ops.helpers import noise, random_boxes

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest value: roundings of sums in another order, for halves of the result."""


class RoICase(NamedTuple):
    """Arguments of RoIAlign, and values to send back through its transpose."""

    features: Tensor
    boxes: Tensor
    batch_index: Tensor
    grid: RoIGrid
    values: Tensor


def awkward_boxes(count: int, seed: int) -> Tensor:
    """Boxes inside, across borders and far outside, of no size, mirrored, thin as a plane, at no number."""
    boxes = random_boxes(count, seed, extent=30.0, sides=(1.0, 30.0)) - 3
    boxes[1, 3:] = boxes[1, :3]
    boxes[2] += 1000
    boxes[3, seed % 6] = float("nan")
    boxes[4] = boxes[4][[3, 4, 5, 0, 1, 2]]
    boxes[5] = torch.tensor([2.0, 2, 2, 6, 6, 6]) / 0.25  # samples on cells and on the borders between bins
    boxes[6] = torch.tensor([-1e30, 0, 0, 1e30, 9, 9])
    boxes[7, 3] = boxes[7, 0]
    return boxes


def roi_case(
    channels: int,
    size: tuple[int, int, int],
    samples: int,
    dtype: torch.dtype = torch.float32,
    count: int = 14,
    seed: int = 0,
) -> RoICase:
    """RoIs on two maps, some of them on maps that do not exist."""
    features = noise(2, channels, 7, 8, 9, seed=seed).to(dtype)
    boxes = awkward_boxes(count, seed)
    batch_index = torch.arange(count) % 2
    batch_index[8], batch_index[9] = 2, -1
    values = noise(count, channels, *size, seed=seed + 1).to(dtype)
    grid = RoIGrid(size, (0.25, 0.3, 0.35), samples)
    return RoICase(features, boxes.double() if dtype == torch.float64 else boxes, batch_index, grid, values)


def nms_case(count: int, seed: int, *, awkward: bool = True) -> tuple[Tensor, Tensor]:
    """Half-integer boxes, so that overlaps meet thresholds exactly, and three groups far apart in number."""
    boxes = random_boxes(count, seed, extent=20.0, sides=(-0.5, 12.0), step=0.5)
    if awkward and count > 6:
        inf, nan = float("inf"), float("nan")
        boxes[0] = torch.tensor([-inf, -inf, -inf, inf, inf, inf])
        boxes[1, seed % 6] = nan
        boxes[2, seed % 6] = inf
        boxes[3] = torch.tensor([-3e38, -3e38, -3e38, 3e38, 3e38, 3e38])
    groups = torch.tensor([0, 2**62, -(2**62)])[
        torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    ]
    return boxes, groups


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal but for roundings, of the same type and layout as promised."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.permute(0, 2, 3, 4, 1).is_contiguous()
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    allowed = TOLERANCE[dtype] * (1 + expected.double().abs().amax().cpu() if expected.numel() else 1)
    assert not error.numel() or float(error.max()) <= float(allowed)
