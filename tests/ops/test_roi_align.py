"""RoIAlign against a scalar oracle, SciPy and PyTorch, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from napari_mrcnn3d._ops import _torch, roi_align_3d
from tests.ops.helpers import few, noise, random_boxes, zeros_index

pytestmark = pytest.mark.usefixtures("every_backend")

Triple = tuple[int, int, int]
UNIT_SCALE = (1.0, 1.0, 1.0)


def axis_samples(low: float, high: float, bins: int, samples: int, length: int) -> list[list[dict[int, float]]]:
    """For each bin and sample, the cells of an axis and their weights; scalar oracle."""
    result = []
    for p in range(bins):
        row = []
        for i in range(samples):
            v = low - 0.5 + (p + (i + 0.5) / samples) * (high - low) / bins
            weights: dict[int, float] = {}
            if -1 <= v <= length:
                v = min(max(v, 0.0), length - 1.0)
                below = math.floor(v)
                weights[below] = 1 - (v - below)
                if v > below:
                    weights[below + 1] = v - below
            row.append(weights)
        result.append(row)
    return result


def oracle(x: Tensor, boxes: Tensor, entries: Tensor, size: Triple, scale: tuple[float, ...], samples: int) -> Tensor:
    """The definition, sample by sample."""
    out = x.new_zeros((len(boxes), x.shape[1], *size))
    for k, (box, n) in enumerate(zip(boxes.tolist(), entries.tolist(), strict=True)):
        if not 0 <= n < len(x):
            continue
        axes = [
            axis_samples(box[a] * scale[a], box[a + 3] * scale[a], size[a], samples, x.shape[a + 2]) for a in range(3)
        ]
        for p, q, r in np.ndindex(*size):
            for i, j, l in np.ndindex(samples, samples, samples):  # noqa: E741
                for z, wz in axes[0][p][i].items():
                    for y, wy in axes[1][q][j].items():
                        for c, wx in axes[2][r][l].items():
                            out[k, :, p, q, r] += x[n, :, z, y, c] * wz * wy * wx / samples**3
    return out


@few
@given(
    st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.integers(1, 2), st.integers(0, 9999)
)
def test_any_shape_matches_the_scalar_oracle(extent: Triple, size: Triple, samples: int, seed: int) -> None:
    """Boxes inside, across the border, far outside, of no size, mirrored, at no number, of no batch entry."""
    x = noise(2, 2, *extent, seed=seed)
    boxes = random_boxes(6, seed, extent=12.0, sides=(-1.0, 12.0)).double()
    boxes[0, 3:] = boxes[0, :3]
    boxes[1] += 100
    boxes[2, seed % 6] = float("nan")
    entries = torch.tensor([0, 1, 1, 0, 1, [2, -1, 0][seed % 3]])
    arguments = (x, boxes, entries, size, (0.5, 0.4, 0.7), samples)
    torch.testing.assert_close(roi_align_3d(*arguments), oracle(*arguments))


def test_a_box_inside_matches_scipy() -> None:
    x, size = noise(1, 1, 9, 10, 11), (4, 3, 5)
    box = torch.tensor([[1.2, 2.3, 0.7, 7.9, 8.8, 9.9]], dtype=torch.float64)
    low, high = box[0, :3].numpy(), box[0, 3:].numpy()
    axes = [low[a] - 0.5 + (np.arange(n) + 0.5) * (high[a] - low[a]) / n for a, n in enumerate(size)]
    expected = map_coordinates(x[0, 0].numpy(), np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")
    result = roi_align_3d(x, box, zeros_index(1), size, UNIT_SCALE)
    np.testing.assert_allclose(result[0, 0].numpy(), expected)


def test_boxes_inside_match_grid_sample() -> None:
    x = noise(1, 3, 9, 12, 10)
    extent = torch.tensor(x.shape[2:], dtype=torch.float64)
    near = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * extent / 2
    boxes = torch.cat([near, near + extent / 2], 1)
    result = roi_align_3d(x, boxes, zeros_index(5), (3, 4, 2), UNIT_SCALE)
    for box, values in zip(boxes, result, strict=True):
        z, y, w = (
            (box[a] + (torch.arange(n, dtype=torch.float64) + 0.5) * (box[a + 3] - box[a]) / n) / extent[a] * 2 - 1
            for a, n in enumerate((3, 4, 2))
        )
        grid = torch.stack(torch.meshgrid(z, y, w, indexing="ij")[::-1], -1)[None]
        expected = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        torch.testing.assert_close(values, expected[0])


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_linear_ramp_gives_the_value_at_the_bin_centre(samples: int) -> None:
    centres = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) + 0.5 for n in (12, 14, 16)], indexing="ij")
    ramp = 2 * centres[0] - 3 * centres[1] + 0.5 * centres[2] + 7
    box = torch.tensor([[2.0, 4.5, 3.0, 20.0, 22.5, 27.0]], dtype=torch.float64)
    result = roi_align_3d(ramp[None, None], box, zeros_index(1), (3, 3, 4), (0.5, 0.5, 0.5), samples)
    z, y, x = (1 + 1.5 + 3 * torch.arange(3), 2.25 + 1.5 + 3 * torch.arange(3), 1.5 + 1.5 + 3 * torch.arange(4))
    expected = 2 * z[:, None, None] - 3 * y[:, None] + 0.5 * x + 7
    torch.testing.assert_close(result[0, 0], expected.double())


@pytest.mark.parametrize(
    ("image", "side", "expected"),
    [
        ([[1.0, 2], [3, 4]], 1, [[1.0, 1.25], [1.5, 1.75]]),
        ([[4.0, 3], [2, 1]], 1, [[4.0, 3.75], [3.5, 3.25]]),
        ([[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]], 3, [[1.9375, 4.75], [7.5625, 10.375]]),
    ],
)
def test_constant_along_z_it_gives_the_published_values_of_two_dimensions(
    image: list[list[float]], side: float, expected: list[list[float]]
) -> None:
    """Cases of mmcv's RoIAlign (aligned, two samples per bin), whatever the box does along z."""
    volume = torch.tensor(image).expand(1, 1, 5, -1, -1)
    boxes = torch.tensor([[0.3, 0, 0, 4.1, side, side], [2, 0, 0, 2, side, side], [4, 0, 0, 1, side, side]])
    result = roi_align_3d(volume, boxes, zeros_index(3), (3, 2, 2), UNIT_SCALE, 2)
    torch.testing.assert_close(result, torch.tensor(expected).expand(3, 1, 3, 2, 2))


def test_backward_is_the_transpose_of_forward() -> None:
    x = noise(2, 3, 6, 7, 8).requires_grad_()
    boxes = random_boxes(9, 3, extent=14.0, sides=(0.0, 12.0)).double()
    entries = torch.tensor([0, 1, 1, 0, 5, -1, 1, 0, 0])
    result = roi_align_3d(x, boxes, entries, (2, 3, 4), (0.5, 0.5, 0.6), 2)
    weights = noise(*result.shape, seed=1)
    (grad,) = torch.autograd.grad(result, x, weights)
    torch.testing.assert_close((result * weights).sum(), (x * grad).sum())


def test_first_and_second_derivatives() -> None:
    x = noise(1, 2, 5, 3, 4).requires_grad_()
    boxes = torch.tensor([[0.3, 0.2, -0.8, 4.4, 5.1, 3.9], [1, 1, 1, 3, 3, 3]], dtype=torch.float64)

    def op(features: Tensor) -> Tensor:
        return roi_align_3d(features, boxes, zeros_index(2), (2, 1, 2), UNIT_SCALE, 2)

    assert torch.autograd.gradcheck(op, (x,))
    assert torch.autograd.gradgradcheck(op, (x,))


def test_boxes_get_no_gradient() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2]], requires_grad=True)
    x = torch.ones(1, 1, 4, 4, 4, requires_grad=True)
    roi_align_3d(x, boxes, zeros_index(1), (2, 2, 2), UNIT_SCALE).sum().backward()
    assert boxes.grad is None
    assert x.grad is not None
    assert x.grad.sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    """Half precision is rounded once, at the end, also where autocast would round between."""
    x = noise(2, 8, 6, 10, 10).to(dtype)
    x = (x.to(memory_format=torch.channels_last_3d) if channels_last else x).requires_grad_()
    boxes, entries = random_boxes(12, 1, extent=20.0), torch.arange(12) % 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = roi_align_3d(x, boxes, entries, (2, 3, 3), (0.5, 0.5, 0.5))
        result.float().pow(2).sum().backward()
    exact = roi_align_3d(x.detach().double(), boxes.double(), entries, (2, 3, 3), (0.5, 0.5, 0.5))
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_more_boxes_than_are_weighed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, boxes = noise(1, 2, 6, 6, 6), random_boxes(10, 2, extent=6.0).double()
    whole = roi_align_3d(x, boxes, zeros_index(10), (2, 2, 2), UNIT_SCALE)
    monkeypatch.setattr(_torch, "_ROIS_AT_ONCE", 3)
    assert torch.equal(roi_align_3d(x, boxes, zeros_index(10), (2, 2, 2), UNIT_SCALE), whole)


@pytest.mark.parametrize(("batch", "channels", "count"), [(1, 2, 0), (0, 2, 3), (1, 0, 3), (0, 0, 0)])
def test_nothing_in_gives_nothing_out(batch: int, channels: int, count: int) -> None:
    x = torch.zeros(batch, channels, 4, 4, 4, requires_grad=True)
    result = roi_align_3d(x, random_boxes(count, 0), zeros_index(count), (2, 3, 4), UNIT_SCALE)
    assert result.shape == (count, channels, 2, 3, 4)
    assert not result.any()
    result.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


GOOD: dict[str, Any] = {
    "features": torch.zeros(1, 2, 4, 4, 4),
    "boxes": torch.zeros(3, 6),
    "batch_index": zeros_index(3),
    "output_size": (2, 2, 2),
    "spatial_scale": UNIT_SCALE,
    "sampling_ratio": 1,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", torch.zeros(2, 4, 4, 4), ValueError),
        ("features", torch.zeros(1, 2, 0, 4, 4), ValueError),
        ("features", torch.zeros(1, 2, 4, 4, 4, dtype=torch.int32), TypeError),
        ("features", np.zeros((1, 2, 4, 4, 4)), TypeError),
        ("boxes", torch.zeros(3, 6, dtype=torch.bfloat16), TypeError),
        ("boxes", torch.zeros(3, 6, device="meta"), ValueError),
        ("batch_index", zeros_index(2), ValueError),
        ("batch_index", torch.zeros(3), TypeError),
        ("output_size", (2, 2), ValueError),
        ("output_size", (2, 0, 2), ValueError),
        ("output_size", (2, 1.5, 2), ValueError),
        ("spatial_scale", (1.0, 1.0), ValueError),
        ("spatial_scale", (1.0, 0.0, 1.0), ValueError),
        ("spatial_scale", (1.0, float("nan"), 1.0), ValueError),
        ("sampling_ratio", 0, ValueError),
        ("sampling_ratio", 1.5, ValueError),
    ],
)
def test_unusable_arguments_are_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        roi_align_3d(**GOOD | {name: value})


def test_a_device_without_autocast_needs_none_switched_off() -> None:
    with _torch.full_precision(torch.device("meta")):
        assert roi_align_3d(**GOOD).shape == (3, 2, 2, 2, 2)
