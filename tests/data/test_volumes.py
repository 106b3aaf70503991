"""Finding, opening and splitting folders of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_mrcnn3d.config import DataConfig
from napari_mrcnn3d.data.volumes import Pair, find_pairs, split_groups
from napari_mrcnn3d.io.tiff import write_image, write_labels
from napari_mrcnn3d.structures import UserError, VoxelSize

PATTERN = DataConfig().group_pattern
SIZE = VoxelSize(2.0, 0.5, 0.5)


def image(value: int = 7) -> np.ndarray:
    return np.full((2, 3, 4), value, np.uint16)


def labels(*ids: int) -> np.ndarray:
    out = np.zeros((2, 3, 4), np.uint16)
    out.flat[: len(ids)] = ids
    return out


def write_pair(folder: Path, name: str, *, sub: str = "labels", ids: Sequence[int] = (1, 2)) -> None:
    for part in ("images", sub):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_image(folder / "images" / f"{name}.tif", image(), SIZE)
    write_labels(folder / sub / f"{name}.tif", labels(*ids), None)


def write_classes(folder: Path, name: str, *rows: str) -> Path:
    (folder / "classes").mkdir(exist_ok=True)
    path = folder / "classes" / f"{name}.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def pairs_of(groups: Sequence[str]) -> list[Pair]:
    return [Pair(f"v{k}", group, Path("i"), Path("l")) for k, group in enumerate(groups)]


# folders


@pytest.mark.parametrize("sub", ["labels", "masks", "seg", "segs"])
def test_images_and_labels_in_subfolders_are_paired_by_name(tmp_path: Path, sub: str) -> None:
    for name in ("b_t2", "a_t1", "b_t1"):
        write_pair(tmp_path, name, sub=sub)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / ".b_t3.tif").write_text("left by another program")
    pairs, names = find_pairs(tmp_path, PATTERN)
    assert [(p.name, p.group) for p in pairs] == [("a_t1", "a"), ("b_t1", "b"), ("b_t2", "b")]
    assert names == ("object",)
    assert pairs[0].labels == tmp_path / sub / "a_t1.tif"


def test_endings_and_names_may_differ_in_case_of_ending_only(tmp_path: Path) -> None:
    write_pair(tmp_path, "x")
    (tmp_path / "images" / "x.tif").rename(tmp_path / "images" / "x.TIFF")
    assert [p.image.name for p in find_pairs(tmp_path, PATTERN)[0]] == ["x.TIFF"]


def test_a_masks_folder_without_tiffs_is_passed_over(tmp_path: Path) -> None:
    write_pair(tmp_path, "x", sub="seg")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "x.pickle").write_bytes(b"")
    assert find_pairs(tmp_path, PATTERN)[0][0].labels.parent.name == "seg"


@pytest.mark.parametrize("suffix", ["labels", "masks"])
def test_one_flat_folder(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two"):
        write_image(tmp_path / f"{name}.tif", image(), SIZE)
        write_labels(tmp_path / f"{name}_{suffix}.tif", labels(1), None)
    assert [p.name for p in find_pairs(tmp_path, PATTERN)[0]] == ["one", "two"]


def test_the_predecessors_embryo_folders(tmp_path: Path) -> None:
    for sub, ending in (("Inputs", "input"), ("ASTEC_Ground_truth", "ASTEC")):
        (tmp_path / sub).mkdir()
        write_image(tmp_path / sub / f"PM1_t001_{ending}.tiff", image(), None)
    (pair,), _ = find_pairs(tmp_path, PATTERN)
    assert (pair.name, pair.group, pair.labels.name) == ("PM1_t001", "PM1", "PM1_t001_ASTEC.tiff")


def test_the_real_embryos_form_eleven_groups(shared_data: Path) -> None:
    pairs, names = find_pairs(shared_data / "bbbc050", PATTERN)
    assert len(pairs) == 121
    assert {p.group for p in pairs} == {f"Emb{k:02d}" for k in range(1, 12)}
    assert names == ("object",)
    training, validation = split_groups(pairs, validation=("Emb10", "Emb11"), share=0.2, seed=0)
    assert (len(training), len(validation)) == (99, 22)
    volume = validation[0].load()
    assert volume.image.shape == volume.labels.shape
    assert volume.image.dtype == np.uint16
    assert volume.voxel_size == pytest.approx((1.75, 0.8, 0.8))
    assert volume.classes.tolist() == [0] + [1] * int(volume.labels.max())


def test_labels_of_a_real_file_lose_their_gaps(shared_data: Path) -> None:
    ((pair,), _) = find_pairs(shared_data / "plantseg_ovule", PATTERN)
    assert np.unique(pair.load().labels).tolist() == list(range(51))  # ids up to 918 in the file


@pytest.mark.parametrize(
    ("name", "pattern", "group"),
    [
        ("Emb10_t401", PATTERN, "Emb10"),
        ("plate-3_07", PATTERN, "plate-3"),
        ("000001", PATTERN, "000001"),
        ("sample_a", PATTERN, "sample_a"),
        ("Emb10_t401", r"t(\d)", "4"),
        ("Emb10_t401", "Emb", "Emb10_t401"),
    ],
)
def test_the_group_is_the_patterns_first_bracket_or_the_name(
    tmp_path: Path, name: str, pattern: str, group: str
) -> None:
    write_pair(tmp_path, name)
    assert find_pairs(tmp_path, pattern)[0][0].group == group


# what cannot be used


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        find_pairs(tmp_path / "nowhere", PATTERN)


def test_a_folder_without_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"No image with labels was found in {tmp_path}"):
        find_pairs(tmp_path, PATTERN)


def test_images_alone_are_no_pairs(tmp_path: Path) -> None:
    write_image(tmp_path / "x.tif", image(), None)
    with pytest.raises(UserError, match="X_labels"):
        find_pairs(tmp_path, PATTERN)


@pytest.mark.parametrize("flat", [False, True])
def test_images_without_labels_are_listed_up_to_three(tmp_path: Path, flat: bool) -> None:
    if flat:
        write_labels(tmp_path / "z_labels.tif", labels(1), None)
    else:
        write_pair(tmp_path, "z")
    for name in ("a", "b", "c", "d"):
        write_image((tmp_path if flat else tmp_path / "images") / f"{name}.tif", image(), None)
    with pytest.raises(UserError, match=r"4 image\(s\) .*\(a, b, c and 1 more\)"):
        find_pairs(tmp_path, PATTERN)


def test_a_bad_pattern_is_said_to_be_bad(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group pattern"):
        find_pairs(tmp_path, "(")


# opening


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint16, (2, 3, 4), elements=st.integers(0, 9)))
def test_loading_renumbers_and_keeps_the_objects(tmp_path_factory: pytest.TempPathFactory, given_labels) -> None:
    folder = tmp_path_factory.mktemp("pair")
    write_image(folder / "i.tif", image(), SIZE)
    write_labels(folder / "l.tif", given_labels, None)
    volume = Pair("x", "g", folder / "i.tif", folder / "l.tif").load()
    ids = np.unique(given_labels[given_labels > 0])
    assert volume.labels.dtype == np.int32
    assert np.array_equal(np.concatenate([[0], ids])[volume.labels], given_labels)
    assert volume.classes.tolist() == [0] + [1] * len(ids)
    assert (volume.voxel_size, volume.name, volume.group) == (SIZE, "x", "g")


def test_the_labels_voxel_size_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    write_image(tmp_path / "i.tif", image(), None)
    write_labels(tmp_path / "l.tif", labels(1), SIZE)
    assert Pair("x", "g", tmp_path / "i.tif", tmp_path / "l.tif").load().voxel_size == SIZE


def test_different_shapes_are_refused_naming_both(tmp_path: Path) -> None:
    write_image(tmp_path / "i.tif", image(), None)
    write_labels(tmp_path / "l.tif", np.zeros((2, 3, 5), np.uint8), None)
    with pytest.raises(UserError, match=r"i\.tif .*\(2, 3, 4\).*l\.tif.*\(2, 3, 5\)"):
        Pair("x", "g", tmp_path / "i.tif", tmp_path / "l.tif").load()


def test_negative_labels_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "i.tif", image(), None)
    write_image(tmp_path / "l.tif", np.full((2, 3, 4), -1, np.int16), None)
    with pytest.raises(UserError, match="negative"):
        Pair("x", "g", tmp_path / "i.tif", tmp_path / "l.tif").load()


# classes


def test_classes_by_name_are_numbered_in_alphabetic_order(tmp_path: Path) -> None:
    write_pair(tmp_path, "x", ids=(5, 9))
    write_pair(tmp_path, "y", ids=(1,))
    write_classes(tmp_path, "x", "label,class", "5,nucleus", "9,polar body", "11,not drawn")
    write_classes(tmp_path, "y", "label,class,note", "1,dead,?")
    pairs, names = find_pairs(tmp_path, PATTERN)
    assert names == ("dead", "not drawn", "nucleus", "polar body")
    assert pairs[0].load().classes.tolist() == [0, 3, 4]
    assert pairs[1].load().classes.tolist() == [0, 1]


def test_classes_by_number_keep_their_numbers(tmp_path: Path) -> None:
    write_pair(tmp_path, "x", ids=(1, 2))
    write_classes(tmp_path, "x", "label,class", "1,3", "2,1")
    (pair,), names = find_pairs(tmp_path, PATTERN)
    assert names == ("class 1", "class 2", "class 3")
    assert pair.load().classes.tolist() == [0, 3, 1]


def test_a_label_without_class_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "x", ids=(1, 2))
    write_classes(tmp_path, "x", "label,class", "1,a")
    with pytest.raises(UserError, match=r"x\.csv says no class for label 2"):
        find_pairs(tmp_path, PATTERN)[0][0].load()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["label,kind", "1,a"], "columns label and class"),
        (["label,class", "one,a"], "whole number in label"),
        (["label,class", "1"], "columns label and class"),
        (["label,class", "1,"], "without a class"),
        (["label,class", "1,0"], "classes 0 to 0"),
        (["label,class", "1,1000000000"], "at most 255"),
    ],
)
def test_a_bad_class_table_is_named(tmp_path: Path, rows: list[str], message: str) -> None:
    write_pair(tmp_path, "x", ids=(1,))
    write_classes(tmp_path, "x", *rows)
    with pytest.raises(UserError, match=message) as caught:
        find_pairs(tmp_path, PATTERN)
    assert str(tmp_path) in str(caught.value)


# splitting


@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_no_group_is_on_both_sides_and_nothing_is_lost(groups: list[str], share: float, seed: int) -> None:
    pairs = pairs_of(groups)
    training, validation = split_groups(pairs, validation=(), share=share, seed=seed)
    assert sorted(p.name for p in training + validation) == sorted(p.name for p in pairs)
    assert training
    assert bool(validation) == (len(pairs) > 1)
    if len(set(groups)) > 1:
        assert not {p.group for p in training} & {p.group for p in validation}
        count = round(share * len(set(groups)))
        assert len({p.group for p in validation}) == min(max(count, 1), len(set(groups)) - 1)
    assert split_groups(pairs, validation=(), share=share, seed=seed) == (training, validation)


def test_another_seed_draws_another_group() -> None:
    pairs = pairs_of("abcdefgh")
    drawn = {split_groups(pairs, validation=(), share=0.1, seed=seed)[1][0].group for seed in range(20)}
    assert len(drawn) > 3


def test_named_groups_are_used_whatever_the_share() -> None:
    training, validation = split_groups(pairs_of("abca"), validation=("a",), share=0.9, seed=0)
    assert [p.group for p in training] == ["b", "c"]
    assert [p.group for p in validation] == ["a", "a"]


def test_an_unknown_group_is_refused_listing_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no group z .*the groups are a, b"):
        split_groups(pairs_of("ab"), validation=("a", "z"), share=0.2, seed=0)


def test_all_groups_in_validation_are_refused() -> None:
    with pytest.raises(UserError, match="leave one out"):
        split_groups(pairs_of("ab"), validation=("b", "a"), share=0.2, seed=0)


def test_a_single_group_is_parted_by_volume_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training, validation = split_groups(pairs_of("aaaa"), validation=(), share=0.25, seed=3)
    assert (len(training), len(validation)) == (3, 1)
    assert "same group" in caplog.text


def test_a_single_volume_is_trained_on() -> None:
    pairs = pairs_of("a")
    assert split_groups(pairs, validation=(), share=0.5, seed=0) == (pairs, [])
