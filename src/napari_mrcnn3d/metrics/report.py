"""Comparison of predicted with true label volumes, volume by volume and pooled, as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from napari_mrcnn3d.metrics.matching import Matching, match_overlap, pool_matchings
from napari_mrcnn3d.metrics.overlap import FloatArray, Overlap, share
from napari_mrcnn3d.structures import ArrayLike, Progress, Steps, UserError, drain

__all__ = ["DEFINITIONS", "THRESHOLDS", "LabelPair", "evaluate", "evaluate_steps", "to_json"]

THRESHOLDS: tuple[float, ...] = tuple(percent / 100 for percent in range(50, 100, 5))
"""IoU thresholds of AP_dsb. All other figures that need a threshold use the first."""

DEFINITIONS = {
    "tp, fp, fn": "found, invented and missed objects: one-to-one matching at an IoU of at least 0.5",
    "precision, recall, f1": "tp/(tp+fp), tp/(tp+fn), 2tp/(2tp+fp+fn)",
    "ap_dsb": "tp/(tp+fp+fn) at the IoU named; this is no area under a precision/recall curve",
    "ap_dsb_mean": "mean of ap_dsb over the IoUs 0.50 to 0.95",
    "mean_matched_iou": "mean IoU of the found objects",
    "panoptic_quality": "sum of the IoUs of the found objects / (tp + fp/2 + fn/2)",
    "seg": "mean over true objects of the IoU with the prediction that covers more than half of it, else 0",
    "mucov": "mean over predicted objects of the best IoU with a true object",
    "pooled": "all objects of all volumes together; large volumes count more",
    "volume_mean": "mean of the volumes' own figures; every volume counts the same",
    "nothing to count": "a figure over no objects is 1 if truth and prediction are both empty, else 0",
}
"""What each entry of a report means, in words; part of the report."""

_MEANS = ("precision", "recall", "f1", "ap_dsb_mean", "mean_matched_iou", "panoptic_quality", "seg", "mucov")


@dataclass(frozen=True)
class LabelPair:
    """A predicted label volume and the truth.

    Attributes
    ----------
    name : str
        For messages and the report.
    truth, prediction : array-like of integer
        Of equal shape, 0 is background. Read in blocks.
    """

    name: str
    truth: ArrayLike
    prediction: ArrayLike


@dataclass(frozen=True, eq=False)
class _Result:
    """What is kept of a compared pair: enough to pool it with others."""

    name: str
    matchings: tuple[Matching, ...]
    seg_ious: FloatArray
    best_ious: FloatArray

    @property
    def n_true(self) -> int:
        return len(self.seg_ious)


def evaluate(pairs: Iterable[LabelPair], *, group_of: Callable[[str, int], str] | None = None) -> dict[str, Any]:
    """Compare pairs of label volumes; see :func:`evaluate_steps`."""
    return drain(evaluate_steps(pairs, group_of=group_of))


def evaluate_steps(
    pairs: Iterable[LabelPair], *, group_of: Callable[[str, int], str] | None = None
) -> Steps[dict[str, Any]]:
    """Compare pairs of label volumes, one at a time.

    Parameters
    ----------
    pairs : iterable of LabelPair
        May make each pair only when it is asked for.
    group_of : callable, optional
        From a pair's name and its number of true objects to the name of the group (a stage, an embryo) that is
        summed up separately.

    Yields
    ------
    Progress
        One per volume.

    Returns
    -------
    dict
        Ready for JSON, free of NaN: ``definitions``, ``pooled``, ``volume_mean``, ``groups`` (figures by group, in
        the order in which they first occur), ``volumes`` (name, group, figures).

    Raises
    ------
    UserError
        If there is no pair, or one cannot be compared (shapes differ, no label volume).
    """
    total = len(pairs) if isinstance(pairs, Sized) else 0
    results: list[_Result] = []
    for done, pair in enumerate(pairs, start=1):
        results.append(_compare(pair))
        yield Progress(done, total, "Comparing")
    if not results:
        raise UserError("There is nothing to compare: no pair of a prediction and its truth was given.")
    return _report(results, group_of)


def to_json(report: Mapping[str, Any]) -> str:
    """Text of a report's file.

    Raises
    ------
    ValueError
        If the report holds NaN or infinity, which JSON has not.
    """
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _compare(pair: LabelPair) -> _Result:
    try:
        overlap = Overlap.of(pair.truth, pair.prediction)
    except (TypeError, ValueError) as error:
        raise UserError(f"{pair.name} cannot be compared with its truth: {error}.") from error
    matchings = tuple(match_overlap(overlap, t) for t in THRESHOLDS)
    return _Result(pair.name, matchings, overlap.seg_ious(), overlap.best_ious())


def _report(results: Sequence[_Result], group_of: Callable[[str, int], str] | None) -> dict[str, Any]:
    volumes = [{"name": r.name, **_figures([r])} for r in results]
    groups: dict[str, list[_Result]] = {}
    if group_of is not None:
        for volume, result in zip(volumes, results, strict=True):
            volume["group"] = group_of(result.name, result.n_true)
            groups.setdefault(volume["group"], []).append(result)
    return {
        "definitions": DEFINITIONS,
        "pooled": _figures(results),
        "volume_mean": _mean_figures(volumes),
        "groups": {name: _figures(members) for name, members in groups.items()},
        "volumes": volumes,
    }


def _figures(results: Sequence[_Result]) -> dict[str, Any]:
    """Figures over the objects of these volumes together."""
    pooled = [pool_matchings([r.matchings[i] for r in results], t) for i, t in enumerate(THRESHOLDS)]
    first = pooled[0]
    objects = first.n_true + first.n_pred
    return {
        "volumes": len(results),
        "true_objects": first.n_true,
        "predicted_objects": first.n_pred,
        "tp": first.tp,
        "fp": first.fp,
        "fn": first.fn,
        "precision": first.precision,
        "recall": first.recall,
        "f1": first.f1,
        "ap_dsb": {f"{m.thresh:.2f}": m.accuracy for m in pooled},
        "ap_dsb_mean": float(np.mean([m.accuracy for m in pooled])),
        "mean_matched_iou": first.mean_matched_score,
        "panoptic_quality": first.panoptic_quality,
        "seg": share(sum(r.seg_ious.sum() for r in results), first.n_true, objects),
        "mucov": share(sum(r.best_ious.sum() for r in results), first.n_pred, objects),
    }


def _mean_figures(volumes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of the volumes' own figures."""
    means: dict[str, Any] = {name: float(np.mean([v[name] for v in volumes])) for name in _MEANS}
    means["ap_dsb"] = {t: float(np.mean([v["ap_dsb"][t] for v in volumes])) for t in volumes[0]["ap_dsb"]}
    return means
