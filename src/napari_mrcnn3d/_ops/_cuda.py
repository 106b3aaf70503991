"""The kernels for CUDA devices: csrc/cuda_kernels.cuh, compiled at first use for the very GPU (see ``_nvrtc``).

They run on PyTorch's current stream; their temporaries come from PyTorch's allocator on that stream, which is what
makes it safe to drop them while a kernel still runs. What exceeds a limit of theirs goes to ``_torch``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from napari_mrcnn3d._ops import _torch
from napari_mrcnn3d._ops._torch import RoIGrid

_LARGEST_INT = 2**31 - 1
_LARGEST_GRID_Y = 65535
_SHARED_BYTES = 48 << 10
"""Shared memory that every card gives a block without being asked."""

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_OLDEST_CAPABILITY = (6, 0)  # adds doubles atomically
_WIDE_ATOMICS = (9, 0)  # adds four floats in one transaction

_NMS_CHUNK = 8192
"""Boxes compared with each other at a time: their bit matrix takes 8 MB and stays in the second-level cache."""

_TABLE_BYTES = 1 << 30
"""For the taps of RoIs sorted by cell; more RoIs are done in parts."""

_ALIGN_THREADS, _CELL_THREADS, _TILE_WIDTH = 416, 256, 8  # as in cuda_kernels.cuh
_LANE_BYTES = 128
"""What the lanes of a column read together: a line of the cache."""

_BUSY = 1024
"""Blocks that keep the largest cards busy: rather more and smaller blocks than fewer."""

_PASTE_TILE = (4, 8, 32)  # as there
_PASTE_BLOCKS = 8192
"""That the masks share, at least: several for every processor of the largest cards."""

_Argument: TypeAlias = Tensor | int | float | None


# ---------------------------------------------------------------------------------------------- state


def problem(device: torch.device) -> str | None:
    """Why these kernels cannot be used on a device, in one sentence; None if they can.

    Compiles and loads them if that has not happened yet (seconds), or takes them from the cache.
    """
    if device.type != "cuda":
        return f"These kernels are for CUDA devices, not for {device.type}."
    if torch.version.cuda is None:
        return "This PyTorch is built without CUDA."
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here."
    return _problem(_index(device))


def describe(device: torch.device) -> str:
    """How the kernels come to a device, e.g. ``CUDA 13.0 through NVRTC, sm_90, kept in <folder>``."""
    from napari_mrcnn3d._ops import _nvrtc

    number = ".".join(map(str, _nvrtc.version()))
    return f"CUDA {number} through NVRTC, {_nvrtc.architecture(_capability(device))}, kept in {_nvrtc.cache_folder()}"


@cache
def _problem(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        return f"The GPU is too old: its compute capability is {capability[0]}.{capability[1]}, 6.0 is needed."
    wanted = (torch.version.cuda or "").partition(".")[0]
    if wanted not in ("12", "13"):
        return f"PyTorch is built for CUDA {torch.version.cuda}; the kernels need a build for CUDA 12 or 13."
    try:
        from cuda.bindings import __version__ as bindings

        if bindings.partition(".")[0] != wanted:
            return f"cuda-bindings {bindings} does not fit PyTorch's CUDA {wanted}; {_remedy(wanted)}."
        from napari_mrcnn3d._ops import _nvrtc
    except ImportError as error:
        return f"NVIDIA's Python package {error.name or 'cuda-core'} is missing or too old; {_remedy(wanted)}."
    try:
        _nvrtc.load(index)
    except _nvrtc.UnusableError as error:
        return f"{error}; {_remedy(wanted)}."
    return None


def _remedy(major: str) -> str:
    """The one command that brings what is missing, for this major version of CUDA."""
    compiler = "nvidia-cuda-nvrtc-cu12" if major == "12" else f"nvidia-cuda-nvrtc=={major}.*"
    return f'run: pip install "cuda-core>=1" "cuda-bindings=={major}.*" "{compiler}"'


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _launch(
    device: torch.device,
    name: str,
    grid: tuple[int, int],
    threads: int,
    shared: int,
    arguments: list[_Argument],
) -> None:
    """Enqueue one kernel. Tests put their emulation in the place of this function."""
    from napari_mrcnn3d._ops import _nvrtc

    _nvrtc.launch(_index(device), name, grid, threads, shared, [_plain(argument) for argument in arguments])


def _plain(argument: _Argument) -> int | float:
    """A tensor as its address, none as 0."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


# ---------------------------------------------------------------------------------------------- nms


def nms_sorted(boxes: Tensor, threshold: float, groups: Tensor | None, max_keep: int | None) -> Tensor:
    """Positions kept by greedy suppression of float32 boxes [N, 6] that come best first.

    Waits for the device once, at the end, to learn how many there are.
    """
    count = len(boxes)
    limit = count if max_keep is None else min(max_keep, count)
    kept = torch.empty(limit, dtype=torch.int64, device=boxes.device)
    if limit == 0:
        return kept
    kept_count = torch.zeros(1, dtype=torch.int64, device=boxes.device)
    chunk = min(_NMS_CHUNK, count)
    words = -(-chunk // 64)
    matrix = torch.empty(chunk * words, dtype=torch.int64, device=boxes.device)
    dropped = torch.zeros(words, dtype=torch.int64, device=boxes.device)
    for begin in range(0, count, chunk):
        size = min(chunk, count - begin)
        words = -(-size // 64)
        some: list[_Argument] = [boxes, groups, begin, size, float(threshold)]
        if begin > 0:
            dropped.zero_()
            parts = min(64, -(-min(begin, limit) // 64))
            _launch(boxes.device, "nms_drop", (words, parts), 64, 0, [*some, kept, kept_count, limit, dropped])
        pairs = (words + 1, (words + 1) // 2)
        _launch(boxes.device, "nms_compare", pairs, 64, 0, [*some, kept_count, limit, matrix])
        _launch(
            boxes.device, "nms_keep", (1, 1), 1024, words * 8, [begin, size, matrix, dropped, limit, kept, kept_count]
        )
    return kept[: int(kept_count)]


# ---------------------------------------------------------------------------------------------- roi align


class _Call(NamedTuple):
    """The geometry of one RoIAlign, whichever way."""

    rois: int
    batch: int
    channels: int
    extent: tuple[int, ...]
    grid: RoIGrid
    dtype: torch.dtype

    @property
    def sum_bytes(self) -> int:
        return 8 if self.dtype == torch.float64 else 4

    @property
    def tap_bytes(self) -> int:
        return 2 * self.sum_bytes

    @property
    def taps(self) -> int:
        """Places for the taps of a RoI, those of the three axes one after the other."""
        return 2 * self.grid.samples * sum(self.grid.size)

    @property
    def columns(self) -> int:
        return self.grid.size[1] * self.grid.size[2]

    def fits(self) -> bool:
        """Whether all that the kernels hold in 32 bits does, a plane's bytes among it."""
        _, height, width = self.extent
        plane = max(height * width, self.columns) * self.channels * self.dtype.itemsize
        layers = self.batch * self.extent[0] * self.channels
        sizes = (2 * self.rois, sum(self.extent), plane, 2 * layers, self.taps)  # twice: a loop's next step must fit
        return self.dtype in _NAMES and max(sizes) <= _LARGEST_INT

    def slices(self, lanes: int, vector: int) -> int:
        return -(-self.channels // (lanes * vector))

    def arguments(self, lanes: int, columns: int) -> list[_Argument]:
        """What every kernel takes last."""
        axes = zip(self.grid.size, self.extent, map(float, self.grid.scale), strict=True)
        flat = [value for axis in axes for value in axis]
        return [self.rois, self.batch, self.channels, lanes, columns, *flat, self.grid.samples]


def _vector(tensor: Tensor, channels: int, wanted: int) -> int:
    """Channels per thread: as many as wanted if they and the memory are aligned so, else one."""
    aligned = tensor.data_ptr() % (wanted * tensor.element_size()) == 0
    return wanted if aligned and channels % wanted == 0 and tensor.dtype != torch.float64 else 1


def _wide_vector(tensor: Tensor, channels: int, blocks: int) -> int:
    """Channels per thread for 16 bytes at a time, or in float32 for twice that where there are blocks enough."""
    vector = _vector(tensor, channels, 16 // tensor.element_size())
    twice = 2 * _LANE_BYTES // tensor.element_size()  # channels of a block, in two lines
    if tensor.dtype == torch.float32 and vector > 1 and channels % twice == 0 and blocks * channels >= twice * _BUSY:
        return 2 * vector
    return vector


def _lanes(channels: int, vector: int, element_bytes: int) -> int:
    """Threads per column: a line of the cache, at most a warp, and no more than there are channels for."""
    return min(_LANE_BYTES // min(16, vector * element_bytes), 32, -(-channels // vector))


def _kernel(name: str, dtype: torch.dtype, vector: int) -> str:
    width = "" if vector == 1 else "_widest" if vector * dtype.itemsize == 32 else "_wide"
    return f"{name}_{_NAMES[dtype]}{width}"


def _shared_bytes(call: _Call, columns: int = 0) -> int:
    """Shared memory for the taps along each axis, and for those multiplied out of some columns of bins."""
    taps = call.taps + columns * (2 * call.grid.samples) ** 2
    return taps * call.tap_bytes + sum(call.grid.size) * 4


def roi_align(features: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid) -> Tensor:
    """RoIAlign [K, C, PD, PH, PW] in channels_last_3d, in the features' dtype."""
    batch, channels, *extent = features.shape
    call = _Call(len(boxes), batch, channels, tuple(extent), grid, features.dtype)
    if not call.fits() or _columns_per_block(call, 1) == 0:
        return _torch.roi_align(features, boxes, batch_index, grid)
    out = features.new_empty((len(boxes), *grid.size, channels))
    if out.numel():
        maps = features.permute(0, 2, 3, 4, 1).contiguous()
        _align(maps, boxes, batch_index, out, call)
    return out.permute(0, 4, 1, 2, 3)


def _align(maps: Tensor, boxes: Tensor, batch_index: Tensor, out: Tensor, call: _Call) -> None:
    vector = _wide_vector(maps, call.channels, call.rois)
    lanes = _lanes(call.channels, vector, maps.element_size())
    parts = -(-call.columns // _columns_per_block(call, lanes))
    columns = -(-call.columns // parts)
    threads = min(_ALIGN_THREADS, -(-columns * lanes // 32) * 32)
    blocks = (call.slices(lanes, vector) * parts, min(call.rois, _LARGEST_GRID_Y))
    arguments = [maps, boxes, batch_index, out, *call.arguments(lanes, columns)]
    name = _kernel("roi_align", maps.dtype, vector)
    _launch(maps.device, name, blocks, threads, _shared_bytes(call, columns), arguments)


def _columns_per_block(call: _Call, lanes: int) -> int:
    """Columns of bins that one block can take; 0 if not even one fits the shared memory."""
    each = _shared_bytes(call, 1) - _shared_bytes(call)
    room = (_SHARED_BYTES - _shared_bytes(call)) // each
    return max(0, min(room, _ALIGN_THREADS // lanes, call.columns))


def roi_align_transposed(
    values: Tensor, boxes: Tensor, batch_index: Tensor, grid: RoIGrid, shape: tuple[int, ...]
) -> Tensor:
    """Values [K, C, PD, PH, PW] spread over features of this shape: the transpose of :func:`roi_align`.

    With atomic additions in no fixed order; where PyTorch is told to be deterministic, cell by cell instead.
    """
    batch, channels, *extent = shape
    call = _Call(len(boxes), batch, channels, tuple(extent), grid, values.dtype)
    if not call.fits() or _shared_bytes(call) > _SHARED_BYTES:
        return _torch.roi_align_transposed(values, boxes, batch_index, grid, shape)
    out = boxes.new_zeros((batch, *extent, channels))
    if out.numel() and values.numel():
        rows = values.permute(0, 2, 3, 4, 1).contiguous()
        table = call.taps * call.tap_bytes + sum(extent) * 8 + 24  # bytes for each RoI, see _spread
        step = max(1, _TABLE_BYTES // table)
        for start in range(0, len(boxes), step):
            part = slice(start, start + step)
            _spread(rows[part], boxes[part], batch_index[part], out, call._replace(rois=len(boxes[part])))
    return out.to(values.dtype).permute(0, 4, 1, 2, 3)


def _spread(rows: Tensor, boxes: Tensor, batch_index: Tensor, out: Tensor, call: _Call) -> None:
    """Add values [K, PD, PH, PW, C] to the cells [N, D, H, W, C] that their RoIs touch."""
    tables = [
        boxes.new_empty(call.rois * call.taps * 2),
        torch.empty(call.rois * sum(call.extent) * 2, dtype=torch.int32, device=boxes.device),
        torch.empty(call.rois * 6, dtype=torch.int32, device=boxes.device),
    ]
    arguments = [boxes, batch_index, *tables, *call.arguments(1, 1)]
    name = f"roi_align_taps_{_NAMES[boxes.dtype]}"
    _launch(boxes.device, name, (call.rois, 1), 128, _shared_bytes(call), arguments)
    if torch.are_deterministic_algorithms_enabled():
        _gather(rows, tables, batch_index, out, call)
    else:
        _scatter(rows, tables, batch_index, out, call)


def _scatter(rows: Tensor, tables: list[Tensor], batch_index: Tensor, out: Tensor, call: _Call) -> None:
    wide = _capability(rows.device) >= _WIDE_ATOMICS
    vector = _vector(rows, call.channels, 4 if wide else 1)
    lanes = _lanes(call.channels, vector, call.sum_bytes)
    blocks = (call.slices(lanes, vector), min(call.rois, _LARGEST_GRID_Y))
    columns = _CELL_THREADS // lanes
    arguments = [rows, *tables, batch_index, out, *call.arguments(lanes, columns)]
    _launch(rows.device, _kernel("roi_align_scatter", rows.dtype, vector), blocks, columns * lanes, 0, arguments)


def _gather(rows: Tensor, tables: list[Tensor], batch_index: Tensor, out: Tensor, call: _Call) -> None:
    depth, height, width = call.extent
    vector = _wide_vector(rows, call.channels, call.batch * depth * height * width // 32)
    lanes = _lanes(call.channels, vector, rows.element_size())
    columns = _CELL_THREADS // lanes // _TILE_WIDTH * _TILE_WIDTH
    tiles = -(-width // _TILE_WIDTH) * -(-height // (columns // _TILE_WIDTH))
    layers = call.batch * depth * call.slices(lanes, vector)
    arguments = [rows, *tables, batch_index, out, *call.arguments(lanes, columns)]
    name = _kernel("roi_align_gather", rows.dtype, vector)
    _launch(rows.device, name, (tiles, min(layers, _LARGEST_GRID_Y)), _CELL_THREADS, 0, arguments)


# ---------------------------------------------------------------------------------------------- paste masks


def paste_masks(masks: Tensor, boxes: Tensor, labels: Tensor, shape: tuple[int, int, int], threshold: float) -> Tensor:
    """Int32 label volume of masks that come best first: where several claim a voxel the first has it."""
    count, *cells = masks.shape
    if max(2 * count, *cells, *shape) > _LARGEST_INT:
        return _torch.paste_masks(masks, boxes, labels, shape, threshold)
    volume = torch.full(shape, count, dtype=torch.int32, device=masks.device)  # the rank that is no mask
    if count and volume.numel():
        tiles = math.prod(-(-side // tile) for side, tile in zip(shape, _PASTE_TILE, strict=True))
        parts = max(1, min(tiles, _PASTE_BLOCKS // count))
        arguments: list[_Argument] = [
            masks.contiguous(),
            boxes.double().contiguous(),
            volume,
            count,
            *cells,
            *shape,
            float(threshold),
        ]
        name = f"paste_ranks_{_NAMES[masks.dtype]}"
        _launch(masks.device, name, (parts, min(count, _LARGEST_GRID_Y)), 256, 0, arguments)
        blocks = min(-(-volume.numel() // 256), 1 << 20)
        _launch(masks.device, "paste_labels", (blocks, 1), 256, 0, [volume, labels, count, volume.numel()])
    return volume
