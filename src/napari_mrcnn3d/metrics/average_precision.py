"""Figures that know how sure the network was: AP_coco, and the four columns of the predecessor's report.

Predictions take true objects in the order of their scores, best first: each the free true object of its class that it
overlaps most, if their IoU reaches the threshold. This is what both pycocotools and the predecessor do. It differs
from :mod:`napari_mrcnn3d.metrics.matching`, which knows no scores and finds the largest matching.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from napari_mrcnn3d.metrics.matching import check_thresh
from napari_mrcnn3d.metrics.overlap import FloatArray, IntArray, Overlap, share
from napari_mrcnn3d.structures import ArrayLike

__all__ = [
    "COLUMNS",
    "LabelledObjects",
    "Ranking",
    "SeedColumns",
    "average_precision",
    "pool_rankings",
    "rank_predictions",
    "seed_columns",
    "summarise_columns",
]

COLUMNS = ("map-50", "precision-50", "recall-50", "iou-50")
"""Names of the predecessor's columns, in its order."""


@dataclass(frozen=True)
class LabelledObjects:
    """A label volume with what is known of its objects. An id without a voxel is no object.

    Attributes
    ----------
    labels : array-like of integer, shape (z, y, x)
        0 is background.
    classes : int64[N] or None
        Entry ``k - 1`` belongs to label ``k``, as in ``Instances``. None: all are of one class.
    scores : float64[N] or None
        Likewise; needed for predictions only.
    """

    labels: ArrayLike
    classes: IntArray | None = None
    scores: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """Predictions by descending score, and which of them were right at an IoU threshold.

    Attributes
    ----------
    thresh : float
        Smallest IoU of a match.
    scores, ious : float64[P]
        ``ious`` is that of the match, 0 without one.
    classes : int64[P]
        Predicted classes.
    true_classes : int64[T]
        Classes of the true objects, found or not.
    """

    thresh: float
    scores: FloatArray = field(repr=False)
    ious: FloatArray = field(repr=False)
    classes: IntArray = field(repr=False)
    true_classes: IntArray = field(repr=False)

    @property
    def hits(self) -> np.ndarray:
        """Which predictions are matched, bool[P]."""
        return self.ious > 0

    def of_class(self, number: int) -> Ranking:
        """Keep only what concerns one class."""
        mine = self.classes == number
        true_classes = self.true_classes[self.true_classes == number]
        return Ranking(self.thresh, self.scores[mine], self.ious[mine], self.classes[mine], true_classes)


def rank_predictions(
    truth: LabelledObjects, prediction: LabelledObjects, thresh: Sequence[float] = (0.5,)
) -> tuple[Ranking, ...]:
    """Match the predictions of one volume in the order of their scores.

    Parameters
    ----------
    truth, prediction : LabelledObjects
        Of equal shape; the prediction has scores. Equal scores are taken in the order of the labels.
    thresh : sequence of float
        Smallest IoUs of a match.

    Returns
    -------
    tuple of Ranking
        One for each threshold.

    Raises
    ------
    ValueError
        If the prediction has no scores, or classes or scores are fewer than the labels,
        or a threshold is not in (0, 1].
    """
    if prediction.scores is None:
        raise ValueError("the predictions need scores to be ranked")
    overlap = Overlap.of(truth.labels, prediction.labels)
    scores = _of_ids(np.asarray(prediction.scores, np.float64), overlap.pred_ids)
    classes = _classes(prediction, overlap.pred_ids)
    true_classes = _classes(truth, overlap.true_ids)
    order = np.argsort(-scores, kind="stable")
    same_class = true_classes[overlap.pairs[:, 0]] == classes[overlap.pairs[:, 1]]
    iou = np.where(same_class, overlap.iou, 0.0)
    return tuple(
        Ranking(t, scores[order], _take_in_order(overlap, iou, order, t)[order], classes[order], true_classes)
        for t in thresh
    )


def pool_rankings(rankings: Sequence[Ranking]) -> Ranking:
    """One ranking over the predictions of several volumes; equal scores stay in the volumes' order.

    Parameters
    ----------
    rankings : sequence of Ranking
        At least one, all of the same threshold.

    Raises
    ------
    ValueError
        If there is none or the thresholds differ.
    """
    if len({r.thresh for r in rankings}) != 1:
        raise ValueError("rankings can be pooled only if there are some and all have the same threshold")
    scores, ious, classes = (
        np.concatenate([getattr(r, name) for r in rankings]) for name in ("scores", "ious", "classes")
    )
    order = np.argsort(-scores, kind="stable")
    true_classes = np.concatenate([r.true_classes for r in rankings])
    return Ranking(rankings[0].thresh, scores[order], ious[order], classes[order], true_classes)


def average_precision(ranking: Ranking, *, curve: Literal["coco", "voc"] = "coco", by_class: bool = True) -> float:
    """Area under the precision/recall curve: ``AP_coco``. Not what microscopy papers call AP, which is ``AP_dsb``.

    Parameters
    ----------
    ranking : Ranking
        Of one volume, or pooled over several.
    curve : {"coco", "voc"}
        Mean of the interpolated precision at 101 recalls, or the exact area under its envelope.
    by_class : bool
        Mean over the classes that have true objects; otherwise one curve over all classes.

    Returns
    -------
    float
        In [0, 1]. Without true objects: 1 if nothing was predicted either, else 0.

    Notes
    -----
    Lin et al. 2014 (COCO) and Everingham et al. 2010 (Pascal VOC, from 2010 on), as computed by pycocotools.
    """
    if not by_class or len(ranking.true_classes) == 0:
        return _area(ranking, curve)
    return float(np.mean([_area(ranking.of_class(number), curve) for number in np.unique(ranking.true_classes)]))


class SeedColumns(NamedTuple):
    """One row of the predecessor's ``report.csv``; see :func:`seed_columns`. NaN where a column has no meaning."""

    map_50: float
    precision_50: float
    recall_50: float
    iou_50: float


def seed_columns(truth: LabelledObjects, prediction: LabelledObjects) -> SeedColumns:
    """Compute the four columns that David & Faure's 3D Mask R-CNN reports for an image.

    Parameters
    ----------
    truth, prediction : LabelledObjects
        Of equal shape; the prediction has scores.

    Returns
    -------
    SeedColumns
        ``map_50``: area under the envelope of the image's precision/recall curve, all classes together;
        ``precision_50``: matches / predictions, NaN without predictions; ``recall_50``: matches / true objects;
        ``iou_50``: mean IoU of the matches, NaN without a match. ``map_50`` and ``recall_50`` are NaN without a
        true object. A match needs the same class and an IoU of 0.5.

    Notes
    -----
    The predecessor compares whole masks, which may overlap; here both sides are label volumes, so a voxel belongs to
    the surest object only.
    """
    (ranking,) = rank_predictions(truth, prediction)
    n_true, n_pred, n_hit = len(ranking.true_classes), len(ranking.scores), int(ranking.hits.sum())
    return SeedColumns(
        average_precision(ranking, curve="voc", by_class=False) if n_true else np.nan,
        n_hit / n_pred if n_pred else np.nan,
        n_hit / n_true if n_true else np.nan,
        float(ranking.ious.sum() / n_hit) if n_hit else np.nan,
    )


def summarise_columns(rows: Iterable[SeedColumns]) -> dict[str, dict[str, float | int | None]]:
    """Means of the predecessor's columns over images.

    Parameters
    ----------
    rows : iterable of SeedColumns
        One for each image.

    Returns
    -------
    dict
        For each of :data:`COLUMNS`: ``mean`` over the images where the column is defined (None if there is none),
        ``mean_undefined_as_zero`` over all images, and ``undefined``, the number of images left out of the first.
        Leaving images out flatters a network that stays silent; both are needed to compare.
    """
    table = np.array(list(rows), np.float64).reshape(-1, len(COLUMNS))
    undefined = np.isnan(table)
    defined = (~undefined).sum(axis=0)
    sums = np.where(undefined, 0.0, table).sum(axis=0)
    return {
        name: {
            "mean": float(sums[i] / defined[i]) if defined[i] else None,
            "mean_undefined_as_zero": float(sums[i] / len(table)) if len(table) else None,
            "undefined": int(undefined[:, i].sum()),
        }
        for i, name in enumerate(COLUMNS)
    }


def _of_ids(values: FloatArray, ids: IntArray) -> FloatArray:
    """Values of these labels; row ``k - 1`` belongs to label ``k``."""
    if len(ids) and ids[-1] > len(values):
        raise ValueError(f"label {ids[-1]} has no class or score, there are {len(values)} of them")
    return np.asarray(values[ids - 1])


def _classes(objects: LabelledObjects, ids: IntArray) -> IntArray:
    if objects.classes is None:
        return np.ones(len(ids), np.int64)
    return _of_ids(np.asarray(objects.classes), ids).astype(np.int64)


def _take_in_order(overlap: Overlap, iou: FloatArray, order: IntArray, thresh: float) -> FloatArray:
    """IoU of the true object that each prediction takes, 0 where it finds none free; float64[P] by position."""
    rank = np.empty(overlap.n_pred, np.int64)
    rank[order] = np.arange(overlap.n_pred)
    good = np.flatnonzero(iou >= check_thresh(thresh))
    true, pred = overlap.pairs[good].T
    taken = np.zeros(overlap.n_true, bool)
    result = np.zeros(overlap.n_pred)
    for i in np.lexsort((true, -iou[good], rank[pred])):
        if not taken[true[i]] and result[pred[i]] == 0:
            taken[true[i]] = True
            result[pred[i]] = iou[good[i]]
    return result


def _area(ranking: Ranking, curve: Literal["coco", "voc"]) -> float:
    """Area under the precision/recall curve of all predictions, whatever their class."""
    n_true, n_pred = len(ranking.true_classes), len(ranking.scores)
    if n_true == 0 or n_pred == 0:
        return share(0.0, n_true, n_true + n_pred)
    found = np.cumsum(ranking.hits)
    recall = found / n_true
    precision = found / np.arange(1, n_pred + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if curve == "coco":
        return float(envelope[np.searchsorted(recall, np.linspace(0, 1, 101))].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope[:-1]))
