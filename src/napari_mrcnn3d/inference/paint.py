"""From candidates to voxels: which ones each candidate covers, and the label volume of those that were selected.

The part that takes time, turning box-relative masks into voxels, is done once per answer of the network and kept as
:class:`Footprints`. What follows a slider, :func:`~napari_mrcnn3d.inference.select.select` and :func:`paint`, only
reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from napari_mrcnn3d.structures import Candidates, Instances

__all__ = ["Footprints", "paint"]

Slices = tuple[slice, slice, slice]

_HALF = np.float32(127.5)
"""Foreground probability one half, in the units of the masks."""
_TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels that meet in a corner belong together."""


@dataclass(frozen=True)
class Footprints:
    """The voxels of every candidate, and how many of them candidates share.

    Attributes
    ----------
    candidates : Candidates
        Whose voxels they are; best first.
    regions : tuple of (slice, slice, slice)
        Where in the image each mask lies (z, y, x), as tight as it can be.
    masks : tuple of bool[z, y, x]
        The candidate's own voxels in its region, one connected piece; shape (0, 0, 0) if there are none.
    voxels : int64[N]
        How many there are.
    shared : tuple of dict
        For every candidate, the better ones that share voxels with it and how many: ``shared[i][j]``, j < i.
    """

    candidates: Candidates
    regions: tuple[Slices, ...]
    masks: tuple[np.ndarray, ...]
    voxels: np.ndarray
    shared: tuple[dict[int, int], ...]

    @classmethod
    def of(cls, source: Candidates | Footprints) -> Footprints:
        """Work out the voxels of candidates; footprints are passed through.

        Parameters
        ----------
        source : Candidates or Footprints

        Returns
        -------
        Footprints

        Raises
        ------
        ValueError
            If the candidates are not sorted best first.

        Notes
        -----
        Voxel i covers [i, i + 1). It is the candidate's own if its centre, i + 0.5, lies in the half-open box along
        each axis and the mask, interpolated trilinearly there (beyond its outer cell centres it keeps their value),
        reaches one half: the rule of ``_ops.paste_masks_3d``. Of several pieces the largest is kept.
        """
        if isinstance(source, Footprints):
            return source
        if np.any(np.diff(source.scores) > 0):
            raise ValueError("candidates must be sorted by falling score")
        drawn = [_rasterise(box, mask, source.shape) for box, mask in zip(source.boxes, source.masks, strict=True)]
        regions = tuple(region for region, _ in drawn)
        masks = tuple(mask for _, mask in drawn)
        voxels = np.array([np.count_nonzero(mask) for mask in masks], np.int64)
        return cls(source, regions, masks, voxels, _shared_voxels(regions, masks))

    def __len__(self) -> int:
        return len(self.masks)

    def covered(self, index: int, others: list[int]) -> int:
        """Count the own voxels of a candidate that at least one of some others has, too.

        Parameters
        ----------
        index : int
            The candidate.
        others : list of int
            Better ones that share voxels with it, rising.
        """
        shared = self.shared[index]
        if not any(one in self.shared[other] for k, other in enumerate(others) for one in others[:k]):
            return sum(shared[other] for other in others)  # apart from each other: no voxel is counted twice
        union = np.zeros(self.masks[index].shape, bool)
        for other in others:
            inside, theirs = _common(self.regions[index], self.regions[other])
            union[inside] |= self.masks[other][theirs]
        return int(np.count_nonzero(union & self.masks[index]))


def paint(source: Candidates | Footprints, instances: Instances, out: np.ndarray | None = None) -> np.ndarray:
    """Label volume of a selection; where several claim a voxel the best score has it.

    Parameters
    ----------
    source : Candidates or Footprints
        What ``instances`` was selected from. Footprints are worth keeping if more than one selection is painted.
    instances : Instances
    out : integer array [z, y, x], optional
        Painted over as a whole, to spare the memory of a new one.

    Returns
    -------
    uint16 or int32 [z, y, x]
        Row k of ``instances`` is label k + 1, background 0; int32 from 65,536 objects on. ``out`` if it was given.

    Raises
    ------
    ValueError
        If ``out`` has another shape or cannot hold the labels, or ``instances`` is not of this source.
    """
    footprints = Footprints.of(source)
    if len(instances) and instances.index.max() >= len(footprints):
        raise ValueError("these instances were not selected from these candidates")
    labels = _blank(footprints.candidates.shape, len(instances), out)
    for label in range(len(instances), 0, -1):  # the best comes last and paints over the others
        index = instances.index[label - 1]
        np.copyto(labels[footprints.regions[index]], label, where=footprints.masks[index], casting="unsafe")
    return labels


def _blank(shape: tuple[int, int, int], count: int, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.zeros(shape, np.uint16 if count <= np.iinfo(np.uint16).max else np.int32)
    if out.shape != shape or out.dtype.kind not in "iu" or np.iinfo(out.dtype).max < count:
        raise ValueError(f"out must be integers of shape {shape} up to {count}, got {out.dtype} {out.shape}")
    out.fill(0)
    return out


def _rasterise(box: np.ndarray, mask: np.ndarray, shape: tuple[int, int, int]) -> tuple[Slices, np.ndarray]:
    """Voxels of one candidate: a region of the image and a mask in it."""
    empty = (slice(0, 0),) * 3, np.zeros((0, 0, 0), bool)
    low, high = box[:3].astype(np.float64), box[3:].astype(np.float64)
    if not (np.isfinite(box).all() and (high > low).all()):
        return empty
    first = np.clip(np.ceil(low - 0.5), 0, shape).astype(np.int64)  # voxels whose centre lies in the box
    last = np.clip(np.ceil(high - 0.5), 0, shape).astype(np.int64)
    if (last <= first).any():
        return empty
    along_z, along_y, along_x = map(_interpolation, first, last, low, high, mask.shape)
    in_plane = along_y @ (mask.astype(np.float32) @ along_x.T)
    dense = np.tensordot(along_z, in_plane, 1)
    inside, piece = _largest_piece(dense >= _HALF)
    if not piece.size:
        return empty
    z, y, x = (slice(int(at) + part.start, int(at) + part.stop) for at, part in zip(first, inside, strict=True))
    return (z, y, x), piece


def _interpolation(first: int, last: int, low: float, high: float, cells: int) -> np.ndarray:
    """Matrix [voxels, cells] that interpolates a row of mask cells at the voxel centres along one axis."""
    centre = (np.arange(first, last) + 0.5 - low) / (high - low) * cells - 0.5
    # A tent over every cell centre; those at the ends are flat on the outside because positions are clipped.
    distance = np.abs(np.clip(centre, 0, cells - 1)[:, None] - np.arange(cells))
    weights: np.ndarray = np.maximum(1 - distance, 0).astype(np.float32)
    return weights


def _largest_piece(mask: np.ndarray) -> tuple[Slices, np.ndarray]:
    """Cut the largest connected piece out of a mask; an empty one if there is none."""
    pieces, count = ndimage.label(mask, _TOUCHING)
    if count == 0:
        return (slice(0, 0),) * 3, np.zeros((0, 0, 0), bool)
    largest = 1 if count == 1 else int(np.bincount(pieces.ravel())[1:].argmax()) + 1
    inside = ndimage.find_objects(pieces, largest)[largest - 1]
    return inside, pieces[inside] == largest


def _shared_voxels(regions: tuple[Slices, ...], masks: tuple[np.ndarray, ...]) -> tuple[dict[int, int], ...]:
    """For every candidate, the better ones it shares voxels with, rising, and how many."""
    shared: tuple[dict[int, int], ...] = tuple({} for _ in masks)
    for better, worse in sorted(_neighbours(regions)):
        ours, theirs = _common(regions[worse], regions[better])
        count = int(np.count_nonzero(masks[worse][ours] & masks[better][theirs]))
        if count:
            shared[worse][better] = count
    return shared


def _neighbours(regions: tuple[Slices, ...]) -> Iterator[tuple[int, int]]:
    """Pairs (better, worse) of candidates whose regions meet, found by a sweep along z."""
    start = np.array([[part.start for part in region] for region in regions], np.int64).reshape(-1, 3)
    stop = np.array([[part.stop for part in region] for region in regions], np.int64).reshape(-1, 3)
    filled = np.flatnonzero((stop > start).all(axis=1))
    order = filled[np.argsort(start[filled, 0], kind="stable")]
    ends = np.searchsorted(start[order, 0], stop[order, 0])
    for position, (index, end) in enumerate(zip(order.tolist(), ends.tolist(), strict=True)):
        later = order[position + 1 : end]
        meet = ((start[later, 1:] < stop[index, 1:]) & (stop[later, 1:] > start[index, 1:])).all(axis=1)
        for other in later[meet].tolist():
            yield min(index, other), max(index, other)


def _common(ours: Slices, theirs: Slices) -> tuple[Slices, Slices]:
    """Where two regions meet, counted from the corner of each."""
    inside, outside = [], []
    for a, b in zip(ours, theirs, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        inside.append(slice(start - a.start, stop - a.start))
        outside.append(slice(start - b.start, stop - b.start))
    return (inside[0], inside[1], inside[2]), (outside[0], outside[1], outside[2])
