"""Reports on pairs of label volumes: contents, grouping, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from napari_mrcnn3d.metrics.matching import matching, mucov, seg_score
from napari_mrcnn3d.metrics.report import DEFINITIONS, THRESHOLDS, LabelPair, evaluate, evaluate_steps, to_json
from napari_mrcnn3d.structures import Progress, UserError


def row(*values):
    return np.array(values).reshape(1, 1, -1)


@pytest.fixture
def pairs():
    return [
        LabelPair("a", row(1, 1, 2, 2, 0), row(1, 1, 0, 0, 7)),
        LabelPair("b", row(1, 1, 1, 1, 2), row(4, 4, 4, 0, 2)),
        LabelPair("empty", row(0, 0), row(0, 0)),
    ]


def test_pooled_figures_are_those_of_all_objects(pairs):
    report = evaluate(pairs)

    pooled = report["pooled"]
    assert (pooled["volumes"], pooled["true_objects"], pooled["predicted_objects"]) == (3, 4, 4)
    assert (pooled["tp"], pooled["fp"], pooled["fn"], pooled["f1"]) == (3, 1, 1, 0.75)
    assert pooled["seg"] == pytest.approx((1 + 0 + 0.75 + 1) / 4)
    assert pooled["mucov"] == pytest.approx((1 + 0 + 0.75 + 1) / 4)
    assert pooled["mean_matched_iou"] == pytest.approx(2.75 / 3)
    assert pooled["ap_dsb"]["0.75"] == pytest.approx(3 / 5)
    assert pooled["ap_dsb"]["0.80"] == pytest.approx(2 / 6)
    assert pooled["ap_dsb_mean"] == pytest.approx((6 * 3 / 5 + 4 * 2 / 6) / 10)
    assert list(pooled["ap_dsb"]) == [f"{t:.2f}" for t in THRESHOLDS]


def test_each_volume_has_its_own_figures(pairs):
    report = evaluate(pairs)

    assert [v["name"] for v in report["volumes"]] == ["a", "b", "empty"]
    for pair, figures in zip(pairs, report["volumes"], strict=True):
        expected = matching(pair.truth, pair.prediction, 0.5)
        assert (figures["f1"], figures["ap_dsb"]["0.50"]) == (expected.f1, expected.accuracy)
        assert figures["seg"] == seg_score(pair.truth, pair.prediction)
        assert figures["mucov"] == mucov(pair.truth, pair.prediction)
    assert report["volume_mean"]["f1"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert report["volume_mean"]["ap_dsb"]["0.50"] == pytest.approx((1 / 3 + 1 + 1) / 3)


def test_groups_are_summed_up_separately(pairs):
    report = evaluate(pairs, group_of=lambda name, n_true: f"{n_true} objects")

    assert list(report["groups"]) == ["2 objects", "0 objects"]
    assert report["groups"]["2 objects"]["tp"] == 3
    assert [v["group"] for v in report["volumes"]] == ["2 objects", "2 objects", "0 objects"]
    assert evaluate(pairs)["groups"] == {}


def test_the_report_is_plain_json_without_nan(pairs):
    report = evaluate([*pairs, LabelPair("only invented", row(0, 0), row(0, 1)), LabelPair("missed", row(1), row(0))])

    assert json.loads(to_json(report)) == report
    assert report["definitions"] == DEFINITIONS
    named = {word for entry in DEFINITIONS for word in entry.split(", ")}
    assert set(report["pooled"]) - named == {"volumes", "true_objects", "predicted_objects"}
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json({"f1": float("nan")})


def test_volumes_are_compared_one_at_a_time_and_told(pairs):
    made = []

    def lazily():
        for pair in pairs:
            made.append(pair.name)
            yield pair

    steps = evaluate_steps(lazily())
    assert next(steps) == Progress(1, 0, "Comparing")
    assert made == ["a"]
    assert next(evaluate_steps(pairs)) == Progress(1, 3, "Comparing")


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (LabelPair("x.tif", row(1), row(1, 1)), r"x\.tif .* differ in shape: \(1, 1, 1\) and \(1, 1, 2\)"),
        (LabelPair("x.tif", row(1), row(0.5)), r"x\.tif .* whole numbers"),
    ],
)
def test_what_cannot_be_compared_is_named(pair, words):
    with pytest.raises(UserError, match=words):
        evaluate([pair])


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="nothing to compare"):
        evaluate([])


def test_labels_against_themselves_are_perfect(shared_data):
    (path,) = (shared_data / "plantseg_ovule" / "labels").glob("*.tif")
    labels = tifffile.imread(path)

    pooled = evaluate([LabelPair("ovule", labels, labels)])["pooled"]

    assert pooled["true_objects"] == 50
    assert pooled["f1"] == pooled["ap_dsb_mean"] == pooled["seg"] == pooled["mucov"] == 1.0
