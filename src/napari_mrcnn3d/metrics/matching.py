"""Which predicted object is which true object, and how well they overlap: stardist's vocabulary on label volumes.

A figure taken over no object at all is 1 where truth and prediction are both empty (nothing to find, nothing
invented) and 0 otherwise. It is never NaN. stardist gives 0 in both cases; all else has stardist's values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from napari_mrcnn3d.metrics.overlap import FloatArray, IntArray, Overlap, share
from napari_mrcnn3d.structures import ArrayLike

__all__ = [
    "Matching",
    "check_thresh",
    "match_overlap",
    "matching",
    "matching_dataset",
    "mucov",
    "pool_matchings",
    "seg_score",
]


@dataclass(frozen=True, eq=False)
class Matching:
    """Which objects were found at an IoU threshold, and the figures that follow from it.

    Attributes
    ----------
    thresh : float
        Smallest IoU of a match.
    n_true, n_pred : int
        True and predicted objects.
    pairs : int64[tp, 2]
        Ids of the matched objects: true, predicted. Of pooled matchings one volume after the other.
    scores : float64[tp]
        IoU of each pair.
    """

    thresh: float
    n_true: int
    n_pred: int
    pairs: IntArray = field(repr=False)
    scores: FloatArray = field(repr=False)

    @property
    def tp(self) -> int:
        """Matched objects."""
        return len(self.scores)

    @property
    def fp(self) -> int:
        """Predicted objects without a true one."""
        return self.n_pred - self.tp

    @property
    def fn(self) -> int:
        """True objects without a predicted one."""
        return self.n_true - self.tp

    @property
    def precision(self) -> float:
        """Share of the predicted objects that are true."""
        return self._share(self.tp, self.n_pred)

    @property
    def recall(self) -> float:
        """Share of the true objects that were found."""
        return self._share(self.tp, self.n_true)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN)."""
        return self._share(2 * self.tp, self.n_true + self.n_pred)

    @property
    def accuracy(self) -> float:
        """TP / (TP + FP + FN): ``AP_dsb``, what microscopy papers call AP."""
        return self._share(self.tp, self.tp + self.fp + self.fn)

    @property
    def mean_matched_score(self) -> float:
        """Mean IoU of the matched pairs."""
        return self._share(self.scores.sum(), self.tp)

    @property
    def mean_true_score(self) -> float:
        """Sum of the matched IoUs over the number of true objects."""
        return self._share(self.scores.sum(), self.n_true)

    @property
    def panoptic_quality(self) -> float:
        """Sum of the matched IoUs over TP + FP / 2 + FN / 2 (Kirillov et al. 2019, eq. 1)."""
        return self._share(self.scores.sum(), (self.n_true + self.n_pred) / 2)

    def _share(self, part: float, whole: float) -> float:
        return share(part, whole, self.n_true + self.n_pred)


def check_thresh(thresh: float) -> float:
    """Refuse what cannot be an IoU threshold, give the rest back as a float.

    Raises
    ------
    ValueError
        If it is not above 0 and at most 1: at 0 objects would match that do not touch.
    """
    if not 0 < thresh <= 1:
        raise ValueError(f"an IoU threshold lies above 0 and at most at 1, got {thresh}")
    return float(thresh)


@overload
def matching(y_true: ArrayLike, y_pred: ArrayLike, thresh: float = 0.5) -> Matching: ...
@overload
def matching(y_true: ArrayLike, y_pred: ArrayLike, thresh: Sequence[float]) -> tuple[Matching, ...]: ...
def matching(
    y_true: ArrayLike, y_pred: ArrayLike, thresh: float | Sequence[float] = 0.5
) -> Matching | tuple[Matching, ...]:
    """Match the objects of two label volumes one to one.

    Parameters
    ----------
    y_true, y_pred : array-like of bool or integer, same shape
        Labels, 0 is background; ids need not be consecutive.
    thresh : float or sequence of float
        Smallest IoU of a match, above 0 and at most 1.

    Returns
    -------
    Matching or tuple of Matching
        One for each threshold if a sequence was given.

    Raises
    ------
    TypeError
        If the labels are no integers.
    ValueError
        If the shapes differ, an id is negative or 2**32 and more, or a threshold is not in (0, 1].

    Notes
    -----
    As ``stardist.matching.matching`` (criterion "iou"): as many pairs as possible, among those the largest sum of IoU.
    stardist's sum also holds the pairs below the threshold; ours does not, which can only show at thresholds up to
    0.5, in the choice of equally many pairs.
    """
    overlap = Overlap.of(y_true, y_pred)
    if isinstance(thresh, (int, float)):
        return match_overlap(overlap, thresh)
    return tuple(match_overlap(overlap, t) for t in thresh)


def match_overlap(overlap: Overlap, thresh: float) -> Matching:
    """Match the objects of two label volumes whose overlap is known; see :func:`matching`.

    Parameters
    ----------
    overlap : Overlap
    thresh : float
        Smallest IoU of a match, above 0 and at most 1.

    Raises
    ------
    ValueError
        If the threshold is not in (0, 1].
    """
    iou = overlap.iou
    good = np.flatnonzero(iou >= check_thresh(thresh))
    chosen = good[_assign(overlap.pairs[good], iou[good])]
    true, pred = overlap.pairs[chosen].T
    ids = np.stack([overlap.true_ids[true], overlap.pred_ids[pred]], axis=1)
    return Matching(float(thresh), overlap.n_true, overlap.n_pred, ids, iou[chosen])


@overload
def matching_dataset(y_true: Iterable[ArrayLike], y_pred: Iterable[ArrayLike], thresh: float = 0.5) -> Matching: ...
@overload
def matching_dataset(
    y_true: Iterable[ArrayLike], y_pred: Iterable[ArrayLike], thresh: Sequence[float]
) -> tuple[Matching, ...]: ...
def matching_dataset(
    y_true: Iterable[ArrayLike], y_pred: Iterable[ArrayLike], thresh: float | Sequence[float] = 0.5
) -> Matching | tuple[Matching, ...]:
    """Match volume by volume and pool the objects of all volumes.

    Parameters
    ----------
    y_true, y_pred : iterables of array-like
        Label volumes, paired in order, read one pair at a time.
    thresh : float or sequence of float
        Smallest IoU of a match, above 0 and at most 1.

    Returns
    -------
    Matching or tuple of Matching
        Over all volumes together; one for each threshold if a sequence was given.

    Raises
    ------
    TypeError
        As :func:`matching`.
    ValueError
        If one iterable is longer, and as :func:`matching`.
    """
    single = isinstance(thresh, (int, float))
    thresholds = (float(thresh),) if isinstance(thresh, (int, float)) else tuple(thresh)
    results = [matching(true, pred, thresholds) for true, pred in zip(y_true, y_pred, strict=True)]
    pooled = tuple(pool_matchings([r[i] for r in results], t) for i, t in enumerate(thresholds))
    return pooled[0] if single else pooled


def pool_matchings(matchings: Sequence[Matching], thresh: float) -> Matching:
    """One matching over the objects of several volumes.

    Parameters
    ----------
    matchings : sequence of Matching
        May be empty.
    thresh : float
        The threshold they all have.

    Raises
    ------
    ValueError
        If one has another threshold.
    """
    if any(m.thresh != thresh for m in matchings):
        raise ValueError(f"only matchings of the same threshold can be pooled, wanted {thresh}")
    return Matching(
        thresh,
        sum(m.n_true for m in matchings),
        sum(m.n_pred for m in matchings),
        np.concatenate([np.zeros((0, 2), np.int64), *(m.pairs for m in matchings)]),
        np.concatenate([np.zeros(0), *(m.scores for m in matchings)]),
    )


def seg_score(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """SEG: mean over the true objects of the IoU with the prediction covering more than half of it, else 0.

    Parameters
    ----------
    y_true, y_pred : array-like of bool or integer, same shape
        Labels, 0 is background.

    Notes
    -----
    The measure of the Cell Tracking Challenge (Maška et al. 2014, doi 10.1093/bioinformatics/btu080).
    """
    overlap = Overlap.of(y_true, y_pred)
    return share(overlap.seg_ious().sum(), overlap.n_true, overlap.n_true + overlap.n_pred)


def mucov(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """MUCov: mean over the predicted objects of the best IoU with a true object.

    Parameters
    ----------
    y_true, y_pred : array-like of bool or integer, same shape
        Labels, 0 is background.

    Notes
    -----
    Mean unweighted coverage as used for QCANet (Tokuoka et al. 2020, doi 10.1038/s41540-020-00152-8).
    """
    overlap = Overlap.of(y_true, y_pred)
    return share(overlap.best_ious().sum(), overlap.n_pred, overlap.n_true + overlap.n_pred)


def _assign(pairs: IntArray, iou: FloatArray) -> IntArray:
    """Positions of the pairs of the largest one-to-one matching, the one with the largest sum of IoU."""
    rows, columns = np.bincount(pairs[:, 0]), np.bincount(pairs[:, 1])
    contested = (rows[pairs[:, 0]] > 1) | (columns[pairs[:, 1]] > 1)
    if not contested.any():  # always so above an IoU of 0.5
        return np.arange(len(pairs))
    chosen = ~contested
    chosen[np.flatnonzero(contested)[_assign_contested(pairs[contested], iou[contested])]] = True
    return np.flatnonzero(chosen)


def _assign_contested(pairs: IntArray, iou: FloatArray) -> IntArray:
    """Solve the pairs that compete, by a sparse assignment in which a true object may also take a column of its own."""
    _, row = np.unique(pairs[:, 0], return_inverse=True)
    _, column = np.unique(pairs[:, 1], return_inverse=True)
    n_rows, n_columns = row.max() + 1, column.max() + 1
    # All weights of pairs together undercut each other by less than the price of one unmatched object.
    weights = np.concatenate([1 - iou / (2 * n_rows), np.full(n_rows, 2.0)])
    own = np.arange(n_rows)
    places = (np.concatenate([row, own]), np.concatenate([column, n_columns + own]))
    graph = coo_array((weights, places), shape=(n_rows, n_columns + n_rows)).tocsr()
    taken_row, taken_column = min_weight_full_bipartite_matching(graph)
    partner = np.full(n_rows, -1)
    partner[taken_row] = taken_column
    return np.flatnonzero(partner[row] == column)
