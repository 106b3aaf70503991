"""The predecessor's files: what we write it can read, what it wrote we can read."""

from __future__ import annotations

import bz2
import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_mrcnn3d.config import DataConfig
from napari_mrcnn3d.data import seed_format
from napari_mrcnn3d.data.seed_format import Example, read_boxes, read_classes, read_split, write_example, write_splits
from napari_mrcnn3d.data.volumes import find_pairs
from napari_mrcnn3d.structures import UserError

PATTERN = DataConfig().group_pattern
CSV_HEADER = ",image,label,class,noise,y1,x1,z1,y2,x2,z2,ryx,ryz,rxz"


def example(*classes: int) -> Example:
    """Bricks of 2 x 3 x 4 voxels, one after the other along the last axis, in an image without two equal sides."""
    labels = np.zeros((5, 6, 4 * len(classes) + 7), np.uint8)
    boxes = []
    for k in range(len(classes)):
        labels[1:3, 2:5, 4 * k : 4 * k + 4] = k + 1
        boxes.append([1, 2, 4 * k, 3, 5, 4 * k + 4])
    return Example(
        image=np.arange(labels.size, dtype=np.uint32).reshape(labels.shape).astype(np.uint8),
        labels=labels,
        classes=np.array(classes, np.int64),
        boxes=np.array(boxes, np.int64).reshape(-1, 6),
        signals=np.linspace(0.02, 0.1, len(classes)),
    )


def foreign_folder(folder: Path, *, first_label: int, classes: tuple[int, ...]) -> None:
    """A folder as the predecessor leaves it, less the table of boxes; its CSV counts labels from ``first_label``."""
    made = example(*classes)
    for sub in ("images", "seg", "csvs"):
        (folder / sub).mkdir(parents=True)
    tifffile.imwrite(folder / "images" / "000001.tiff", made.image)
    tifffile.imwrite(folder / "seg" / "000001.tiff", made.labels)
    rows = [f"{k},000001,{k + first_label},{number},0.05,1,2,0,3,5,4,0.5,0.5,0.5" for k, number in enumerate(classes)]
    (folder / "csvs" / "000001.csv").write_text("\n".join([CSV_HEADER, *rows]) + "\n")


# tables of boxes


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), *[st.integers(0, 500)] * 6), max_size=6))
def test_boxes_and_classes_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, rows) -> None:
    path = tmp_path_factory.mktemp("dat") / "x.dat"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    classes, boxes = read_boxes(path)
    assert [(k, *box) for k, box in zip(classes.tolist(), boxes.tolist(), strict=True)] == rows
    assert boxes.shape == (len(rows), 6)
    assert read_classes(path) == {k: row[0] for k, row in enumerate(rows, start=1)}


def test_the_embryo_tables_have_no_class(tmp_path: Path) -> None:
    path = tmp_path / "PM1_t001_boxes.dat"
    path.write_text("-2\t3\t4\t10\t11\t12\n")
    classes, boxes = read_boxes(path)
    assert (classes.tolist(), boxes.tolist()) == ([1], [[-2, 3, 4, 10, 11, 12]])


def test_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_text("1.0 0.0 0.0 0.0 2.0 2.0 2.0\n\n")
    assert read_boxes(path)[1].tolist() == [[0, 0, 0, 2, 2, 2]]


@pytest.mark.parametrize("text", ["1\t2\t3\n", "a b c d e f g\n", "1 0 0 0 1 1 1\n1 0 0 0\n", "1 0 0 0 1 1 inf\n"])
def test_a_bad_table_of_boxes_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.dat"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.dat"):
        read_boxes(path)


# folders


@pytest.mark.parametrize("classes", [(2,), (3, 1, 1), ()])
def test_a_folder_we_write_opens_with_its_classes(tmp_path: Path, classes: tuple[int, ...]) -> None:
    made = example(*classes)
    write_example(tmp_path, "000001", made)
    (pair,), names = find_pairs(tmp_path, PATTERN)
    volume = pair.load()
    assert names == (("ellipsoid", "cuboid", "pyramid") if classes else ("object",))
    assert np.array_equal(volume.image, made.image)
    assert np.array_equal(volume.labels, made.labels)
    assert volume.classes.tolist() == [0, *classes]


def test_box_columns_follow_the_axes_of_the_file(tmp_path: Path) -> None:
    made = example(1, 2)
    write_example(tmp_path, "000001", made)
    stored = tifffile.imread(tmp_path / "seg" / "000001.tiff")
    for label, box in enumerate(read_boxes(tmp_path / "classes_and_boxes" / "000001.dat")[1], start=1):
        where = np.argwhere(stored == label)
        assert [*where.min(0), *(where.max(0) + 1)] == box.tolist()


def test_the_csv_has_the_predecessors_columns_and_the_right_labels(tmp_path: Path) -> None:
    write_example(tmp_path, "000007", example(3, 1))
    with (tmp_path / "csvs" / "000007.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == CSV_HEADER
    assert [row[:4] for row in rows] == [["0", "000007", "1", "3"], ["1", "000007", "2", "1"]]
    # half sides 1, 1 and 2 of a brick of 2 x 3 x 4
    assert [float(value) for value in rows[1][4:]] == [0.1, 1, 2, 4, 3, 5, 8, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("first_label", [1, 2])
@pytest.mark.parametrize("classes", [(2,), (3, 1, 2)])
def test_csv_labels_may_count_from_one_or_two(tmp_path: Path, first_label: int, classes: tuple[int, ...]) -> None:
    foreign_folder(tmp_path, first_label=first_label, classes=classes)
    ((pair,), names) = find_pairs(tmp_path, PATTERN)
    assert pair.load().classes.tolist() == [0, *classes]
    assert names == seed_format.CLASS_NAMES


def test_a_csv_with_words_for_classes_is_refused(tmp_path: Path) -> None:
    foreign_folder(tmp_path, first_label=1, classes=(1,))
    path = tmp_path / "csvs" / "000001.csv"
    path.write_text(path.read_text().replace(",1,1,", ",1,round,"))
    with pytest.raises(UserError, match=r"000001\.csv holds a label or class"):
        find_pairs(tmp_path, PATTERN)


def test_masks_are_written_as_its_program_reads_them(tmp_path: Path) -> None:
    made = example(1, 3)
    write_example(tmp_path, "000001", made, masks=True)
    with bz2.open(tmp_path / "masks" / "000001.pickle") as file:
        masks = pickle.load(file)  # our own file, written a line above
    assert masks.dtype == np.float64
    assert np.array_equal(masks @ np.array([1, 2]), made.labels)


# splits


def written_split(folder: Path, count: int = 8) -> Path:
    for k in range(count):
        write_example(folder, f"{k + 1:06d}", example(1, 2))
    write_splits(folder, test_share=0.2, seed=4)
    return folder / "datasets"


def test_a_split_parts_all_images_and_opens(tmp_path: Path) -> None:
    datasets = written_split(tmp_path)
    with (datasets / "train.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["names", "images", "segs", "cabs", "masks"]
    train, _ = find_pairs(datasets / "train.csv", PATTERN)
    test, names = find_pairs(datasets / "test.csv", PATTERN)
    assert (len(train), len(test)) == (6, 2)
    assert sorted(p.name for p in train + test) == [f"{k:06d}" for k in range(1, 9)]
    assert names == seed_format.CLASS_NAMES
    assert test[0].load().classes.tolist() == [0, 1, 2]


def test_the_same_seed_draws_the_same_split(tmp_path: Path) -> None:
    first = (written_split(tmp_path) / "test.csv").read_bytes()
    write_splits(tmp_path, test_share=0.2, seed=5)
    other = (tmp_path / "datasets" / "test.csv").read_bytes()
    write_splits(tmp_path, test_share=0.2, seed=4)
    assert (tmp_path / "datasets" / "test.csv").read_bytes() == first != other


@pytest.mark.parametrize(
    "stored",
    ["./data/{}", "/gpfs/someone/data/{}", "C:\\data\\{}", "{}"],
    ids=["relative", "elsewhere", "windows", "bare"],
)
def test_a_split_made_elsewhere_finds_its_files_beside_it(tmp_path: Path, stored: str) -> None:
    datasets = written_split(tmp_path / "moved", count=2)
    paths = ["images\\000002.tiff" if "\\" in stored else "images/000002.tiff", "seg/000002.tiff"]
    rows = ["names,images,segs,cabs,masks", "000002," + ",".join(stored.format(p) for p in paths) + ",,"]
    (datasets / "train.csv").write_text("\n".join(rows) + "\n")
    (pair,), names = find_pairs(datasets / "train.csv", PATTERN)
    assert pair.image == tmp_path / "moved" / "images" / "000002.tiff"
    assert pair.labels == tmp_path / "moved" / "seg" / "000002.tiff"
    assert (pair.classes, names) == (None, ("object",))


def test_embryo_splits_name_the_group(tmp_path: Path) -> None:
    written_split(tmp_path, count=1)
    split = tmp_path / "test.csv"
    split.write_text(
        "images,gt_segs,boxes,names,embryos\nimages/000001.tiff,seg/000001.tiff,Boxes/x.dat,PM1_t001,PM1\n"
    )
    (entry,) = read_split(split)
    assert (entry.name, entry.group, entry.classes) == ("PM1_t001", "PM1", None)
    assert find_pairs(split, PATTERN)[0][0].group == "PM1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names,pictures\n", "lacks the column images"),
        ("names,images,segs\n", "lists no label files"),
        ("names,images,boxes\nx,images/x.tiff,x.dat\n", "lists no label files"),
        ("names,images,segs\nx,images/x.tiff,seg/x.tiff\n", r"lists images/x\.tiff, which is not there"),
    ],
)
def test_a_bad_split_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"train\.csv {message}"):
        find_pairs(path, PATTERN)


def test_a_binary_file_is_no_split(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot be read as a CSV table"):
        find_pairs(path, PATTERN)
