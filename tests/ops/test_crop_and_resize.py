"""The predecessor's published cases 1 to 17, a scalar oracle, and both gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from napari_mrcnn3d._ops import crop_and_resize_3d
from tests.ops.helpers import few, noise, zeros_index

pytestmark = pytest.mark.usefixtures("every_backend")

Triple = tuple[int, int, int]
V2 = torch.arange(1.0, 9.0).view(1, 2, 2, 2, 1)
V3 = torch.arange(1.0, 28.0).view(1, 3, 3, 3, 1)
WHOLE, REVERSED = [0.0, 0, 0, 1, 1, 1], [1.0, 1, 1, 0, 0, 0]
FIRST_HALF, HALF_REVERSED = [0.0, 0, 0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0, 0, 0]
LINEAR_3 = [
    *(1, 1.5, 2, 2, 2.5, 3, 3, 3.5, 4),
    *(3, 3.5, 4, 4, 4.5, 5, 5, 5.5, 6),
    *(5, 5.5, 6, 6, 6.5, 7, 7, 7.5, 8),
]
NEAREST_3 = [1, 2, 2, 3, 4, 4, 3, 4, 4, 5, 6, 6, 7, 8, 8, 7, 8, 8, 5, 6, 6, 7, 8, 8, 7, 8, 8]
NEAREST_3_REVERSED = [8, 8, 7, 8, 8, 7, 6, 6, 5, 8, 8, 7, 8, 8, 7, 6, 6, 5, 4, 4, 3, 4, 4, 3, 2, 2, 1]
EIGHTS, CORNER = [1, 3, 7, 9, 19, 21, 25, 27], [1, 2, 4, 5, 10, 11, 13, 14]


@pytest.mark.parametrize(
    ("image", "box", "side", "method", "expected"),
    [
        pytest.param(V2, WHOLE, 1, "trilinear", [4.5], id="1"),
        pytest.param(V2, WHOLE, 1, "nearest", [8], id="2"),
        pytest.param(V2, REVERSED, 1, "trilinear", [4.5], id="3"),
        pytest.param(V2, REVERSED, 1, "nearest", [8], id="4"),
        pytest.param(V2, WHOLE, 3, "trilinear", LINEAR_3, id="5"),
        pytest.param(V2, WHOLE, 3, "nearest", NEAREST_3, id="6"),
        pytest.param(V2, REVERSED, 3, "trilinear", LINEAR_3[::-1], id="7"),
        pytest.param(V2, REVERSED, 3, "nearest", NEAREST_3_REVERSED, id="8"),
        pytest.param(V3, WHOLE, 2, "trilinear", EIGHTS, id="9, whole"),
        pytest.param(V3, FIRST_HALF, 2, "trilinear", CORNER, id="9, half"),
        pytest.param(V3, WHOLE, 2, "nearest", EIGHTS, id="10, whole"),
        pytest.param(V3, FIRST_HALF, 2, "nearest", CORNER, id="10, half"),
        pytest.param(V3, REVERSED, 2, "trilinear", EIGHTS[::-1], id="11, whole"),
        pytest.param(V3, HALF_REVERSED, 2, "trilinear", CORNER[::-1], id="11, half"),
        pytest.param(V3, REVERSED, 2, "nearest", EIGHTS[::-1], id="12, whole"),
        pytest.param(V3, HALF_REVERSED, 2, "nearest", CORNER[::-1], id="12, half"),
    ],
)
def test_published_case(image: Tensor, box: list[float], side: int, method: Any, expected: list[float]) -> None:
    crop = crop_and_resize_3d(image, torch.tensor([box]), zeros_index(1), (side, side, side), method=method)
    assert crop.shape == (1, side, side, side, 1)
    assert crop.flatten().tolist() == expected


def test_published_cases_9_to_12_two_boxes_at_once() -> None:
    crops = crop_and_resize_3d(V3, torch.tensor([WHOLE, FIRST_HALF]), zeros_index(2), (2, 2, 2))
    assert crops.flatten().tolist() == EIGHTS + CORNER


def test_published_case_13_outside_is_the_extrapolation_value() -> None:
    box = torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    crop = crop_and_resize_3d(V2, box, zeros_index(1), (3, 3, 3), extrapolation_value=-1.0)
    expected = torch.full((3, 3, 3), -1.0)
    expected[1:, 1:, 1:] = V2[0, ..., 0]
    assert torch.equal(crop[0, ..., 0], expected)


def test_published_case_14_no_boxes() -> None:
    assert crop_and_resize_3d(V2, torch.zeros(0, 6), zeros_index(0), (3, 3, 3)).shape == (0, 3, 3, 3, 1)


def test_published_case_15_image_of_four_axes() -> None:
    with pytest.raises(ValueError, match="input image must be 5-D"):
        crop_and_resize_3d(V2[0], torch.tensor([WHOLE]), zeros_index(1), (4, 4, 4))


def test_published_case_16_box_index_of_another_length() -> None:
    with pytest.raises(ValueError, match="box_index has incompatible shape"):
        crop_and_resize_3d(V2, torch.tensor([WHOLE]), zeros_index(2), (4, 4, 4))


@pytest.mark.parametrize("index", [1, -1])
def test_published_case_17_box_index_out_of_range(index: int) -> None:
    with pytest.raises(ValueError, match=r"box_index has values outside \[0, batch_size\)"):
        crop_and_resize_3d(V2, torch.tensor([WHOLE]), torch.tensor([index]), (4, 4, 4))


def oracle(image: Tensor, boxes: Tensor, index: Tensor, size: Triple, method: str) -> Tensor:
    """The definition, sample by sample; extrapolates to -5."""
    out = image.new_full((len(boxes), *size, image.shape[-1]), -5.0)
    for n, (box, b) in enumerate(zip(boxes.tolist(), index.tolist(), strict=True)):
        for cell in np.ndindex(*size):
            last = [length - 1 for length in image.shape[1:4]]
            at = []
            for a in range(3):
                share = cell[a] / (size[a] - 1) if size[a] > 1 else 0.5
                at.append((box[a] * (1 - share) + box[a + 3] * share) * last[a])
            if not all(0 <= v <= m for v, m in zip(at, last, strict=True)):
                continue
            if method == "nearest":
                at = [math.floor(v) + (v - math.floor(v) >= 0.5) for v in at]
            value = torch.zeros_like(image[0, 0, 0, 0])
            for corner in itertools.product(*[{math.floor(v), math.ceil(v)} for v in at]):
                weight = math.prod(1 - abs(v - c) for v, c in zip(at, corner, strict=True))
                value = value + weight * image[(b, *corner)]
            out[(n, *cell)] = value
    return out


def boxes_around(count: int, seed: int) -> Tensor:
    """Normalised boxes that leave the volume or are flipped at times, but on no voxel centre by chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 6, generator=generator, dtype=torch.float64) * 1.6 - 0.3


@few
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from(["trilinear", "nearest"]),
    st.integers(0, 9999),
)
def test_any_shape_matches_the_scalar_oracle(extent: Triple, size: Triple, method: Any, seed: int) -> None:
    image, boxes, index = noise(2, *extent, 2, seed=seed), boxes_around(4, seed), torch.tensor([0, 1, 1, 0])
    boxes[3, seed % 6] = float("nan")
    crop = crop_and_resize_3d(image, boxes, index, size, method=method, extrapolation_value=-5.0)
    torch.testing.assert_close(crop, oracle(image, boxes, index, size, method))


def test_a_box_inside_matches_scipy_and_grid_sample() -> None:
    image, size = noise(1, 6, 7, 8, 1), (4, 5, 3)
    box = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7]], dtype=torch.float64)
    crop = crop_and_resize_3d(image, box, zeros_index(1), size)[0, ..., 0]
    axes = [torch.linspace(box[0, a].item(), box[0, a + 3].item(), n, dtype=torch.float64) for a, n in enumerate(size)]
    voxels = [axis.numpy() * (length - 1) for axis, length in zip(axes, (6, 7, 8), strict=True)]
    expected = map_coordinates(image[0, ..., 0].numpy(), np.meshgrid(*voxels, indexing="ij"), order=1)
    np.testing.assert_allclose(crop.numpy(), expected)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None] * 2 - 1
    sampled = torch.nn.functional.grid_sample(image[None, ..., 0], grid, align_corners=True)
    torch.testing.assert_close(crop, sampled[0, 0])


@pytest.mark.parametrize("length", [2, 3, 50, 128])
@pytest.mark.parametrize("count", [2, 7, 14, 28, 50])
def test_the_last_sample_falls_on_the_second_corner_and_is_never_cut(length: int, count: int) -> None:
    """In float32 a step times its count may pass the border by one rounding."""
    image = torch.arange(float(length)).view(1, length, 1, 1, 1)
    crop = crop_and_resize_3d(image, torch.tensor([WHOLE]), zeros_index(1), (count, 1, 1), extrapolation_value=-1.0)
    assert crop.flatten()[-1] == length - 1
    assert crop.min() == 0


def test_nearest_rounds_the_number_just_below_one_half_down() -> None:
    below_half = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    box = torch.tensor([[below_half, 0, 0, below_half, 0, 0]])
    assert crop_and_resize_3d(V2, box, zeros_index(1), (1, 1, 1), method="nearest").item() == 1


@pytest.mark.parametrize("size", [(2, 3, 2), (1, 1, 4)])
def test_both_gradients_by_finite_differences(size: Triple) -> None:
    image = noise(2, 3, 4, 3, 2).requires_grad_()
    boxes = boxes_around(5, 11).requires_grad_()
    index = torch.tensor([0, 1, 0, 1, 1])

    def op(image: Tensor, boxes: Tensor) -> Tensor:
        return crop_and_resize_3d(image, boxes, index, size)

    assert (op(image, boxes) == 0).any(), "some samples should be outside"
    assert torch.autograd.gradcheck(op, (image, boxes))


def test_nearest_gradients_go_to_the_voxel_and_along_the_trilinear_slope() -> None:
    image, boxes, index = noise(1, 4, 4, 4, 2), boxes_around(4, 2), zeros_index(4)
    gradients = {}
    for method in ("trilinear", "nearest"):
        x, b = image.clone().requires_grad_(), boxes.clone().requires_grad_()
        crop = crop_and_resize_3d(x, b, index, (3, 3, 3), method=method)  # type: ignore[arg-type]
        crop.sum().backward()
        gradients[method] = x.grad, b.grad
    torch.testing.assert_close(gradients["nearest"][1], gradients["trilinear"][1])
    with torch.no_grad():
        plain = crop_and_resize_3d(image, boxes, index, (3, 3, 3), method="nearest")
    assert torch.equal(crop, plain)
    to_image = gradients["nearest"][0]
    assert to_image is not None
    assert torch.equal(to_image, to_image.round())
    torch.testing.assert_close((to_image * image).sum(), plain.sum())


def test_on_a_voxel_the_slope_is_zero_as_in_the_predecessor() -> None:
    boxes = torch.tensor([WHOLE], requires_grad=True)
    crop_and_resize_3d(V3, boxes, zeros_index(1), (3, 3, 3)).sum().backward()
    assert boxes.grad is not None
    assert not boxes.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_corners_that_are_no_number_extrapolate_and_get_no_gradient(value: float) -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.9, 0.9, value]], requires_grad=True)
    crop = crop_and_resize_3d(V2, boxes, zeros_index(1), (2, 2, 1), extrapolation_value=-1.0)
    assert crop.unique().tolist() == [-1.0]
    crop.sum().backward()
    assert boxes.grad is not None
    assert not boxes.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.bfloat16, torch.float64])
def test_any_real_image_gives_floats(dtype: torch.dtype) -> None:
    crop = crop_and_resize_3d((V2 > 4).to(dtype), torch.tensor([WHOLE]), zeros_index(1), (1, 1, 1))
    assert crop.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert crop.item() == 0.5


@pytest.mark.parametrize(("batch", "channels", "count"), [(0, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("method", ["trilinear", "nearest"])
def test_nothing_in_gives_nothing_out(batch: int, channels: int, count: int, method: Any) -> None:
    image = torch.zeros(batch, 2, 2, 2, channels, requires_grad=True)
    boxes = torch.zeros(count, 6, requires_grad=True)
    crop = crop_and_resize_3d(image, boxes, zeros_index(count), (3, 2, 1), method=method)
    assert crop.shape == (count, 3, 2, 1, channels)
    crop.sum().backward()
    assert image.grad is not None
    assert not image.grad.any()


GOOD: dict[str, Any] = {
    "image": V2,
    "boxes": torch.tensor([WHOLE]),
    "box_index": zeros_index(1),
    "crop_size": (2, 2, 2),
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("image", V2.numpy(), TypeError),
        ("image", V2.to(torch.complex64), TypeError),
        ("image", torch.zeros(1, 2, 0, 2, 1), ValueError),
        ("boxes", torch.zeros(1, 4), ValueError),
        ("boxes", torch.zeros(1, 6).half(), TypeError),
        ("boxes", torch.zeros(1, 6, device="meta"), ValueError),
        ("box_index", torch.zeros(1), TypeError),
        ("crop_size", (2, 2), ValueError),
        ("crop_size", (2, 2, 0), ValueError),
        ("method", "cubic", ValueError),
    ],
)
def test_unusable_arguments_are_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        crop_and_resize_3d(**GOOD | {name: value})
