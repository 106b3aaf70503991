"""What only a real card can show of the CUDA kernels; the rest is shown by their emulation in tests/ops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d._ops import _cuda, _torch, nms_3d, paste_masks_3d, roi_align_3d
from napari_mrcnn3d._ops._torch import RoIGrid
from tests.ops.emulation.cases import RoICase, assert_near, nms_case, roi_case
from tests.ops.helpers import noise, random_boxes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def card() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    assert _cuda.problem(device) is None
    return device


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on(device: torch.device, case: RoICase) -> RoICase:
    moved = (value.to(device) if isinstance(value, Tensor) else value for value in case)
    return RoICase(*moved)  # type: ignore[arg-type]


def backward(case: RoICase) -> tuple[Tensor, Tensor, Tensor, RoIGrid, tuple[int, ...]]:
    return case.values, case.boxes, case.batch_index, case.grid, tuple(case.features.shape)


# ---------------------------------------------------------------------------------------------- nms


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 8192, 8193, 20_000])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_the_same_boxes_are_kept_bit_for_bit(card: torch.device, count: int, threshold: float) -> None:
    boxes, groups = nms_case(count, count)
    for grouped, max_keep in ((None, None), (groups, None), (groups, 50)):
        expected = _torch.nms_sorted(boxes, threshold, grouped, max_keep)
        moved = None if grouped is None else grouped.to(card)
        assert torch.equal(_cuda.nms_sorted(boxes.to(card), threshold, moved, max_keep).cpu(), expected)


def test_unrounded_boxes_whose_overlaps_come_close_to_the_threshold(card: torch.device) -> None:
    """A fused multiply-add somewhere would decide some of these millions of pairs otherwise."""
    boxes = random_boxes(6000, 1, extent=12.0, sides=(4.0, 8.0))
    boxes = (boxes * 1024).round() / 1024 * 1.1
    for threshold in (0.1, 0.2, 0.5):
        expected = _torch.nms_sorted(boxes, threshold, None, None)
        assert torch.equal(_cuda.nms_sorted(boxes.to(card), threshold, None, None).cpu(), expected)


def test_a_million_boxes(card: torch.device) -> None:
    boxes = random_boxes(1_000_000, 2, extent=2000.0).to(card)
    kept = _cuda.nms_sorted(boxes, 0.3, None, None)
    assert torch.equal(_cuda.nms_sorted(boxes, 0.3, None, 1000), kept[:1000])
    again = boxes[kept]
    assert len(_cuda.nms_sorted(again, 0.3, None, None)) == len(kept)


# ---------------------------------------------------------------------------------------------- roi align


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "samples"), [(1, 1), (3, 2), (33, 1), (64, 2), (256, 3)])
def test_roi_align_both_ways(card: torch.device, dtype: torch.dtype, channels: int, samples: int) -> None:
    case = roi_case(channels, (7, 5, 6), samples, dtype, count=40)
    moved = on(card, case)
    assert_near(_cuda.roi_align(*moved[:4]), _torch.roi_align(*case[:4]).to(dtype), dtype)
    expected = _torch.roi_align_transposed(*backward(case)).to(dtype)
    assert_near(_cuda.roi_align_transposed(*backward(moved)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_deterministic_transpose_gives_the_same_bits_each_time(
    card: torch.device, deterministic: None, dtype: torch.dtype
) -> None:
    case = roi_case(64, (7, 7, 7), 1, dtype, count=500)
    moved = on(card, case)
    first, *others = (_cuda.roi_align_transposed(*backward(moved)) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    assert_near(first, _torch.roi_align_transposed(*backward(case)).to(dtype), dtype)


def test_gradients_flow_in_the_threads_of_autograd(card: torch.device) -> None:
    case = on(card, roi_case(8, (2, 3, 2), 2))
    features = case.features.requires_grad_()
    size, scale, samples = case.grid.size, case.grid.scale, case.grid.samples
    (roi_align_3d(features, case.boxes, case.batch_index, size, scale, samples) * case.values).sum().backward()
    assert features.grad is not None
    expected = _torch.roi_align_transposed(*(v.cpu() if isinstance(v, Tensor) else v for v in backward(case)))
    torch.testing.assert_close(features.grad.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_first_and_second_order(card: torch.device) -> None:
    case = on(card, roi_case(2, (2, 1, 2), 2, torch.float64, count=10))
    index = case.batch_index.clamp(0, 1)

    def op(features: Tensor) -> Tensor:
        return roi_align_3d(features, case.boxes, index, (2, 1, 2), case.grid.scale, 2)

    features = case.features.requires_grad_()
    assert torch.autograd.gradcheck(op, (features,), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(op, (features,), nondet_tol=1e-12)


def test_features_of_more_than_32_bits_of_elements(card: torch.device) -> None:
    """The last of the cells, and the last of the channels, are where the index says."""
    if torch.cuda.mem_get_info(card)[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    features = torch.zeros(2, 300, 300, 300, 48, dtype=torch.float16, device=card).permute(0, 4, 1, 2, 3)
    assert features.numel() > 2**31
    features[1, 47, 299, 299, 299] = 3.0
    boxes = torch.tensor([[299.0, 299, 299, 300, 300, 300]], device=card)
    last = torch.ones(1, dtype=torch.int64, device=card)
    grid = RoIGrid((1, 1, 1), (1.0, 1.0, 1.0), 1)
    result = _cuda.roi_align(features, boxes, last, grid)
    assert result.flatten().tolist() == [0.0] * 47 + [3.0]
    back = _cuda.roi_align_transposed(result, boxes, last, grid, tuple(features.shape))
    assert back[1, 47, 299, 299, 299] == 3
    assert back.count_nonzero() == 1


# ---------------------------------------------------------------------------------------------- paste masks


def test_masks_are_painted_as_by_the_reference(card: torch.device) -> None:
    masks, boxes = noise(300, 28, 28, 28).sigmoid().float(), random_boxes(300, 0, extent=120.0, sides=(4.0, 60.0))
    labels = torch.arange(1, 301, dtype=torch.int32)
    result = _cuda.paste_masks(masks.to(card), boxes.to(card), labels.to(card), (120, 130, 140), 0.5).cpu()
    below, above = (_torch.paste_masks(masks, boxes, labels, (120, 130, 140), t) for t in (0.49999, 0.50001))
    sure = below == above
    assert sure.float().mean() > 0.99
    assert torch.equal(result[sure], below[sure])


# ---------------------------------------------------------------------------------------------- where and when


def test_work_is_ordered_on_the_current_stream(card: torch.device) -> None:
    """Each stream fills its features late; whoever reads them on another stream gets zeros."""
    case = on(card, roi_case(64, (7, 7, 7), 2, count=200))
    expected = _cuda.roi_align(*case[:4])
    kept = _cuda.nms_sorted(case.boxes, 0.3, None, None)
    streams = [torch.cuda.Stream(card) for _ in range(4)]
    torch.cuda.synchronize(card)
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            features = torch.zeros_like(case.features)
            torch.cuda._sleep(20_000_000)
            features.copy_(case.features)
            results.append((_cuda.roi_align(features, *case[1:4]), _cuda.nms_sorted(case.boxes, 0.3, None, None)))
    torch.cuda.synchronize(card)
    assert all(torch.equal(a, expected) and torch.equal(b, kept) for a, b in results)


def test_threads_may_use_the_kernels_at_once(card: torch.device) -> None:
    boxes, groups = (value.to(card) for value in nms_case(3000, 4))
    expected = _cuda.nms_sorted(boxes, 0.3, groups, None)
    results: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream(card)):
            results.append(_cuda.nms_sorted(boxes, 0.3, groups, None))

    torch.cuda.synchronize(card)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_card_has_its_own_kernels(card: torch.device) -> None:
    boxes, groups = nms_case(500, 5)
    expected = _torch.nms_sorted(boxes, 0.3, groups, None)
    for index in reversed(range(torch.cuda.device_count())):
        device = torch.device("cuda", index)
        assert torch.equal(_cuda.nms_sorted(boxes.to(device), 0.3, groups.to(device), None).cpu(), expected)
        assert torch.cuda.current_device() == card.index


def test_the_public_operations_use_them(card: torch.device) -> None:
    boxes, scores = random_boxes(200, 6), torch.rand(200, generator=torch.Generator().manual_seed(6))
    assert torch.equal(nms_3d(boxes.to(card), scores.to(card), 0.3).cpu(), nms_3d(boxes, scores, 0.3))
    masks, labels = torch.ones(200, 3, 3, 3), torch.arange(1, 201)
    arguments = (masks, boxes, labels, scores)
    painted = paste_masks_3d(*(value.to(card) for value in arguments), shape=(40, 40, 40))
    assert torch.equal(painted.cpu(), paste_masks_3d(*arguments, shape=(40, 40, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorch_s_own_checks_of_operations(card: torch.device, dtype: torch.dtype) -> None:
    case = on(card, roi_case(4, (2, 2, 2), 1, dtype))
    size, scale, samples = list(case.grid.size), list(case.grid.scale), case.grid.samples
    features = case.features.requires_grad_()
    arguments = (features, case.boxes, case.batch_index, size, scale, samples)
    torch.library.opcheck(torch.ops.mrcnn3d.roi_align.default, arguments)
