"""Overlapping tiles over a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from napari_mrcnn3d.config import Triple

__all__ = ["Tile", "default_tile", "make_tiles"]


@dataclass(frozen=True)
class Tile:
    """A part of the volume that passes through the network at once.

    Attributes
    ----------
    start, stop : tuple of 3 int
        What is read, half-open.
    core_start, core_stop : tuple of 3 int
        What it answers for: the cores of all tiles fill the volume without overlap.
    """

    start: Triple
    stop: Triple
    core_start: Triple
    core_stop: Triple

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the tile in the volume."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def owns(self, boxes: np.ndarray) -> np.ndarray:
        """Which boxes (float[N, 6], voxels of the volume) have their centre in the core, or next to it.

        Neighbours place the same object a little differently. Were the cores strict, each could hold that it is the
        other's. So a tile also answers for an eighth of the overlap beyond its core; what it then shares with a
        neighbour overlaps enough to be merged.
        """
        centre = (boxes[:, :3] + boxes[:, 3:]) / 2
        low = np.array(self.core_start) - np.subtract(self.core_start, self.start) / 4
        high = np.array(self.core_stop) + np.subtract(self.stop, self.core_stop) / 4
        owned: np.ndarray = np.all((centre >= low) & (centre < high), axis=1)
        return owned


def default_tile(shape: Triple, voxels: int) -> Triple:
    """Tile of at most about so many voxels: the whole volume, or its longest axes halved until it fits."""
    size = list(shape)
    while np.prod(size, dtype=float) > voxels and max(size) > 1:
        longest = int(np.argmax(size))
        size[longest] = -(-size[longest] // 2)
    return size[0], size[1], size[2]


def make_tiles(shape: Sequence[int], tile: Sequence[int], overlap: Sequence[int]) -> list[Tile]:
    """Tiles that cover a volume, evenly spread.

    Parameters
    ----------
    shape, tile, overlap : sequence of 3 int
        Extent of the volume; largest extent of a tile; least overlap of neighbours (at most half a tile is used).

    Returns
    -------
    list of Tile
        In C order.
    """
    axes = [_spans(n, min(t, n), min(o, t // 2)) for n, t, o in zip(shape, tile, overlap, strict=True)]
    tiles = []
    for spans in product(*axes):
        start, stop, core_start, core_stop = (tuple(s[i] for s in spans) for i in range(4))
        tiles.append(Tile(start, stop, core_start, core_stop))  # type: ignore[arg-type]
    return tiles


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """start, stop, core start, core stop of the tiles along one axis."""
    if tile >= length:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    cuts = [0, *((a + tile + b) // 2 for a, b in pairwise(starts)), length]
    return [(s, s + tile, a, b) for s, (a, b) in zip(starts, pairwise(cuts), strict=True)]
