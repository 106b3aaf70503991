"""Score-ranked figures against worked examples, a slow oracle and their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from napari_mrcnn3d.metrics.average_precision import (
    COLUMNS,
    LabelledObjects,
    Ranking,
    SeedColumns,
    average_precision,
    pool_rankings,
    rank_predictions,
    seed_columns,
    summarise_columns,
)

VOLUMES = arrays(np.int64, (2, 3, 3), elements=st.integers(0, 4))
NUMBERS = st.lists(st.sampled_from([0.3, 0.5, 0.5, 0.9]), min_size=4, max_size=4)
CLASSES = st.lists(st.integers(1, 2), min_size=4, max_size=4)


def row(*values):
    return np.array(values).reshape(1, 1, -1)


def ranking(hits, n_true, classes=None, true_classes=None):
    """A ranking whose matches all have the IoU 0.8."""
    hits = np.array(hits, bool)
    scores = np.linspace(0.9, 0.1, len(hits))
    classes = np.ones(len(hits), int) if classes is None else np.array(classes)
    true_classes = np.ones(n_true, int) if true_classes is None else np.array(true_classes)
    return Ranking(0.5, scores, hits * 0.8, classes, true_classes)


def greedy(true, pred, scores, classes, true_classes, thresh):
    """Slow oracle: (score, IoU) of each prediction in order, taken one at a time over whole masks."""
    free = [i for i in np.unique(true) if i]
    result = []
    for p in sorted((i for i in np.unique(pred) if i), key=lambda i: -scores[i - 1]):
        ious = {t: ((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum() for t in free}
        fit = {t: v for t, v in ious.items() if v >= thresh and true_classes[t - 1] == classes[p - 1]}
        if fit:
            best = max(fit, key=lambda t: fit[t])
            free.remove(best)
            result.append((scores[p - 1], fit[best]))
        else:
            result.append((scores[p - 1], 0.0))
    return result


def envelope_area(hits, n_true):
    """Slow oracle: area under the envelope, one step for each true object found."""
    hits = list(hits)
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    return sum(max(precision[k:]) / n_true for k, hit in enumerate(hits) if hit)


@settings(deadline=None, max_examples=100)
@given(VOLUMES, VOLUMES, NUMBERS, CLASSES, CLASSES, st.sampled_from([0.2, 0.5]))
def test_predictions_choose_in_the_order_of_their_scores(true, pred, scores, classes, true_classes, thresh):
    truth = LabelledObjects(true, np.array(true_classes))
    prediction = LabelledObjects(pred, np.array(classes), np.array(scores))

    (result,) = rank_predictions(truth, prediction, (thresh,))

    expected = np.reshape(greedy(true, pred, scores, classes, true_classes, thresh), (-1, 2))
    assert np.stack([result.scores, result.ious], axis=1) == pytest.approx(expected)
    assert len(result.true_classes) == len(np.unique(true[true > 0]))


def test_the_surest_prediction_takes_its_best_object_and_leaves_the_rest():
    # 4, the surest, has an IoU of 2/4 with 1 and of 1/3 with 2; it takes 1, though 3 has nothing else.
    true, pred = row(1, 1, 1, 2, 0), row(3, 4, 4, 4, 0)
    scores = np.array([0.0, 0.0, 0.5, 0.9])

    (result,) = rank_predictions(LabelledObjects(true), LabelledObjects(pred, scores=scores), (0.2,))

    assert result.scores.tolist() == [0.9, 0.5]
    assert result.ious.tolist() == [0.5, 0.0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=12), st.integers(0, 4))
def test_the_exact_area_is_that_of_the_envelope(hits, missed):
    n_true = sum(hits) + missed
    nothing = float(not hits)

    area = average_precision(ranking(hits, n_true), curve="voc")

    assert area == pytest.approx(envelope_area(hits, n_true) if n_true else nothing)
    assert average_precision(ranking(hits, n_true)) == pytest.approx(area, abs=0.011 * max(1, len(hits)))


def test_worked_curve():
    # Precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4.
    one = ranking([True, False, True], 4)

    assert average_precision(one, curve="voc") == pytest.approx(1 / 4 + 2 / 3 / 4)
    # 26 of the 101 recalls (0 to 0.25) have precision 1, the next 25 (to 0.5) 2/3, the rest 0.
    assert average_precision(one) == pytest.approx((26 + 25 * 2 / 3) / 101)


def test_classes_are_averaged_unless_joined():
    both = ranking([True, False, True], 0, classes=[1, 2, 2], true_classes=[1, 2, 2])

    assert average_precision(both, curve="voc") == pytest.approx((1 + 0.5 * 0.5) / 2)
    assert average_precision(both, curve="voc", by_class=False) == pytest.approx(1 / 3 + 2 / 3 / 3)


def test_a_class_without_true_objects_does_not_count():
    assert average_precision(ranking([True, False], 0, classes=[1, 2], true_classes=[1])) == 1.0


def test_pooling_ranks_over_all_volumes():
    sure_and_wrong = Ranking(0.5, np.array([0.99]), np.array([0.0]), np.array([1]), np.array([1]))
    right = Ranking(0.5, np.array([0.6, 0.5]), np.array([0.7, 0.9]), np.array([1, 1]), np.array([1, 1]))

    pooled = pool_rankings([right, sure_and_wrong])

    assert pooled.hits.tolist() == [False, True, True]
    assert average_precision(pooled, curve="voc") == pytest.approx(2 / 3 * 2 / 3)
    with pytest.raises(ValueError, match="same threshold"):
        pool_rankings([])


def test_the_predecessors_columns_of_a_worked_image():
    # Found by label 1 (IoU 2/3); label 2 is of the wrong class; label 3, surest of all, hits nothing; object 9 missed.
    true, pred = row(1, 1, 2, 2, 0, 9), row(1, 0, 2, 2, 3, 0)
    true_classes = np.array([1, 2, 0, 0, 0, 0, 0, 0, 1])

    columns = seed_columns(
        LabelledObjects(true, true_classes), LabelledObjects(pred, np.array([1, 1, 1]), np.array([0.7, 0.8, 0.9]))
    )

    assert columns == pytest.approx((1 / 3 / 3, 1 / 3, 1 / 3, 0.5))


@pytest.mark.parametrize(
    ("true", "pred", "expected"),
    [
        (row(1, 0), row(0, 0), (0.0, math.nan, 0.0, math.nan)),
        (row(0, 0), row(1, 0), (math.nan, 0.0, math.nan, math.nan)),
        (row(0, 0), row(0, 0), (math.nan,) * 4),
        (row(1, 0), row(0, 1), (0.0, 0.0, 0.0, math.nan)),
    ],
    ids=["nothing predicted", "nothing there", "both empty", "no match"],
)
def test_columns_without_meaning_are_nan(true, pred, expected):
    columns = seed_columns(LabelledObjects(true), LabelledObjects(pred, scores=np.array([0.5])))

    assert columns == pytest.approx(expected, nan_ok=True)


def test_means_of_columns_with_and_without_undefined_images():
    rows = [SeedColumns(1.0, 0.5, 0.6, 0.7), SeedColumns(0.0, math.nan, 0.0, math.nan)]

    summary = summarise_columns(rows)

    assert tuple(summary) == COLUMNS
    assert summary["precision-50"] == {"mean": 0.5, "mean_undefined_as_zero": 0.25, "undefined": 1}
    assert summary["map-50"] == {"mean": 0.5, "mean_undefined_as_zero": 0.5, "undefined": 0}
    assert summarise_columns([])["iou-50"] == {"mean": None, "mean_undefined_as_zero": None, "undefined": 0}


def test_predictions_need_scores_for_every_label():
    truth = LabelledObjects(row(1, 2))

    with pytest.raises(ValueError, match="need scores"):
        rank_predictions(truth, LabelledObjects(row(1, 2)))
    with pytest.raises(ValueError, match="label 2 has no class or score"):
        rank_predictions(truth, LabelledObjects(row(1, 2), scores=np.array([0.5])))
