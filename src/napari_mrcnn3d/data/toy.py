"""The predecessor's toy images: turned ellipsoids, cuboids and pyramids, hardly visible in noise.

The recipe is that of gdavid57/3d-mask-r-cnn (branch main, 2025-02), kept exactly: how many objects, their sizes and
shapes, three rotations one after the other, where an object may lie, when an image is given up, brightness and noise.

**Rotation.** The recipe calls ``scipy.ndimage.rotate`` three times (cubic spline, grid enlarged, rounded to 0/1 each
time). One rotation by the composed matrix is not the same: on the voxels it makes ellipsoids 0.4 voxels smaller per
side, on the shape's equation 0.9, because the recipe's first rotations keep tips that lie on the voxel grid. So the
three rotations are done, with the same spline, but evaluated only where the answer is open: a cell of the grid whose
four corners agree has their value. The result is the recipe's, voxel for voxel, which the tests hold. It takes 8 ms of
processor time per object instead of 59 ms, and 0.8 s per image of 128 voxels, most of it for the 60 to 120 objects that
are tried (measured on a busy 2-core cloud machine; the predecessor fills its shapes by loops in Python on top).
Sampling the nearest voxel in each rotation would take 0.7 ms per object, but roughens surfaces by 2 to 6 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import spline_filter1d

from napari_mrcnn3d.config import ToyConfig
from napari_mrcnn3d.data import seed_format
from napari_mrcnn3d.data._generate import generate_files
from napari_mrcnn3d.structures import Steps

__all__ = ["ToyImage", "generate_toy_steps", "toy_image"]

_REJECTIONS = 100
"""An image is left as it is after more rejected objects than this."""
_TEST_SHARE = 0.05
_BYTES_PER_VOXEL = 24
"""Memory while an image is made: two float32 volumes of noise, their float64 parts, labels, masks."""
_PLANES = ((1, 2), (0, 2), (0, 1))
"""Axes that the three rotations turn, in their order."""
_FILTER_MARGIN = 6


@dataclass(frozen=True)
class ToyImage(seed_format.Example):
    """A toy image and what is in it.

    Attributes
    ----------
    requested : int
        Objects that were asked for; fewer are there where no more were found room for.
    """

    requested: int


def toy_image(config: ToyConfig, index: int) -> ToyImage:
    """Toy image number ``index``, which depends on the configuration and this number alone.

    Parameters
    ----------
    config : ToyConfig
    index : int
        From 0.

    Returns
    -------
    ToyImage
        A cube, uint8; labels are uint8, or uint16 if more than 255 objects may be asked for.
    """
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, index]))
    requested = int(rng.integers(config.min_objects, config.max_objects, endpoint=True))
    labels = np.zeros((config.image_size,) * 3, np.uint8 if config.max_objects <= 255 else np.uint16)
    classes: list[int] = []
    boxes: list[list[int]] = []
    rejections = 0
    while len(boxes) < requested and rejections <= _REJECTIONS:
        number = int(rng.integers(1, len(seed_format.CLASS_NAMES), endpoint=True))
        solid = _turned(_shape(number, _half_sides(config, rng)), rng.uniform(0, 360, 3))
        box = _place(labels, solid, label=len(boxes) + 1, rng=rng)
        if box is None:
            rejections += 1
        else:
            classes.append(number)
            boxes.append(box)
    signals = rng.uniform(*config.signal, len(boxes))
    return ToyImage(
        image=_observed(labels, signals, rng),
        labels=labels,
        classes=np.array(classes, np.int64),
        boxes=np.array(boxes, np.int64).reshape(-1, 6),
        signals=signals,
        requested=requested,
    )


def generate_toy_steps(
    config: ToyConfig, folder: Path, count: int, *, workers: int = 1, masks: bool = False
) -> Steps[Path]:
    """Write toy images in the predecessor's files, with its split into training and test images.

    Parameters
    ----------
    config : ToyConfig
    folder : Path
        Gets ``images``, ``seg``, ``classes_and_boxes``, ``csvs`` and ``datasets``; files are named 000001, 000002, ...
    count : int
        Images to write; the predecessor's data set has 10 000.
    workers : int
        Processes. The files are the same for any number.
    masks : bool
        Also write ``masks/*.pickle``, which only the predecessor's program needs and which takes most of the time.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UserError
        If the folder cannot be written or already holds images.
    """
    nbytes = _BYTES_PER_VOXEL * config.image_size**3
    task = partial(_write, config=config, masks=masks)
    yield from generate_files(task, folder, count=count, workers=workers, nbytes=nbytes, stage="Generating toy images")
    seed_format.write_splits(Path(folder), test_share=_TEST_SHARE, seed=config.seed)
    return Path(folder)


def _write(index: int, place: Path, *, config: ToyConfig, masks: bool) -> None:
    seed_format.write_example(place, f"{index + 1:06d}", toy_image(config, index), masks=masks)


def _half_sides(config: ToyConfig, rng: np.random.Generator) -> np.ndarray:
    """Whole half sides in voxels, one per axis."""
    half: np.ndarray = (config.base_radius * rng.uniform(0.5, 2.0, 3)).astype(np.int64)
    return half.clip(1)


def _shape(number: int, half: np.ndarray) -> np.ndarray:
    """Voxels (uint8 0/1) of an upright ellipsoid, cuboid or pyramid with these half sides."""
    if number == 1:
        # centred on voxel side // 2, so that the far tip of the longest axis is cut
        m = half.max()
        z, y, x = np.ogrid[-m:m, -m:m, -m:m]
        return np.asarray((z / half[0]) ** 2 + (y / half[1]) ** 2 + (x / half[2]) ** 2 <= 1, np.uint8)
    sides = 2 * half
    if number == 2:
        return np.ones(sides, np.uint8)
    # section [0, (1 - k / height) * side) at height k along the last axis: the apex stands above a corner
    shrink = 1 - np.arange(sides[2]) / sides[2]
    rows = np.arange(sides[0])[:, None, None] < (shrink * sides[0]).astype(int)
    columns = np.arange(sides[1])[None, :, None] < (shrink * sides[1]).astype(int)
    return np.asarray(rows & columns, np.uint8)


def _place(labels: np.ndarray, solid: np.ndarray, *, label: int, rng: np.random.Generator) -> list[int] | None:
    """Write an object where it lies inside as a whole; its box, or None if a voxel is taken.

    The centre (side // 2) is drawn from side // 2 to the image's side less side // 2 less one, as in the recipe, which
    is why objects of even side never touch the far border.
    """
    room = [extent - 2 * (side // 2) for extent, side in zip(labels.shape, solid.shape, strict=True)]
    if not solid.size or min(room) < 1:
        return None
    start = rng.integers(0, room)
    window = labels[tuple(slice(a, a + side) for a, side in zip(start, solid.shape, strict=True))]
    if window[solid].any():
        return None
    window[solid] = label
    return [*start.tolist(), *(start + solid.shape).tolist()]


def _observed(labels: np.ndarray, signals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image: photons inside objects only, two kinds of noise everywhere, stretched to 0..255."""
    noisy = rng.standard_normal(labels.shape, np.float32)
    noisy *= 0.05
    noisy += rng.random(labels.shape, np.float32) * np.float32(0.01)
    inside = labels > 0
    noisy[inside] += rng.poisson(10 * signals[labels[inside].astype(np.intp) - 1]) / 10
    low, high = noisy.min(), noisy.max()
    return np.asarray(255 * ((noisy - low) / (high - low)), np.uint8)


@dataclass(frozen=True)
class _Block:
    """The occupied part of a larger grid, with a margin of empty voxels.

    The recipe's grid, which grows with every rotation, is only counted: its size decides where voxel centres lie.
    """

    voxels: np.ndarray
    start: tuple[int, ...]
    grid: tuple[int, ...]


def _turned(voxels: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """An upright object after the recipe's three rotations (degrees), cut to its bounding box; boolean."""
    grid = tuple(side + 2 for side in voxels.shape)  # the recipe pads by one voxel
    block = _trimmed(voxels, (1, 1, 1), grid)
    for angle, plane in zip(angles, _PLANES, strict=True):
        block = _turn(block, angle, plane)
    return block.voxels[_occupied(block.voxels)].astype(bool)


def _occupied(voxels: np.ndarray) -> tuple[slice, ...]:
    """Bounding box; slices of no length where nothing is occupied."""
    cuts = []
    for axis in range(3):
        hit = np.flatnonzero(voxels.any(axis=tuple({0, 1, 2} - {axis})))
        cuts.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(cuts)


def _trimmed(voxels: np.ndarray, start: tuple[int, ...], grid: tuple[int, ...]) -> _Block:
    """Cut to the occupied voxels and a margin of two, which the spline looks at."""
    box = _occupied(voxels)
    moved = tuple(a + cut.start - 2 for a, cut in zip(start, box, strict=True))
    return _Block(np.pad(voxels[box], 2), moved, grid)


def _turn(block: _Block, angle: float, plane: tuple[int, int]) -> _Block:
    """What ``scipy.ndimage.rotate(order=3, reshape=True)`` makes of 0/1 voxels: the spline, at least 1/2 or not."""
    first, second = plane
    third = 3 - first - second
    voxels = np.ascontiguousarray(block.voxels.transpose(first, second, third))
    grid, (u, v) = _sources((block.grid[first], block.grid[second]), angle)
    u, v = u - block.start[first], v - block.start[second]
    # outside this range all corners are the margin's zeros
    pixels = np.nonzero((u >= 1) & (u < voxels.shape[0] - 2) & (v >= 1) & (v < voxels.shape[1] - 2))
    turned = np.zeros((*grid, voxels.shape[2]), np.uint8)
    turned[pixels] = _spline_at_least_half(voxels, u[pixels], v[pixels])
    back = np.argsort((first, second, third))
    start, size = list(block.start), list(block.grid)
    start[first] = start[second] = 0
    size[first], size[second] = grid
    return _trimmed(turned.transpose(back), tuple(start), tuple(size))


def _sources(grid: tuple[int, int], angle: float) -> tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Size of the turned grid, and where each of its points comes from; both grids share their centre."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    rows = int(abs(c) * grid[0] + abs(s) * grid[1] + 0.5)
    columns = int(abs(s) * grid[0] + abs(c) * grid[1] + 0.5)
    y = np.arange(rows)[:, None] - (rows - 1) / 2
    x = np.arange(columns)[None] - (columns - 1) / 2
    u = c * y + s * x + (grid[0] - 1) / 2
    v = c * x - s * y + (grid[1] - 1) / 2
    return (rows, columns), (u, v)


def _spline_at_least_half(voxels: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the cubic spline through 0/1 voxels reaches 1/2 at the points (u, v) of every plane along the last axis.

    Parameters
    ----------
    voxels : uint8[a, b, k]
    u, v : float64[n]
        At least 1 and less than a - 2 (b - 2).

    Returns
    -------
    bool[n, k]
    """
    _, b, k = voxels.shape
    i, j = u.astype(np.intp), v.astype(np.intp)
    corners = (voxels[:-1, :-1] + voxels[1:, :-1] + voxels[:-1, 1:] + voxels[1:, 1:])[i, j]
    answer = corners == 4
    point, plane = np.nonzero((corners > 0) & ~answer)
    coefficients = _spline_coefficients(voxels).ravel()
    base = (((i - 1) * b + j - 1) * k)[point] + plane
    along_u, along_v = _spline_weights(u - i)[:, point], _spline_weights(v - j)[:, point]
    value = np.zeros(len(point))
    for row in range(4):
        line = sum(along_v[column] * coefficients[base + (row * b + column) * k] for column in range(4))
        value += along_u[row] * line
    answer[point, plane] = value >= 0.5
    return np.asarray(answer)


def _spline_coefficients(voxels: np.ndarray) -> np.ndarray:
    """Cubic B-spline coefficients along the first two axes, zeros beyond the border; float64.

    Not written as a matrix product, which is faster on an idle core: its threads would fight between workers.
    """
    # the filter mirrors at the border: so far from the object, what it mirrors has died away to 1e-8
    wide = np.pad(voxels, ((_FILTER_MARGIN,) * 2, (_FILTER_MARGIN,) * 2, (0, 0)))
    for axis in (0, 1):
        wide = spline_filter1d(wide, order=3, axis=axis, output=np.float64, mode="mirror")
    return wide[_FILTER_MARGIN:-_FILTER_MARGIN, _FILTER_MARGIN:-_FILTER_MARGIN]


def _spline_weights(t: np.ndarray) -> np.ndarray:
    """Weights of the four coefficients around a point at ``t`` in [0, 1) between the middle two; float64[4, n]."""
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    return np.asarray(weights / 6)
