"""Files of the predecessor (gdavid57/3d-mask-r-cnn), read and written.

A folder of its toy data holds, per image, ``images/N.tiff``, ``seg/N.tiff`` (labels 1..n), ``classes_and_boxes/N.dat``
(tab-separated ``class y1 x1 z1 y2 x2 z2``, no header, row k for label k), ``csvs/N.csv`` and ``masks/N.pickle``. Split
files ``datasets/train.csv`` and ``datasets/test.csv`` list paths in the columns ``names,images,segs,cabs,masks``.

**Axes.** The predecessor calls the axes of its arrays y, x, z, in the order of the file: its TIFF pages are its y. We
call the same three axes z, y, x. Nothing is transposed on the way in or out, so a file shows the same picture in any
viewer, and a prediction on it lines up with its labels whoever reads them. The box columns are positional likewise: the
first coordinate belongs to the pages, whatever the header names it. Maiurov's fork, whose box files are in z, y, x and
whose TIFFs are stacks of z, opens correctly by the same rule.

**Known defects tolerated.** The predecessor's CSV counts labels from 2; a file with a single object is a one-line
table. Its pickles are never read.
"""

from __future__ import annotations

import bz2
import csv
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from napari_mrcnn3d._files import atomic_write
from napari_mrcnn3d.io.tiff import write_image
from napari_mrcnn3d.structures import UserError

__all__ = [
    "CLASS_NAMES",
    "Example",
    "SplitEntry",
    "is_seed_table",
    "is_toy_table",
    "read_boxes",
    "read_classes",
    "read_split",
    "write_example",
    "write_splits",
]

CLASS_NAMES = ("ellipsoid", "cuboid", "pyramid")
"""The toy data's classes 1, 2, 3."""

_IMAGES, _LABELS, _BOXES, _TABLES, _MASKS = "images", "seg", "classes_and_boxes", "csvs", "masks"
_SPLIT_LABELS = ("segs", "gt_segs")
_CSV_COLUMNS = ("image", "label", "class", "noise", "y1", "x1", "z1", "y2", "x2", "z2", "ryx", "ryz", "rxz")


@dataclass(frozen=True)
class Example:
    """An image with its objects, label k in row k - 1.

    Attributes
    ----------
    image, labels : uint8 arrays of equal shape
        Labels are 1..n; uint16 if n is larger than 255.
    classes : int64[n]
    boxes : int64[n, 6]
        Near corner, far corner (exclusive), in voxels along the axes of the arrays.
    signals : float64[n]
        Brightness each object adds to the background; the predecessor's CSV calls it noise.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    signals: np.ndarray


@dataclass(frozen=True)
class SplitEntry:
    """One line of a split file, its paths found on this machine.

    Attributes
    ----------
    name : str
    image, labels : Path
    classes : Path or None
        The ``.dat`` table, where the split names one and it exists.
    group : str or None
        The embryo, in the predecessor's embryo splits.
    """

    name: str
    image: Path
    labels: Path
    classes: Path | None
    group: str | None


def is_seed_table(path: Path) -> bool:
    """Whether a table of classes is one of the predecessor's, by its ending and folder."""
    return path.suffix == ".dat" or path.parent.name == _TABLES


def is_toy_table(path: Path) -> bool:
    """Whether a table belongs to toy data: only those have a folder of CSV files beside it."""
    return is_seed_table(path) and (path.parent.parent / _TABLES).is_dir()


def read_boxes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a ``.dat`` table.

    Parameters
    ----------
    path : Path
        Lines of seven numbers, class first, or of six (the embryo data, whose single class is 1).

    Returns
    -------
    classes : int64[N]
    boxes : int64[N, 6]
        First corner, then far corner (exclusive), in voxels along the axes of the file.

    Raises
    ------
    UserError
        If the file cannot be read or a line does not hold six or seven whole numbers.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        values = np.array([[int(float(text)) for text in line] for line in lines], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is no table of boxes: each line needs a class and six coordinates, all whole numbers."
        ) from error
    if not lines:
        return np.zeros(0, np.int64), np.zeros((0, 6), np.int64)
    if values.shape[1] == 6:
        return np.ones(len(values), np.int64), values
    if values.shape[1] != 7:
        raise UserError(f"{path} has {values.shape[1]} columns: a table of boxes has a class and six coordinates.")
    return values[:, 0], values[:, 1:]


def read_classes(path: Path) -> dict[int, int]:
    """Class of every label in one of the predecessor's tables.

    Parameters
    ----------
    path : Path
        A ``.dat`` table, whose row k is label k, or a CSV file, whose labels may count from 1 (right) or from 2 (the
        predecessor's defect).

    Raises
    ------
    UserError
        If the table cannot be understood.
    """
    if path.suffix == ".dat":
        classes, _ = read_boxes(path)
        return dict(enumerate(classes.tolist(), start=1))
    rows = _read_csv(path, ("label", "class"))
    try:
        found = {int(float(row["label"])): int(float(row["class"])) for row in rows}
    except ValueError as error:
        raise UserError(f"{path} holds a label or class that is no whole number: correct that line.") from error
    # labels are 1..n by construction: the smallest one shows from where this file counts
    first = min(found, default=1)
    return {label - first + 1: number for label, number in found.items()}


def read_split(path: Path) -> list[SplitEntry]:
    """Read a split file and find its files on this machine.

    Parameters
    ----------
    path : Path
        CSV with the columns names, images and segs (or gt_segs), optionally cabs and embryos. Paths that do not exist
        as written are looked for below the split file's folder and the two folders above it.

    Raises
    ------
    UserError
        If a column or a file is missing, or the list is empty.
    """
    rows = _read_csv(path, ("names", "images"))
    label_column = next((column for column in _SPLIT_LABELS if rows and rows[0].get(column)), None)
    if label_column is None:
        raise UserError(f"{path} lists no label files: it needs at least one line and a column segs or gt_segs.")
    return [
        SplitEntry(
            name=row["names"],
            image=_required(row["images"], path),
            labels=_required(row[label_column], path),
            classes=_found(row["cabs"], path) if row.get("cabs") else None,
            group=row.get("embryos") or None,
        )
        for row in rows
    ]


def write_example(folder: Path, name: str, example: Example, *, masks: bool = False) -> None:
    """Write the files of one image: ``images``, ``seg``, ``classes_and_boxes`` and ``csvs``.

    The CSV counts labels from 1, as the label image does; the predecessor's own counts from 2.

    Parameters
    ----------
    folder : Path
        Its sub-folders are created.
    name : str
        File name without ending.
    example : Example
    masks : bool
        Also write ``masks/NAME.pickle`` (float64, axes of the image and then object), which the predecessor's program
        reads and ours does not.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    for sub in (_IMAGES, _LABELS, _BOXES, _TABLES, *((_MASKS,) if masks else ())):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    write_image(folder / _IMAGES / f"{name}.tiff", example.image, None)
    write_image(folder / _LABELS / f"{name}.tiff", example.labels, None)
    _write_text(folder / _BOXES / f"{name}.dat", _box_table(example))
    _write_text(folder / _TABLES / f"{name}.csv", _object_table(name, example))
    if masks:
        _write_masks(folder / _MASKS / f"{name}.pickle", example)


def write_splits(folder: Path, *, test_share: float, seed: int) -> None:
    """Draw test images from a folder and write ``datasets/train.csv`` and ``datasets/test.csv``.

    Parameters
    ----------
    folder : Path
        Paths are written as it is given, absolute or relative.
    test_share : float
        Share of test images, rounded up.
    seed : int
        The same seed draws the same images.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    names = sorted(path.stem for path in (folder / _IMAGES).glob("*.tiff"))
    order = np.random.default_rng(seed).permutation(len(names))
    test = set(order[: int(np.ceil(test_share * len(names)))].tolist())
    (folder / "datasets").mkdir(exist_ok=True)
    for split, chosen in (("train", False), ("test", True)):
        rows = [_split_row(folder, name) for k, name in enumerate(names) if (k in test) == chosen]
        columns = ("names", "images", "segs", "cabs", "masks")
        _write_text(folder / "datasets" / f"{split}.csv", _csv_text(columns, rows))


def _split_row(folder: Path, name: str) -> list[str]:
    files = ((_IMAGES, "tiff"), (_LABELS, "tiff"), (_BOXES, "dat"), (_MASKS, "pickle"))
    return [name, *((folder / sub / f"{name}.{ending}").as_posix() for sub, ending in files)]


def _box_table(example: Example) -> str:
    rows = zip(example.classes.tolist(), example.boxes.tolist(), strict=True)
    return "".join("\t".join(map(str, (number, *box))) + "\n" for number, box in rows)


def _object_table(name: str, example: Example) -> str:
    """The CSV of one image; its last columns compare the boxes' half sides, rounded down."""
    rows = []
    for k, (number, box, brightness) in enumerate(
        zip(example.classes.tolist(), example.boxes.tolist(), example.signals.tolist(), strict=True)
    ):
        first, second, third = ((far - near) // 2 for near, far in zip(box[:3], box[3:], strict=True))
        ratios = [min(a, b) / max(a, b, 1) for a, b in ((first, second), (first, third), (second, third))]
        rows.append([k, name, k + 1, number, brightness, *box, *ratios])
    return _csv_text(("", *_CSV_COLUMNS), rows)


def _csv_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _write_masks(path: Path, example: Example) -> None:
    masks = example.labels[..., None] == np.arange(1, len(example.classes) + 1)
    with atomic_write(path) as temporary, bz2.open(temporary, "wb") as file:
        pickle.dump(masks.astype(np.float64), file, protocol=4)  # the newest that its Python 3.6 understands


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file that has these columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(columns) - set(reader.fieldnames or ()))
            rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table ({error}).") from error
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}: it should have {', '.join(columns)}.")
    return rows


def _required(text: str, split: Path) -> Path:
    found = _found(text, split)
    if found is None:
        raise UserError(
            f"{split} lists {text}, which is not there: put the split file beside its images or correct it."
        )
    return found


def _found(text: str, split: Path) -> Path | None:
    """A listed file: as written, or its path or last two parts below the split file's folder or those above it."""
    # Windows' rules understand both kinds of separator
    parts = PureWindowsPath(text).parts
    bases = (split.parent, *split.resolve().parents[1:3])
    candidates = [Path(text), *(base / text for base in bases), *(base.joinpath(*parts[-2:]) for base in bases)]
    return next((path for path in candidates if path.is_file()), None)
