"""Measurements against a voxel-by-voxel count, and the columns that come from the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from napari_mrcnn3d.editing.measure import instance_table
from napari_mrcnn3d.io.tiff import read_labels
from napari_mrcnn3d.structures import Candidates, Instances, VoxelSize

SIZE = VoxelSize(2.0, 0.5, 0.25)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    volume = np.random.default_rng(1).integers(0, 6, (6, 7, 8)).astype(np.uint16)
    volume[volume == 4] = 0  # numbers need not be consecutive
    return volume


def of_rows(scores: list[float], classes: list[int]) -> Instances:
    count = len(scores)
    candidates = Candidates(
        np.zeros((count, 6), np.float32),
        np.array(scores, np.float32),
        np.array(classes, np.int64),
        np.zeros((count, 1, 1, 1), np.uint8),
        (6, 7, 8),
        class_names=("nucleus", "debris"),
    )
    return Instances(candidates, np.arange(count), np.ones(count, np.int64))


def test_every_number_against_a_slow_count(labels: np.ndarray) -> None:
    image = np.random.default_rng(2).normal(size=labels.shape)
    table = instance_table(labels, None, SIZE, image)
    assert table["label"].tolist() == [1, 2, 3, 5]
    for row, label in enumerate(table["label"]):
        where = np.argwhere(labels == label)
        inside = image[labels == label]
        centroid = where.mean(axis=0)
        expected = {
            "volume_voxels": len(where),
            "volume_um3": len(where) * 0.25,
            "mean_intensity": inside.mean(),
            "max_intensity": inside.max(),
            **dict(zip(("z1", "y1", "x1"), where.min(axis=0), strict=True)),
            **dict(zip(("z2", "y2", "x2"), where.max(axis=0) + 1, strict=True)),
            **{f"{axis}1_um": at for axis, at in zip("zyx", where.min(axis=0) * SIZE, strict=True)},
            **{f"{axis}2_um": at for axis, at in zip("zyx", (where.max(axis=0) + 1) * SIZE, strict=True)},
            **{f"centroid_{axis}": at for axis, at in zip("zyx", centroid, strict=True)},
            **{f"centroid_{axis}_um": at for axis, at in zip("zyx", centroid * SIZE, strict=True)},
        }
        assert {name: table[name][row] for name in expected} == pytest.approx(expected)
    assert table["volume_voxels"].sum() == np.count_nonzero(labels)


def test_columns_without_voxel_size_are_empty(labels: np.ndarray) -> None:
    table = instance_table(labels, None, None)
    for name in ("volume_um3", "centroid_z_um", "centroid_y_um", "centroid_x_um", "z1_um", "x2_um"):
        assert np.isnan(table[name]).all()
    assert not any(np.isnan(table[name]).any() for name in ("volume_voxels", "centroid_z", "z1"))
    assert "mean_intensity" not in table


def test_score_and_class_belong_to_the_label(labels: np.ndarray) -> None:
    table = instance_table(labels, of_rows([0.9, 0.75, 0.5], [2, 1, 1]), None)
    assert table["class"].tolist() == ["debris", "nucleus", "nucleus", ""]  # label 5 was drawn by hand
    np.testing.assert_allclose(table["score"], [0.9, 0.75, 0.5, np.nan], rtol=1e-6)


def test_border_objects_are_marked() -> None:
    labels = np.zeros((5, 6, 7), np.int32)
    labels[2:4, 2:4, 2:4] = 1
    for label, face in enumerate([np.s_[0, 1, 1], np.s_[4, 1, 1], np.s_[1, 0, 1], np.s_[1, 5, 1], np.s_[1, 1, 6]], 2):
        labels[face] = label
    assert instance_table(labels, None, None)["touches_border"].tolist() == [False, True, True, True, True, True]


def test_one_slice_is_not_all_border() -> None:
    labels = np.zeros((1, 6, 7), np.uint8)
    labels[0, 2:4, 2:4], labels[0, 0, 0] = 1, 2
    assert instance_table(labels, None, None)["touches_border"].tolist() == [False, True]
    assert instance_table(np.ones((1, 1, 1), np.uint8), None, None)["touches_border"].tolist() == [False]


def test_no_object_gives_columns_without_rows() -> None:
    table = instance_table(np.zeros((3, 4, 5), np.uint16), of_rows([], []), SIZE, np.zeros((3, 4, 5)))
    assert {len(column) for column in table.values()} == {0}
    assert list(table) == list(instance_table(np.ones((3, 4, 5), np.uint16), None, SIZE, np.zeros((3, 4, 5))))


def test_huge_label_numbers_take_no_memory_each() -> None:
    labels = np.zeros((3, 4, 5), np.int32)
    labels[0, :2, 0], labels[2, 3, 1:4] = 2_000_000_000, 7
    table = instance_table(labels, None, None)
    assert table["label"].tolist() == [7, 2_000_000_000]
    assert table["volume_voxels"].tolist() == [3, 2]


def test_a_real_volume_is_counted_completely(shared_data: Path) -> None:
    volume = read_labels(shared_data / "qcanet_example" / "labels" / "16cell.tif")
    table = instance_table(np.asarray(volume.data), None, volume.voxel_size)
    assert len(table["label"]) == 16
    np.testing.assert_array_equal(table["volume_voxels"], np.bincount(np.ravel(volume.data))[table["label"]])
    assert table["volume_um3"] == pytest.approx(table["volume_voxels"] * 1.12)


@pytest.mark.parametrize("bad", [np.zeros((3, 4), int), np.zeros((3, 4, 5)), np.full((3, 4, 5), -1)], ids=str)
def test_what_is_no_label_volume_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="3D array of integers"):
        instance_table(bad, None, None)


def test_image_and_labels_must_agree(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        instance_table(labels, None, None, np.zeros((3, 4, 5)))
