"""The compiled CPU kernels against PyTorch's, against themselves on other threads, and how they are loaded."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from napari_mrcnn3d._ops import _cpu, _torch
from napari_mrcnn3d._ops._torch import RoIGrid
from tests.ops.helpers import few, noise, random_boxes, zeros_index

many = settings(few, max_examples=150)
Triple = tuple[int, int, int]
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
UNIT_SCALE = (1.0, 1.0, 1.0)


def unavailable(what: str) -> NoReturn:
    """Fail where everything has to be there, skip elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """The compiled library."""
    problem = _cpu.problem(CPU)
    if problem is not None:
        unavailable(problem)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """One thread, or as many as a test asks for: PyTorch's number, which the kernels follow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "own threads"])
def _pool(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads from torch's pool, or from where older versions of PyTorch leave us: our own."""
    library = _cpu._load(_cpu._LIBRARY)
    if request.param == "own threads":
        library.mrcnn3d_use_pool(None)
    yield
    library.mrcnn3d_use_pool(ctypes.c_void_p(_cpu._torch_pool()))


# --- RoIAlign


def roi_case(extent: Triple, channels: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features, boxes of all sorts (no size, far outside, no number, infinite, mirrored) and batch entries."""
    features = noise(2, channels, *extent, seed=seed, dtype=dtype)
    boxes = random_boxes(9, seed, extent=12.0, sides=(-1.0, 14.0)).to(dtype)
    boxes[0, 3:] = boxes[0, :3]
    boxes[1] += 100
    boxes[2, seed % 6], boxes[3, seed % 6] = NAN, INF
    boxes[4] = boxes[4, [3, 4, 5, 0, 1, 2]]
    return features, boxes, torch.randint(-1, 3, (9,), generator=torch.Generator().manual_seed(seed))


@few
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(1, 4),
    st.sampled_from([0, 1, 3, 8, 37, 64, 75]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9999),
)
def test_roi_align_and_its_transpose_match_torch(
    extent: Triple, size: Triple, samples: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    features, boxes, entries = roi_case(extent, channels, seed, dtype)
    grid = RoIGrid(size, (0.5, 0.4, 0.7), samples)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    result = _cpu.roi_align(features, boxes, entries, grid)
    torch.testing.assert_close(result, _torch.roi_align(features, boxes, entries, grid), **tolerance)
    arguments = (noise(*result.shape, seed=seed + 1, dtype=dtype), boxes, entries, grid, tuple(features.shape))
    spread = _cpu.roi_align_transposed(*arguments)
    torch.testing.assert_close(spread, _torch.roi_align_transposed(*arguments), **tolerance)
    with _cpu.baseline():
        assert torch.equal(_cpu.roi_align(features, boxes, entries, grid), result)
        assert torch.equal(_cpu.roi_align_transposed(*arguments), spread)


def test_many_bins_and_samples() -> None:
    features, boxes, entries = roi_case((9, 30, 12), 5, 3, torch.float64)
    grid = RoIGrid((40, 3, 33), (0.8, 1.7, 1.1), 9)
    result = _cpu.roi_align(features, boxes, entries, grid)
    torch.testing.assert_close(result, _torch.roi_align(features, boxes, entries, grid), atol=1e-12, rtol=1e-12)
    weights = noise(*result.shape, seed=1)
    spread = _cpu.roi_align_transposed(weights, boxes, entries, grid, tuple(features.shape))
    torch.testing.assert_close((result * weights).sum(), (features * spread).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "expanded", "requires grad"])
def test_any_precision_and_strides(dtype: torch.dtype, layout: str) -> None:
    """Half precision is rounded once, at the end."""
    features, boxes, entries = roi_case((6, 7, 8), 16, 0, dtype)
    boxes = boxes.to(torch.promote_types(dtype, torch.float32))
    views = {
        "contiguous": lambda x: x,
        "channels last": lambda x: x.to(memory_format=torch.channels_last_3d),
        "strided": lambda x: x.transpose(2, 4)[:, ::2],
        "expanded": lambda x: x[:1, :1].expand(2, 5, -1, -1, -1),
        "requires grad": lambda x: x.requires_grad_(),
    }
    view, grid = views[layout](features), RoIGrid((2, 3, 4), (0.5, 0.4, 0.7), 2)
    result = _cpu.roi_align(view, boxes, entries, grid)
    exact = _torch.roi_align(view.detach().double(), boxes.double(), entries, grid)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)
    spread = _cpu.roi_align_transposed(result, boxes, entries, grid, tuple(view.shape))
    exact = _torch.roi_align_transposed(result.double(), boxes.double(), entries, grid, tuple(view.shape))
    assert spread.dtype == dtype
    torch.testing.assert_close(spread.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_inference_mode() -> None:
    with torch.inference_mode():
        features, boxes, entries = roi_case((3, 4, 5), 4, 0, torch.float32)
        result = _cpu.roi_align(features, boxes, entries, RoIGrid((2, 2, 2), UNIT_SCALE, 1))
        torch.testing.assert_close(
            result, _torch.roi_align(features, boxes, entries, RoIGrid((2, 2, 2), UNIT_SCALE, 1))
        )


@pytest.mark.parametrize(("batch", "channels", "count"), [(1, 2, 0), (0, 2, 3), (1, 0, 3), (0, 0, 0)])
def test_nothing_in_gives_nothing_out(batch: int, channels: int, count: int) -> None:
    features, boxes, entries = torch.zeros(batch, channels, 4, 4, 4), random_boxes(count, 0), zeros_index(count)
    grid = RoIGrid((2, 3, 4), UNIT_SCALE, 1)
    result = _cpu.roi_align(features, boxes, entries, grid)
    assert result.shape == (count, channels, 2, 3, 4)
    assert not result.any()
    spread = _cpu.roi_align_transposed(result, boxes, entries, grid, tuple(features.shape))
    assert spread.shape == features.shape
    assert not spread.any()


def sparse(path: Path, *shape: int) -> Tensor:
    """Zeros that take no memory until they are read, channels last whatever the shape's order says."""
    count = int(torch.tensor(shape).prod())
    flat = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    batch, channels, *extent = shape
    return flat.view(batch, *extent, channels).permute(0, 4, 1, 2, 3)


def test_more_than_two_to_the_31_features(tmp_path: Path) -> None:
    features = sparse(tmp_path / "features", 2, 64, 256, 256, 264)
    assert features.numel() > 2**31
    features[-1, :, -4:, -4:, -4:] = noise(64, 4, 4, 4, dtype=torch.float32)
    box, grid = torch.tensor([[252.5, 252.5, 260.5, 256, 256, 264]]), RoIGrid((2, 2, 2), UNIT_SCALE, 2)
    result = _cpu.roi_align(features, box, torch.tensor([1]), grid)
    corner = features[1:, :, -8:, -8:, -8:]
    moved = box - torch.tensor([248.0, 248, 256, 248, 248, 256])
    torch.testing.assert_close(result, _torch.roi_align(corner, moved, zeros_index(1), grid))
    assert result.abs().min() > 0


def test_more_than_two_to_the_31_values(tmp_path: Path) -> None:
    count = 24_600
    values = sparse(tmp_path / "values", count, 256, 7, 7, 7)
    assert values.numel() > 2**31
    values[-1] = noise(256, 7, 7, 7, dtype=torch.float32)
    entries = torch.full((count,), -1)
    entries[-1] = 0
    boxes, grid = random_boxes(count, 0, extent=4.0), RoIGrid((7, 7, 7), UNIT_SCALE, 1)
    result = _cpu.roi_align_transposed(values, boxes, entries, grid, (1, 256, 4, 4, 4))
    expected = _torch.roi_align_transposed(values[-1:], boxes[-1:], entries[-1:], grid, (1, 256, 4, 4, 4))
    torch.testing.assert_close(result, expected)


def test_too_little_memory_for_the_temporaries_is_an_error() -> None:
    features = torch.zeros(1, 1, 1, 1, 1 << 22)
    grid = RoIGrid((1, 1, 1 << 20), UNIT_SCALE, 1 << 22)
    with pytest.raises(MemoryError, match="roi_align"):
        _cpu.roi_align(features, torch.zeros(1, 6), zeros_index(1), grid)


def test_what_the_library_cannot_count_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    features, boxes, entries = roi_case((6, 7, 8), 64, 0, torch.float32)
    grid = RoIGrid((2, 3, 4), (0.5, 0.4, 0.7), 3)
    result = _torch.roi_align(features, boxes, entries, grid)
    arguments = (result, boxes, entries, grid, tuple(features.shape))
    assert not torch.equal(_cpu.roi_align(features, boxes, entries, grid), result)  # differs in rounding
    monkeypatch.setattr(_cpu, "_MOST_ALONG_AN_AXIS", 7)
    assert torch.equal(_cpu.roi_align(features, boxes, entries, grid), result)
    assert torch.equal(_cpu.roi_align_transposed(*arguments), _torch.roi_align_transposed(*arguments))


# --- NMS


@many
@given(
    st.sampled_from([0, 1, 15, 16, 17, 300, 1100]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([None, 0, 3, 600, 5000]),
    st.sampled_from([None, 2**33, 2**62, 1]),
    st.booleans(),
    st.integers(0, 9999),
)
def test_nms_matches_torch_bit_for_bit(
    count: int, threshold: float, max_keep: int | None, spacing: int | None, ties: bool, seed: int
) -> None:
    """Exact ties, boxes of no volume, no number, infinite; groups that differ in either half of their 64 bits."""
    boxes = random_boxes(count, seed, extent=20.0, sides=(-0.5, 8.0), step=0.5 if ties else None)
    generator = torch.Generator().manual_seed(seed)
    if count > 15:
        boxes[::7, seed % 6] = NAN
        boxes[3, 3:], boxes[4, :3] = INF, -INF
        boxes[11] = boxes[5]
    groups = None if spacing is None else (torch.randint(0, 3, (count,), generator=generator) - 1) * spacing
    expected = _torch.nms_sorted(boxes, threshold, groups, max_keep)
    for instructions in (nullcontext(), _cpu.baseline()):
        with instructions:
            kept = _cpu.nms_sorted(boxes, threshold, groups, max_keep)
        assert kept.dtype == torch.int64
        assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize("stretch", [(30.0, 1, 1), (1, 30, 1), (1, 1, 30), (4, 4, 4), (0, 0, 0)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_nms_of_boxes_in_many_slabs_matches_torch(stretch: tuple[float, ...], threshold: float) -> None:
    """Boxes in a long row along each axis, some across all of it, upside down, at an end of the numbers, or nowhere."""
    boxes = random_boxes(3000, 7, extent=10.0, sides=(1.0, 6.0), step=0.5)
    move = (
        torch.rand(3000, 3, generator=torch.Generator().manual_seed(7)) * 10 * (torch.tensor(stretch) - 1).clamp(min=0)
    )
    boxes += move.round().repeat(1, 2)
    boxes[::97, :3], boxes[::89, 3:] = -500, 500
    boxes[::83] = boxes[::83].roll(3, 1)
    boxes[::79, 3:], boxes[::73, :3] = 3e38, -INF
    boxes[::71, 4] = NAN
    groups = torch.arange(3000) % 2
    for wanted in (None, groups):
        expected = _torch.nms_sorted(boxes, threshold, wanted, None)
        assert 50 < len(expected) < 3000
        assert torch.equal(_cpu.nms_sorted(boxes, threshold, wanted, None), expected)


def test_a_million_boxes() -> None:
    boxes = random_boxes(1_000_000, 0, extent=30.0)
    assert len(_cpu.nms_sorted(boxes, 0.7, None, 500)) == 500
    kept = _cpu.nms_sorted(boxes, 0.05, None, None)
    assert kept.tolist() == _torch.nms_sorted(boxes[: int(kept[-1]) + 1], 0.05, None, None).tolist()


# --- masks


@many
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(0, 6),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 9999),
)
def test_paste_masks_matches_torch(shape: Triple, cells: Triple, count: int, dtype: torch.dtype, seed: int) -> None:
    """Wherever a mask is not within 1e-5 of the threshold."""
    masks = torch.rand(count, *cells, generator=torch.Generator().manual_seed(seed))
    boxes = random_boxes(count, seed, extent=12.0, sides=(-0.5, 14.0)).to(dtype)
    if count > 2:
        masks[0, 0, 0, 0] = NAN
        boxes[1, seed % 6] = [NAN, INF, -INF][seed % 3]
    labels = torch.arange(count, dtype=torch.int32) - 2
    result = _cpu.paste_masks(masks, boxes, labels, shape, 0.5)
    sure, also = (_torch.paste_masks(masks, boxes, labels, shape, 0.5 + margin) for margin in (1e-5, -1e-5))
    assert result.dtype == torch.int32
    assert torch.equal(torch.where(sure == also, result, sure), sure)
    with _cpu.baseline():
        assert torch.equal(_cpu.paste_masks(masks, boxes, labels, shape, 0.5), result)


@pytest.mark.parametrize("far", [1e9, 2.0**31, 2.0**63, 1e30, 1e300])
def test_boxes_that_reach_far_out(far: float) -> None:
    boxes = torch.tensor(
        [[far, 0, 0, 2 * far, 4, 4], [-2 * far, 0, 0, -far, 4, 4], [1, -far, -far, 3, far, far]], dtype=torch.float64
    )
    result = _cpu.paste_masks(torch.ones(3, 2, 2, 2), boxes, torch.tensor([1, 2, 3]).int(), (4, 5, 6), 1.0)
    expected = torch.zeros(4, 5, 6, dtype=torch.int32)
    expected[1:3] = 3
    assert torch.equal(result, expected)


def test_masks_of_no_finite_value_and_of_double_precision() -> None:
    box, label = torch.tensor([[0.0, 0, 0, 2, 2, 2]]), torch.tensor([7]).int()
    for value, painted in ((INF, True), (-INF, False), (NAN, False)):
        masks = torch.full((1, 2, 2, 2), value)
        assert _cpu.paste_masks(masks, box, label, (2, 2, 2), 0.5).eq(7).all() == painted
    assert _cpu.paste_masks(torch.ones(1, 1, 1, 1).double(), box, label, (2, 2, 2), 0.5).eq(7).all()


# --- threads and processes


def calls() -> list[Callable[[], Tensor]]:
    """Every kernel, on inputs large enough that threads share the work."""
    features, entries = noise(2, 130, 9, 20, 20, dtype=torch.float32), torch.arange(40) % 2
    grid, large = RoIGrid((5, 5, 5), UNIT_SCALE, 2), RoIGrid((9, 9, 9), UNIT_SCALE, 1)
    boxes, many = random_boxes(40, 0, extent=20.0), random_boxes(6000, 1, extent=80.0)
    values, value = noise(40, 130, 5, 5, 5, dtype=torch.float32), noise(1, 130, 9, 9, 9, dtype=torch.float32)
    masks, labels = torch.rand(40, 9, 9, 9, generator=torch.Generator().manual_seed(0)), torch.arange(40).int()
    return [
        lambda: _cpu.roi_align(features, boxes, entries, grid),
        lambda: _cpu.roi_align(features, boxes[:1], entries[:1], large),
        lambda: _cpu.roi_align_transposed(values, boxes, entries, grid, tuple(features.shape)),
        lambda: _cpu.roi_align_transposed(value, boxes[:1], entries[:1], large, (1, 130, 1, 20, 20)),
        lambda: _cpu.nms_sorted(many, 0.4, None, None),
        lambda: _cpu.paste_masks(masks, boxes, labels, (90, 110, 120), 0.5),
    ]


@pytest.mark.usefixtures("_pool")
def test_the_same_bits_for_any_number_of_threads_and_each_time(threads: Callable[[int], None]) -> None:
    threads(1)
    expected = [call() for call in calls()]
    for count in (2, 3, 3):
        threads(count)
        for call, result in zip(calls(), expected, strict=True):
            assert torch.equal(call(), result)


@pytest.mark.usefixtures("_pool")
def test_several_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = [call() for call in calls()] * 4
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda call: call(), calls() * 4))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


FORK = """
import os, signal, sys, torch
from napari_mrcnn3d._ops import _cpu
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
low = torch.rand(6000, 3, generator=generator) * 60
boxes = torch.cat([low, low + 8], 1)
before = _cpu.nms_sorted(boxes, 0.7, None, None).tolist()
child = os.fork()
if child == 0:
    signal.alarm(40)  # ends it should it hang
    os._exit(_cpu.nms_sorted(boxes, 0.7, None, None).tolist() != before)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_although_the_threads_stayed_behind() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_spawned_child_computes() -> None:
    boxes = random_boxes(50, 0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        kept = pool.apply_async(_cpu.nms_sorted, (boxes, 0.3, None, None)).get(timeout=60)
    assert kept.tolist() == _cpu.nms_sorted(boxes, 0.3, None, None).tolist()


# --- the library


def test_what_it_says_about_itself() -> None:
    assert _cpu.problem(CPU) is None
    said = _cpu.describe(CPU)
    assert said.startswith("compiled (_ops_cpu.")
    with _cpu.baseline():
        assert ", baseline, " in _cpu.describe(CPU)
    assert _cpu.describe(CPU) == said


def test_torch_lends_its_threads_without_being_loaded_twice() -> None:
    newest = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
    assert ("PyTorch's threads" in _cpu.describe(CPU)) == newest
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libtorch_cpu" in line}
        assert len(loaded) == 1


@pytest.mark.parametrize("holder", [Path("nowhere"), _cpu._LIBRARY])
def test_its_own_threads_where_torch_lends_none(holder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "__file__", str(holder))
    monkeypatch.setattr(_cpu, "_torch_pool", _cpu._torch_pool.__wrapped__)
    assert _cpu.describe(CPU).endswith(", its own threads")


def test_another_device_is_refused() -> None:
    assert "cuda" in str(_cpu.problem(torch.device("cuda")))


def problem_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_cpu, "_LIBRARY", path)
    problem = _cpu.problem(CPU)
    assert problem is not None
    assert problem.endswith(".")
    assert str(path.parent) not in problem
    return problem


def test_a_missing_or_corrupt_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = _cpu._LIBRARY.read_bytes(), tmp_path / _cpu._LIBRARY.name
    assert "missing" in problem_of(path, monkeypatch)
    for content in (b"", b"not a library", whole[:70], whole[:5000], whole[:-1]):
        path.write_bytes(content)
        assert "cannot be loaded" in problem_of(path, monkeypatch)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int other() { return 0; }", "another library"),
        ('const char* mrcnn3d_signature() { return "ops"; } int mrcnn3d_abi() { return 1; }', "another library"),
        (
            'const char* mrcnn3d_signature() { return "napari-mrcnn3d ops"; } int mrcnn3d_abi() { return -5; }'
            'const char* mrcnn3d_instruction_set() { return ""; }',
            "interface -5",
        ),
    ],
)
def test_a_foreign_or_stale_library_is_a_reason(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        unavailable("there is no C compiler")
    (tmp_path / "other.c").write_text(source)
    path = tmp_path / _cpu._LIBRARY.name
    subprocess.run([str(compiler), "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(path)], check=True)
    assert reason in problem_of(path, monkeypatch)
