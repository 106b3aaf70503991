"""Which objects of two label volumes share voxels: the one sparse table that all figures are derived from.

It is read block by block, so that volumes larger than memory, with any number of objects and any ids below 2**32, can
be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_mrcnn3d.structures import ArrayLike

__all__ = ["FloatArray", "IntArray", "Overlap", "share"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_BLOCK_VOXELS = 2**22
_ID_BITS = 32


@dataclass(frozen=True, eq=False)
class Overlap:
    """Sizes of the objects of two label volumes, and the voxels that pairs of them share.

    Attributes
    ----------
    true_ids, pred_ids : int64[T], int64[P]
        Ids that occur, ascending, background left out.
    true_sizes, pred_sizes : int64[T], int64[P]
        Voxels of each object.
    pairs : int64[K, 2]
        Positions in ``true_ids`` and ``pred_ids`` of the pairs that share at least one voxel.
    voxels : int64[K]
        Voxels each pair shares.
    """

    true_ids: IntArray
    pred_ids: IntArray
    true_sizes: IntArray
    pred_sizes: IntArray
    pairs: IntArray
    voxels: IntArray

    @classmethod
    def of(cls, y_true: ArrayLike, y_pred: ArrayLike) -> Overlap:
        """Count the overlaps of two label volumes.

        Parameters
        ----------
        y_true, y_pred : array-like of bool or integer, same shape
            Labels, 0 is background; ids need not be consecutive. Read in blocks along the first axis.

        Raises
        ------
        TypeError
            If the labels are no integers.
        ValueError
            If the shapes differ or an id is negative or 2**32 and more.
        """
        keys, counts = _count_pairs(y_true, y_pred)
        true = (keys >> np.uint64(_ID_BITS)).astype(np.int64)
        pred = (keys & np.uint64(2**_ID_BITS - 1)).astype(np.int64)
        true_ids, true_sizes = _sum_by_key(true[true > 0], counts[true > 0])
        pred_ids, pred_sizes = _sum_by_key(pred[pred > 0], counts[pred > 0])
        both = (true > 0) & (pred > 0)
        pairs = np.stack([np.searchsorted(true_ids, true[both]), np.searchsorted(pred_ids, pred[both])], axis=1)
        return cls(true_ids, pred_ids, true_sizes, pred_sizes, pairs.astype(np.int64), counts[both])

    @property
    def n_true(self) -> int:
        """Number of true objects."""
        return len(self.true_ids)

    @property
    def n_pred(self) -> int:
        """Number of predicted objects."""
        return len(self.pred_ids)

    @property
    def iou(self) -> FloatArray:
        """Intersection over union of each pair, float64[K]."""
        union = self.true_sizes[self.pairs[:, 0]] + self.pred_sizes[self.pairs[:, 1]] - self.voxels
        return np.asarray(self.voxels / union, np.float64)

    def seg_ious(self) -> FloatArray:
        """IoU of each true object with the prediction that covers more than half of it, else 0; float64[T]."""
        covering = 2 * self.voxels > self.true_sizes[self.pairs[:, 0]]
        result = np.zeros(self.n_true)
        result[self.pairs[covering, 0]] = self.iou[covering]
        return result

    def best_ious(self) -> FloatArray:
        """Best IoU of each predicted object with any true object, 0 if it touches none; float64[P]."""
        result = np.zeros(self.n_pred)
        np.maximum.at(result, self.pairs[:, 1], self.iou)
        return result


def share(part: float, whole: float, objects: int) -> float:
    """Part of a whole that may be nothing.

    Parameters
    ----------
    part, whole : float
    objects : int
        True and predicted objects together.

    Returns
    -------
    float
        ``part / whole``; where ``whole`` is 0: 1 if there is no object on either side, else 0.
    """
    if whole:
        return float(part / whole)
    return 0.0 if objects else 1.0


def _count_pairs(y_true: ArrayLike, y_pred: ArrayLike) -> tuple[NDArray[np.uint64], IntArray]:
    """Keys ``true << 32 | pred`` that occur, (0, 0) left out, ascending, and the voxels of each."""
    if tuple(y_true.shape) != tuple(y_pred.shape):
        raise ValueError(f"the label volumes differ in shape: {tuple(y_true.shape)} and {tuple(y_pred.shape)}")
    keys, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for block in _blocks(tuple(y_true.shape)):
        # Labels are constant over long runs, so the runs are sorted, not the voxels.
        voxels = _ids(y_true[block]) << np.uint64(_ID_BITS) | _ids(y_pred[block])
        starts = np.flatnonzero(np.diff(voxels, prepend=~voxels[:1]))
        lengths = np.diff(starts, append=voxels.size)
        labelled = voxels[starts] > 0
        key, count = _sum_by_key(voxels[starts][labelled], lengths[labelled])
        keys.append(key)
        counts.append(count)
    return _sum_by_key(np.concatenate(keys), np.concatenate(counts))


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices along the first axis of at most 4 million voxels, or one plane."""
    planes = max(1, _BLOCK_VOXELS // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    return (slice(start, start + planes) for start in range(0, shape[0], planes))


def _ids(labels: Any) -> NDArray[np.uint64]:
    """Flat label ids of a block, checked to fit half a key."""
    array = np.asarray(labels).ravel()
    if array.dtype.kind not in "biu":
        raise TypeError(f"labels must be whole numbers, not {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= 2**_ID_BITS):
        raise ValueError(f"label ids must lie between 0 and {2**_ID_BITS - 1}, found {array.min()} to {array.max()}")
    return array.astype(np.uint64)


def _sum_by_key(keys: NDArray[Any], counts: IntArray) -> tuple[NDArray[Any], IntArray]:
    """Each key once, ascending, with the sum of its counts (exact below 2**53)."""
    unique, inverse = np.unique(keys, return_inverse=True)
    return unique, np.bincount(inverse, weights=counts, minlength=len(unique)).astype(np.int64)
