"""Matching of label volumes against slow oracles and worked examples."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from napari_mrcnn3d.metrics.matching import (
    match_overlap,
    matching,
    matching_dataset,
    mucov,
    pool_matchings,
    seg_score,
)
from napari_mrcnn3d.metrics.overlap import Overlap

IDS = st.sampled_from([0, 0, 0, 1, 2, 7, 918, 65_536, 2**32 - 1])
VOLUMES = arrays(np.int64, (2, 3, 3), elements=IDS)


def iou_table(true, pred):
    """Slow oracle: ids of both sides and their IoU, from one mask per object."""
    true_ids, pred_ids = ([i for i in np.unique(labels) if i] for labels in (true, pred))
    table = np.zeros((len(true_ids), len(pred_ids)))
    for (i, t), (j, p) in ((a, b) for a in enumerate(true_ids) for b in enumerate(pred_ids)):
        table[i, j] = ((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum()
    return true_ids, pred_ids, table


def best_assignment(table, thresh):
    """Slow oracle: number of matches and their summed IoU, the best over all one-to-one assignments."""
    table = table if table.shape[0] <= table.shape[1] else table.T
    rows = range(len(table))
    found = [
        [table[i, c] for i, c in zip(rows, p, strict=True)] for p in permutations(range(table.shape[1]), len(table))
    ]
    return max((sum(v >= thresh for v in one), math.fsum(v for v in one if v >= thresh)) for one in found)


def row(*values):
    """A volume of one row of voxels."""
    return np.array(values).reshape(1, 1, -1)


@settings(deadline=None, max_examples=150)
@given(VOLUMES, VOLUMES, st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 0.6, 1.0]))
def test_matching_is_the_best_of_all_assignments(true, pred, thresh):
    _, _, table = iou_table(true, pred)
    count, total = best_assignment(table, thresh)

    result = matching(true, pred, thresh)

    assert (result.tp, result.fp, result.fn) == (count, table.shape[1] - count, table.shape[0] - count)
    assert result.scores.sum() == pytest.approx(total)
    assert len(set(result.pairs[:, 0])) == len(set(result.pairs[:, 1])) == count
    for (t, p), score in zip(result.pairs, result.scores, strict=True):
        assert score == ((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum() >= thresh


@settings(deadline=None, max_examples=100)
@given(VOLUMES, VOLUMES)
def test_seg_and_mucov_follow_their_definitions(true, pred):
    true_ids, pred_ids, table = iou_table(true, pred)
    nothing = float(not true_ids and not pred_ids)
    covered = [
        next((table[i, j] for j, p in enumerate(pred_ids) if (pred[true == t] == p).mean() > 0.5), 0.0)
        for i, t in enumerate(true_ids)
    ]

    assert seg_score(true, pred) == pytest.approx(np.mean(covered) if true_ids else nothing)
    best = table.max(axis=0) if true_ids else np.zeros(len(pred_ids))
    assert mucov(true, pred) == pytest.approx(best.mean() if pred_ids else nothing)


@settings(deadline=None, max_examples=50)
@given(VOLUMES, VOLUMES)
def test_figures_do_not_depend_on_names_or_sides(true, pred):
    names = {old: new for new, old in enumerate(np.unique(true)[::-1], start=5)}
    renamed = np.vectorize(lambda v: names[v] if v else 0, otypes=[np.int64])(true)

    one, other, mirrored = matching(true, pred), matching(renamed, pred), matching(pred, true)

    assert (one.tp, one.fp, one.fn) == (other.tp, other.fp, other.fn) == (mirrored.tp, mirrored.fn, mirrored.fp)
    assert one.precision == pytest.approx(mirrored.recall)


def test_worked_example_gives_stardists_figures():
    # Objects 1 (4 voxels) and 2 (2) against 5 (3, all in 1), 6 (1 of 2) and 7 (invented).
    true = row(1, 1, 1, 1, 0, 2, 2, 0, 0)
    pred = row(5, 5, 5, 0, 0, 6, 0, 7, 7)

    result = matching(true, pred, 0.5)

    assert (result.tp, result.fp, result.fn) == (2, 1, 0)
    assert result.pairs.tolist() == [[1, 5], [2, 6]]
    figures = (result.precision, result.recall, result.f1, result.accuracy)
    assert figures == pytest.approx((2 / 3, 1.0, 0.8, 2 / 3))
    assert (result.mean_matched_score, result.mean_true_score) == pytest.approx((0.625, 0.625))
    assert result.panoptic_quality == pytest.approx(1.25 / 2.5)
    assert seg_score(true, pred) == pytest.approx(0.75 / 2), "6 covers half of 2, not more than half"
    assert mucov(true, pred) == pytest.approx((0.75 + 0.5 + 0) / 3)


@pytest.mark.parametrize(("thresh", "tp"), [(0.5, 1), (0.5000001, 0)])
def test_an_iou_equal_to_the_threshold_is_a_match(thresh, tp):
    assert matching(row(1, 1, 0), row(1, 0, 0), thresh).tp == tp


def test_thresholds_of_five_percent_steps_are_met_exactly():
    true = np.ones((1, 1, 20), int)
    for found in range(10, 20):
        pred = (np.arange(20) < found).astype(int).reshape(true.shape)
        assert matching(true, pred, found / 20).tp == 1


def test_one_prediction_over_two_objects_counts_once():
    result = matching(row(1, 1, 2, 2), row(9, 9, 9, 9), 0.5)

    assert (result.tp, result.fp, result.fn) == (1, 0, 1)


def test_contested_objects_are_shared_out_for_the_most_matches():
    # 1 overlaps 5 best, but 2 has nobody else: 1 must take 6.
    true = row(1, 1, 1, 2, 2, 0)
    pred = row(6, 5, 5, 5, 0, 0)

    assert matching(true, pred, 0.2).pairs.tolist() == [[1, 6], [2, 5]]
    assert matching(true, pred, 0.3).pairs.tolist() == [[1, 5]]


def test_volumes_without_background():
    true = np.repeat([[1, 2], [3, 4]], 3, axis=1)[None]

    assert matching(true, true).f1 == 1.0
    assert seg_score(true, true) == mucov(true, true) == 1.0
    assert matching(true, np.ones_like(true)).tp == 0


@pytest.mark.parametrize(
    ("n_true", "n_pred", "value"),
    [(0, 0, 1.0), (0, 2, 0.0), (2, 0, 0.0)],
    ids=["both empty", "no truth", "no prediction"],
)
def test_volumes_without_objects_have_defined_figures(n_true, n_pred, value):
    true, pred = (np.where(np.arange(4) < n, np.arange(1, 5), 0).reshape(1, 1, 4) for n in (n_true, n_pred))

    result = matching(true, pred)

    names = "precision recall f1 accuracy mean_matched_score mean_true_score panoptic_quality"
    assert {name: getattr(result, name) for name in names.split()} == dict.fromkeys(names.split(), value)
    assert seg_score(true, pred) == mucov(true, pred) == value


def test_more_than_65535_objects_with_large_ids():
    # Touching objects of 1 x 2 x 2 voxels; the prediction is shifted along x in the last plane, where the IoU is 1/3.
    ids = np.arange(8 * 96 * 96, dtype=np.uint32).reshape(8, 96, 96) * np.uint32(58_000) + np.uint32(1)
    true = np.repeat(np.repeat(ids, 2, axis=1), 2, axis=2)
    pred = true.copy()
    pred[7] = np.roll(true[7], 1, axis=1)

    strict, loose = matching(true, pred, (0.5, 0.3))

    assert strict.n_true == strict.n_pred == 73_728
    assert strict.tp == 7 * 96 * 96
    assert strict.pairs.max() > 2**31
    assert loose.tp == 73_728


def test_volumes_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr("napari_mrcnn3d.metrics.overlap._BLOCK_VOXELS", 40)
    rng = np.random.default_rng(3)
    true, pred = rng.integers(0, 5, (2, 9, 4, 4))

    class Lazy:
        shape, dtype, asked = true.shape, true.dtype, []

        def __getitem__(self, key):
            Lazy.asked.append(true[key].size)
            return true[key]

    table = iou_table(true, pred)[2]
    overlap = Overlap.of(Lazy(), pred)

    assert max(Lazy.asked) <= 40
    assert overlap.iou == pytest.approx(table[overlap.pairs[:, 0], overlap.pairs[:, 1]])
    assert overlap.voxels.sum() == ((true > 0) & (pred > 0)).sum()
    assert overlap.true_sizes.tolist() == np.bincount(true.ravel())[1:].tolist()


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i4", "u8", bool])
def test_any_whole_number_type_is_read(dtype):
    mask = np.zeros((2, 4, 4), dtype)
    mask[:, 1:3] = 1

    assert matching(mask, mask.astype(np.int64)).tp == 1


@pytest.mark.parametrize(
    ("pred", "error", "words"),
    [
        (np.zeros((1, 2, 3), int), ValueError, "differ in shape"),
        (np.full((1, 2, 2), -1), ValueError, "between 0 and"),
        (np.full((1, 2, 2), 2**32), ValueError, "between 0 and"),
        (np.zeros((1, 2, 2)), TypeError, "whole numbers"),
    ],
)
def test_what_is_no_label_volume_is_refused(pred, error, words):
    with pytest.raises(error, match=words):
        matching(np.zeros((1, 2, 2), int), pred)


@pytest.mark.parametrize("thresh", [0.0, -0.5, 1.01, float("nan")])
def test_impossible_thresholds_are_refused(thresh):
    with pytest.raises(ValueError, match="IoU threshold"):
        matching(row(1), row(1), thresh)


def test_a_data_set_pools_objects_not_figures():
    good, bad, empty = row(1, 1, 2, 2), row(1, 0, 0, 0), row(0, 0, 0, 0)

    half, whole = matching_dataset([good, good, empty], [good, bad, empty], (0.5, 0.9))

    assert (half.tp, half.fp, half.fn, half.n_true) == (3, 0, 1, 4)
    assert (whole.tp, whole.fp, whole.fn) == (2, 1, 2)
    assert half.mean_matched_score == pytest.approx(2.5 / 3)
    assert matching_dataset([good], [bad]).recall == 0.5
    assert matching_dataset([], []).f1 == 1.0
    with pytest.raises(ValueError, match="is shorter than"):
        matching_dataset([good], [])
    with pytest.raises(ValueError, match="same threshold"):
        pool_matchings([half, whole], 0.5)


def test_qcanet_prediction_of_a_16_cell_embryo(shared_data):
    folder = shared_data / "qcanet_example"
    true = tifffile.imread(folder / "labels" / "16cell.tif")
    pred = tifffile.imread(folder / "qcanet_prediction" / "16cell.tif")

    results = matching(true, pred, (0.5, 0.6, 0.75, 0.9))

    assert [r.tp for r in results] == [16, 15, 8, 0]  # stardist 0.9.2 gives the same counts
    assert results[0].mean_matched_score == pytest.approx(0.735593, abs=1e-6)  # as does its mean
    for (t, p), score in zip(results[0].pairs, results[0].scores, strict=True):
        assert score == pytest.approx(((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum())


def test_a_long_chain_of_contested_objects_is_solved():
    # Every object overlaps its two neighbours of the other side equally: one component of 4000 objects.
    true = row(*np.repeat(np.arange(1, 2001), 2))
    pred = np.roll(true, 1)

    result = match_overlap(Overlap.of(true, pred), 0.3)

    assert result.tp == 2000
    assert result.scores == pytest.approx(np.full(2000, 1 / 3))
