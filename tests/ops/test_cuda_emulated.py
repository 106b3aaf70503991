"""The CUDA kernels' own text, run on the processor, against the reference; and the Python way to their launches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d._ops import _cuda, _torch
from napari_mrcnn3d._ops._torch import RoIGrid
from tests.ops.emulation.build import Emulation, built
from tests.ops.emulation.cases import RoICase, assert_near, nms_case, roi_case
from tests.ops.helpers import noise, random_boxes

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
Triple = tuple[int, int, int]
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def card(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    return Emulation(built(tmp_path_factory.getbasetemp()), monkeypatch)


# ---------------------------------------------------------------------------------------------- nms


@some
@given(
    count=st.integers(0, 300),
    threshold=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]),
    grouped=st.booleans(),
    max_keep=st.sampled_from([None, 0, 1, 40, 10_000]),
    chunk=st.sampled_from([64, 100, 192, 8192]),
    seed=st.integers(0, 999),
)
def test_suppression_is_the_same_bit_for_bit(
    card: Emulation, count: int, threshold: float, grouped: bool, max_keep: int | None, chunk: int, seed: int
) -> None:
    boxes, groups = nms_case(count, seed)
    arguments = (boxes, threshold, groups if grouped else None, max_keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "_NMS_CHUNK", chunk)
        kept = _cuda.nms_sorted(*arguments)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, _torch.nms_sorted(*arguments))


def test_a_chain_in_which_each_box_suppresses_the_next(card: Emulation) -> None:
    """The longest way to decide 64 boxes: every second one is kept, and known only after the one before it."""
    boxes = torch.tensor([[0.0, 0, 0, 1, 1, 2]]).repeat(150, 1)
    boxes[:, [2, 5]] += torch.arange(150)[:, None].float()
    assert _cuda.nms_sorted(boxes, 0.2, None, None).tolist() == list(range(0, 150, 2))


def test_many_kept_boxes_are_spread_over_blocks(card: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later chunks meet more than 64 boxes kept before, and hit the last of them."""
    boxes = random_boxes(400, 3, extent=400.0, sides=(1.0, 2.0))
    boxes = torch.cat([boxes, boxes.flip(0) + 0.01])
    monkeypatch.setattr(_cuda, "_NMS_CHUNK", 128)
    kept = _cuda.nms_sorted(boxes, 0.5, None, None)
    assert torch.equal(kept, _torch.nms_sorted(boxes, 0.5, None, None))
    assert 300 < len(kept) <= 400
    assert card.launched.count("nms_drop") == 6


# ---------------------------------------------------------------------------------------------- roi align


def assert_both_ways(card: Emulation, case: RoICase) -> None:
    """Forward, and the transpose in every variant, against the reference."""
    *arguments, values = case
    shape, dtype = tuple(case.features.shape), case.features.dtype
    assert_near(_cuda.roi_align(*arguments), _torch.roi_align(*arguments), dtype)
    backward = (values, case.boxes, case.batch_index, case.grid, shape)
    expected = _torch.roi_align_transposed(*backward)
    for capability in ((9, 0), (8, 6)):
        card.capability = capability
        assert_near(_cuda.roi_align_transposed(*backward), expected, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert_near(_cuda.roi_align_transposed(*backward), expected, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "size", "samples"),
    [
        (1, (3, 4, 2), 1),
        (3, (2, 2, 3), 2),
        (4, (7, 7, 7), 1),
        (33, (2, 3, 3), 3),
        (64, (3, 2, 4), 2),
        (8, (1, 2, 2), 5),
    ],
)
def test_every_type_and_number_of_channels(
    card: Emulation, dtype: torch.dtype, channels: int, size: Triple, samples: int
) -> None:
    assert_both_ways(card, roi_case(channels, size, samples, dtype))
    width = 16 // dtype.itemsize
    wide = dtype != torch.float64 and channels % width == 0
    assert (f"roi_align_{str(dtype)[6:]}_wide" in card.launched) == wide


def test_two_lines_of_the_cache_at_a_time_where_there_is_work_enough(
    card: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_both_ways(card, roi_case(128, (2, 3, 2), 2))
    assert not any("widest" in name for name in card.launched)
    monkeypatch.setattr(_cuda, "_BUSY", 1)
    for case in (roi_case(128, (2, 3, 2), 2), roi_case(64, (7, 7, 7), 1), roi_case(64, (2, 3, 2), 1, torch.float16)):
        assert_both_ways(card, case)
    widest = [name for name in card.launched if "widest" in name]
    assert widest == ["roi_align_float32_widest", "roi_align_gather_float32_widest"] * 2


@some
@given(
    size=st.tuples(*[st.integers(1, 5)] * 3),
    samples=st.integers(1, 4),
    channels=st.integers(1, 9),
    seed=st.integers(0, 9999),
)
def test_any_geometry(card: Emulation, size: Triple, samples: int, channels: int, seed: int) -> None:
    assert_both_ways(card, roi_case(channels, size, samples, seed=seed))


@pytest.mark.parametrize(("size", "samples"), [((40, 1, 1), 5), ((1, 40, 2), 2), ((2, 3, 40), 1), ((14, 14, 14), 1)])
def test_many_bins_and_samples(card: Emulation, size: Triple, samples: int) -> None:
    assert_both_ways(card, roi_case(4, size, samples, count=10))


def test_samples_are_exactly_where_the_reference_has_them(card: Emulation) -> None:
    """On the outer border a sample counts or not by its last bit: boxes that put samples there."""
    steps = torch.arange(-64, 64) / 2**20
    boxes = torch.stack(
        [steps * 0 - 0.5 + steps, steps * 0, steps * 0, steps * 0 + 9.5, 0 * steps + 4, 0 * steps + 4], 1
    )
    arguments = (torch.ones(1, 1, 9, 4, 4), boxes * 3.1, torch.zeros(128, dtype=torch.int64))
    grid = RoIGrid((10, 1, 1), (1 / 3.1,) * 3, 1)
    assert_near(_cuda.roi_align(*arguments, grid), _torch.roi_align(*arguments, grid), torch.float32)


def test_memory_of_any_layout_and_alignment(card: Emulation) -> None:
    case = roi_case(8, (2, 3, 2), 1)
    expected = _torch.roi_align(*case[:4])
    for features in (
        case.features,
        case.features.to(memory_format=torch.channels_last_3d),
        torch.cat([noise(2, 3, 7, 8, 9).float(), case.features], 1)[:, 3:],
        noise(2 * 7 * 8 * 9 * 8 + 1).float()[1:].view(2, 7, 8, 9, 8).permute(0, 4, 1, 2, 3).copy_(case.features),
    ):
        assert_near(_cuda.roi_align(features, *case[1:4]), expected, torch.float32)
    assert card.launched == ["roi_align_float32_wide"] * 3 + ["roi_align_float32"]
    ones = torch.ones(()).expand(14, 8, 2, 3, 2)  # what the gradient of a sum is
    backward = (case.boxes, case.batch_index, case.grid, tuple(case.features.shape))
    actual = _cuda.roi_align_transposed(ones, *backward)
    assert_near(actual, _torch.roi_align_transposed(ones, *backward), torch.float32)


def test_more_rois_than_a_grid_has_rows_and_tables_in_parts(card: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_LARGEST_GRID_Y", 3)
    monkeypatch.setattr(_cuda, "_TABLE_BYTES", 5 * 500)
    assert_both_ways(card, roi_case(5, (2, 2, 2), 2))
    assert card.launched.count("roi_align_taps_float32") > 6


def test_without_atomics_only_where_pytorch_is_told_to_be_deterministic(card: Emulation) -> None:
    assert_both_ways(card, roi_case(4, (2, 2, 2), 1))
    kinds = [name for name in card.launched if "scatter" in name or "gather" in name]
    assert kinds == ["roi_align_scatter_float32_wide", "roi_align_scatter_float32", "roi_align_gather_float32_wide"]


@pytest.mark.parametrize(("count", "batch", "channels"), [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
def test_empty_arguments_give_empty_or_zero(card: Emulation, count: int, batch: int, channels: int) -> None:
    boxes, index = random_boxes(count, 0), torch.zeros(count, dtype=torch.int64)
    grid = RoIGrid((2, 3, 2), (1.0, 1.0, 1.0), 1)
    result = _cuda.roi_align(torch.ones(batch, channels, 4, 5, 6), boxes, index, grid)
    assert result.shape == (count, channels, 2, 3, 2)
    assert not result.any()
    back = _cuda.roi_align_transposed(
        torch.ones(count, channels, 2, 3, 2), boxes, index, grid, (batch, channels, 4, 5, 6)
    )
    assert back.shape == (batch, channels, 4, 5, 6)
    assert not back.any()
    assert len(card.launched) == (batch == 0)


@pytest.mark.parametrize(
    "case",
    [
        roi_case(1, (1, 1, 1), 40, count=10),  # taps of one column alone exceed the shared memory
        roi_case(1, (900, 1, 1), 4, count=10),
        roi_case(2, (1, 1, 1), 1, count=10)._replace(features=torch.ones(2, 2, 7, 8, 9).to(torch.float8_e5m2)),
    ],
    ids=["samples", "bins", "type"],
)
def test_what_exceeds_a_limit_goes_to_the_reference(card: Emulation, case: RoICase) -> None:
    result = _cuda.roi_align(*case[:4])
    assert not card.launched
    assert torch.equal(result.float(), _torch.roi_align(*case[:4]).float())


def test_sizes_beyond_32_bits_are_not_launched() -> None:
    def fits(**changed: Any) -> bool:
        sizes = {"rois": 9, "batch": 1, "channels": 64, "extent": (32, 32, 32), "dtype": torch.float32} | changed
        return _cuda._Call(**sizes, grid=RoIGrid((7, 7, 7), (1.0, 1.0, 1.0), 1)).fits()

    assert fits()
    assert fits(extent=(2000, 2000, 2000))  # more than 2**31 cells
    assert not fits(rois=2**31)
    assert not fits(extent=(8, 4096, 4096))  # a plane of 4 GB
    assert not fits(extent=(2**31, 1, 1))
    assert not fits(batch=2**20, extent=(64, 1, 1))
    assert not fits(dtype=torch.float8_e5m2)


# ---------------------------------------------------------------------------------------------- paste masks


def assert_painted(masks: Tensor, boxes: Tensor, shape: Triple, threshold: float = 0.5) -> Tensor:
    """As the reference paints, but where a mask comes within 1e-5 of the threshold."""
    labels = torch.arange(1, len(masks) + 1, dtype=torch.int32) * 7
    result = _cuda.paste_masks(masks, boxes, labels, shape, threshold)
    below, above = (_torch.paste_masks(masks, boxes, labels, shape, threshold + step) for step in (-1e-5, 1e-5))
    sure = below == above
    assert result.dtype == torch.int32
    assert result.shape == shape
    assert torch.equal(result[sure], below[sure])
    return result


@some
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 70)),
    cells=st.tuples(*[st.integers(1, 5)] * 3),
    count=st.integers(0, 6),
    double=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_masks_are_painted_as_by_the_reference(
    card: Emulation, shape: Triple, cells: Triple, count: int, double: bool, seed: int
) -> None:
    masks = noise(count, *cells, seed=seed).sigmoid()
    boxes = random_boxes(count, seed, extent=20.0, sides=(-0.5, 50.0))
    assert_painted(masks if double else masks.float(), boxes.double() if seed % 2 else boxes, shape)


def test_boxes_anywhere_and_masks_without_numbers(card: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    inf, nan = math.inf, math.nan
    boxes = torch.tensor(
        [
            [0, 0, 0, nan, 4, 4],
            [0, 0, 0, inf, 4, 4],
            [-inf, 0, 0, 4, 4, 4],
            [1e30, 0, 0, 2e30, 4, 4],
            [5, 0, 0, 1, 4, 4],
            [0, 0, 0, 0.4, 9, 9],
            [-3e38, -3e38, 2, 3e38, 3e38, 3],
            [2, 2, 2, 6, 6, 6],
            [-1e9, 1, 1, 1e9, 1.6, 9],
        ]
    )
    masks = torch.ones(len(boxes), 2, 3, 2)
    masks[7, 0] = nan
    monkeypatch.setattr(_cuda, "_LARGEST_GRID_Y", 2)
    result = assert_painted(masks, boxes, (6, 7, 40))
    assert result.unique().tolist() == [0, 49, 56, 63]


def test_the_first_mask_keeps_what_it_claims_whatever_the_order_of_the_blocks(card: Emulation) -> None:
    boxes = torch.tensor([[2.0, 2, 2, 4, 4, 4], [0, 0, 0, 6, 6, 6], [1, 1, 1, 5, 5, 5]])
    result = assert_painted(torch.ones(3, 1, 1, 1), boxes, (6, 6, 6))
    assert result.flatten().bincount().tolist() == [0] * 7 + [8] + [0] * 6 + [208]
    assert card.launched == ["paste_ranks_float32", "paste_labels"]


def test_a_volume_without_voxels_or_masks_launches_nothing(card: Emulation) -> None:
    assert _cuda.paste_masks(torch.ones(1, 1, 1, 1), random_boxes(1, 0), torch.ones(1).int(), (0, 4, 4), 0.5).shape == (
        0,
        4,
        4,
    )
    empty = torch.zeros(0, dtype=torch.int32)
    assert not _cuda.paste_masks(torch.ones(0, 2, 2, 2), random_boxes(0, 0), empty, (2, 2, 2), 0.5).any()
    assert not card.launched
