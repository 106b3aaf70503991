"""The operations as PyTorch sees them: schema, fake tensors, autograd, torch.compile, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from napari_mrcnn3d._ops import box_iou_3d, crop_and_resize_3d, nms_3d, paste_masks_3d, roi_align_3d
from tests.ops.helpers import noise, random_boxes, zeros_index

pytestmark = pytest.mark.usefixtures("every_backend")

ops = torch.ops.mrcnn3d
BOXES = random_boxes(5, 0, extent=8.0)
SCORES = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.7])
ENTRIES = torch.tensor([0, 1, 0, 1, 0])
FEATURES = noise(2, 3, 6, 7, 8, dtype=torch.float32)
VALUES = noise(5, 3, 2, 3, 2, dtype=torch.float32)
IMAGE = noise(2, 4, 5, 6, 3, dtype=torch.float32)
CORNERS = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
ROI = ((0.5, 1.0, 0.7), 2)


def leaf(tensor: Tensor) -> Tensor:
    """A copy that wants a gradient."""
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("box_iou", (BOXES, BOXES[:3])),
        ("nms", (BOXES, SCORES, 0.3, None, None)),
        ("nms", (BOXES, SCORES, 0.3, ENTRIES, 2)),
        ("roi_align", (leaf(FEATURES), BOXES, ENTRIES, (2, 3, 2), *ROI)),
        ("roi_align", (leaf(FEATURES.to(memory_format=torch.channels_last_3d)), BOXES, ENTRIES, (1, 1, 1), *ROI)),
        ("roi_align", (leaf(FEATURES.bfloat16()), BOXES, ENTRIES, (2, 3, 2), *ROI)),
        ("roi_align_transposed", (leaf(VALUES), BOXES, ENTRIES, (2, 3, 6, 7, 8), *ROI)),
        ("crop_and_resize", (leaf(IMAGE), leaf(CORNERS), ENTRIES, (2, 3, 4), False, 0.0)),
        ("crop_and_resize", (leaf(IMAGE), leaf(CORNERS), ENTRIES, (2, 1, 4), True, 0.5)),
        ("crop_and_resize_backward", (noise(5, 2, 3, 4, 3).float(), IMAGE, CORNERS, ENTRIES, False, True, True)),
        ("paste_masks", (torch.rand(5, 3, 4, 2), BOXES, ENTRIES, SCORES, (8, 9, 7), 0.5)),
    ],
)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    """PyTorch's own check of schema, autograd registration, fake tensors and ahead-of-time autograd."""
    assert set(opcheck(getattr(ops, name).default, arguments).values()) == {"SUCCESS"}


def detect(features: Tensor, boxes: Tensor, scores: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """What the detector does: choose boxes, pool, and paint."""
    kept = nms_3d(boxes, scores, 0.3, groups=entries, max_keep=3)
    pooled = roi_align_3d(features, boxes[kept], entries[kept], (2, 2, 2), (1.0, 1.0, 1.0))
    volume = paste_masks_3d(pooled.detach().sigmoid().mean(1), boxes[kept], kept + 1, scores[kept], (8, 8, 8))
    return pooled.square().sum() + box_iou_3d(boxes, boxes).sum(), volume


def test_compiled_as_one_graph_they_answer_as_before() -> None:
    features, expected = leaf(FEATURES), leaf(FEATURES)
    loss, volume = torch.compile(detect, backend="aot_eager", fullgraph=True)(features, BOXES, SCORES, ENTRIES)
    expected_loss, expected_volume = detect(expected, BOXES, SCORES, ENTRIES)
    loss.backward()
    expected_loss.backward()
    assert volume.any()
    assert torch.equal(volume, expected_volume)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(features.grad, expected.grad)


def test_crops_compile_with_both_gradients() -> None:
    def loss(image: Tensor, corners: Tensor) -> Tensor:
        return crop_and_resize_3d(image, corners, ENTRIES, (2, 3, 2)).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        image, corners = leaf(IMAGE), leaf(CORNERS)
        function(image, corners).backward()
        gradients.append((image.grad, corners.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast_changes_nothing() -> None:
    """Half precision is no option for boxes, and pooling keeps the type that it is given."""
    plain = detect(FEATURES, BOXES, SCORES, ENTRIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = detect(FEATURES, BOXES, SCORES, ENTRIES)
        assert roi_align_3d(FEATURES, BOXES, ENTRIES, (2, 2, 2), (1.0, 1.0, 1.0)).dtype == torch.float32
        crop = crop_and_resize_3d(IMAGE, CORNERS, ENTRIES, (2, 3, 2))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])
    assert torch.equal(crop, crop_and_resize_3d(IMAGE, CORNERS, ENTRIES, (2, 3, 2)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_autograd_mode_gives_the_same(mode: Any) -> None:
    expected, volume = detect(FEATURES, BOXES, SCORES, ENTRIES)
    with mode():
        loss, painted = detect(leaf(FEATURES), BOXES, SCORES, ENTRIES)
    assert loss.requires_grad == (mode is torch.enable_grad)
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(painted, volume)


def test_shapes_are_known_without_values() -> None:
    meta = torch.device("meta")
    pooled = roi_align_3d(FEATURES.to(meta), BOXES.to(meta), ENTRIES.to(meta), (2, 3, 4), (1.0, 1.0, 1.0))
    assert pooled.shape == (5, 3, 2, 3, 4)
    assert pooled.is_contiguous(memory_format=torch.channels_last_3d)
    assert box_iou_3d(BOXES.to(meta), BOXES.to(meta)).shape == (5, 5)


def test_a_second_derivative_that_is_not_there_says_so() -> None:
    image = leaf(IMAGE)
    crop = crop_and_resize_3d(image, CORNERS, zeros_index(5), (2, 2, 2))
    (slope,) = torch.autograd.grad(crop.square().sum(), image, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()
