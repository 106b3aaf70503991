"""Folders of images with their labels: found, opened, split into training and validation."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_mrcnn3d.data import seed_format
from napari_mrcnn3d.io.tiff import read_image, read_labels
from napari_mrcnn3d.structures import UserError, VoxelSize

__all__ = ["UNNAMED", "LabelledVolume", "Pair", "find_pairs", "split_groups"]

logger = logging.getLogger(__name__)

UNNAMED = ("object",)
"""Class names of a folder that tells no classes."""

# Sub-folders and what their file names end in; the last of each is the predecessor's embryo data.
_IMAGE_FOLDERS = (("images", ""), ("Inputs", "_input"))
_LABEL_FOLDERS = (("labels", ""), ("masks", ""), ("seg", ""), ("segs", ""), ("ASTEC_Ground_truth", "_ASTEC"))
_FLAT_SUFFIXES = ("_labels", "_masks")
_CLASS_FILES = (("classes", ".csv"), ("classes_and_boxes", ".dat"), ("csvs", ".csv"))
_LARGEST_CLASS = 255


@dataclass(frozen=True)
class LabelledVolume:
    """An image whose objects are known.

    Attributes
    ----------
    image : array, shape (z, y, x)
        In the file's own type.
    labels : int32 array, shape (z, y, x)
        0 is background, objects are 1..n without gaps.
    classes : int64[n + 1]
        Entry k is the class of label k; entry 0 is 0.
    voxel_size : VoxelSize or None
        In µm; None where neither file says.
    name, group : str
        File name without its ending, and what it must stay together with when data are split.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    voxel_size: VoxelSize | None
    name: str
    group: str


@dataclass(frozen=True)
class Pair:
    """Where an image and its labels lie.

    Attributes
    ----------
    name, group : str
        As in :class:`LabelledVolume`.
    image, labels : Path
        TIFF files of equal shape.
    classes : Path or None
        Table of the objects' classes; None where there is a single class.
    class_names : tuple of str
        Names of the classes 1, 2, ... of the whole folder.
    """

    name: str
    group: str
    image: Path
    labels: Path
    classes: Path | None = None
    class_names: tuple[str, ...] = UNNAMED

    def load(self) -> LabelledVolume:
        """Read both files.

        Raises
        ------
        UserError
            If a file cannot be read, the shapes differ, the labels are not whole numbers from 0 up, or an object
            has no class.
        """
        image, labels = read_image(self.image), read_labels(self.labels)
        if image.shape != labels.shape:
            raise UserError(
                f"{self.image} has the shape {image.shape} and its labels {self.labels} have {labels.shape}: "
                "both must be of the same size (z, y, x)."
            )
        ids, relabelled = _consecutive(np.asarray(labels.data))
        return LabelledVolume(
            image=np.asarray(image.data),
            labels=relabelled,
            classes=self._classes_of(ids),
            voxel_size=image.voxel_size or labels.voxel_size,
            name=self.name,
            group=self.group,
        )

    def _classes_of(self, ids: np.ndarray) -> np.ndarray:
        """Class of background and of every label in ``ids``."""
        classes = np.zeros(len(ids) + 1, np.int64)
        if self.classes is None:
            classes[1:] = 1
            return classes
        texts = _read_classes(self.classes)
        for row, label in enumerate(ids.tolist(), start=1):
            if label not in texts:
                raise UserError(f"{self.classes} says no class for label {label} of {self.labels}: add a line for it.")
            text = texts[label]
            classes[row] = self.class_names.index(text) + 1 if text in self.class_names else int(text)
        return classes


def find_pairs(folder: Path, group_pattern: str) -> tuple[list[Pair], tuple[str, ...]]:
    """Every image with labels in a folder.

    Accepted are sub-folders ``images`` and ``labels`` (or ``masks``, ``seg``, ``segs``) with equal file names; one
    folder with ``X.tif`` beside ``X_labels.tif`` or ``X_masks.tif``; the predecessor's folders; and a CSV file of the
    predecessor that lists a split. Classes come from ``classes/X.csv`` (columns ``label,class``, names or numbers) or
    from the predecessor's tables; without them there is the single class "object".

    Parameters
    ----------
    folder : Path
        The folder, or the split file.
    group_pattern : str
        Regular expression whose first bracket, matched on a file name without its ending, names the group. A name
        that does not match is a group of its own.

    Returns
    -------
    pairs : list of Pair
        Sorted by name.
    class_names : tuple of str
        Names of the classes 1, 2, ...

    Raises
    ------
    UserError
        If nothing usable is found, an image has no labels, a table cannot be understood or the pattern is no regular
        expression.
    """
    group_of = _compiled(group_pattern)
    folder = Path(folder)
    if folder.is_file():
        found = [_Files(e.name, e.image, e.labels, e.classes, e.group) for e in seed_format.read_split(folder)]
    elif folder.is_dir():
        found = _in_subfolders(folder) or _in_one_folder(folder)
    else:
        raise UserError(f"There is no folder {folder}: give one that holds images and their labels.")
    if not found:
        raise UserError(
            f"No image with labels was found in {folder}: it needs the sub-folders images and labels with equal file "
            "names, or files X.tif beside X_labels.tif."
        )
    names = _class_names([entry.classes for entry in found if entry.classes], folder)
    pairs = [
        Pair(f.name, f.group or _group(f.name, group_of), f.image, f.labels, f.classes, names)
        for f in sorted(found, key=lambda f: f.name)
    ]
    return pairs, names


def split_groups(
    pairs: Sequence[Pair], *, validation: Sequence[str], share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Part the pairs so that no group is on both sides.

    Parameters
    ----------
    pairs : sequence of Pair
    validation : sequence of str
        Groups kept for validation; if empty, ``share`` of the groups is drawn.
    share : float
        In [0, 1]. Of two groups or more at least one stays on each side; a single group is parted by volume, with a
        warning; a single volume is used for training alone.
    seed : int
        The same seed draws the same groups.

    Returns
    -------
    training, validation : lists of Pair
        In the order of ``pairs``.

    Raises
    ------
    UserError
        If a named group does not exist or none is left to train on.
    """
    groups = sorted({pair.group for pair in pairs})
    if validation:
        unknown = sorted(set(validation) - set(groups))
        if unknown:
            raise UserError(
                f"There is no group {_listed(unknown)} to validate on: the groups are {_listed(groups, 20)}."
            )
        chosen = set(validation)
        if chosen == set(groups):
            raise UserError(f"All groups ({_listed(groups)}) are kept for validation: leave one out to train on.")
    elif len(groups) > 1:
        chosen = set(_drawn(groups, share, seed))
    else:
        return _split_volumes(pairs, share, seed)
    return [p for p in pairs if p.group not in chosen], [p for p in pairs if p.group in chosen]


@dataclass(frozen=True)
class _Files:
    """The files of one pair, before groups and classes are known."""

    name: str
    image: Path
    labels: Path
    classes: Path | None = None
    group: str | None = None


def _in_subfolders(folder: Path) -> list[_Files]:
    """Pairs of a folder whose images and labels lie in folders of their own."""
    images = _first_with_tiffs(folder, _IMAGE_FOLDERS)
    labels = _first_with_tiffs(folder, _LABEL_FOLDERS)
    if not images or not labels:
        return []
    _refuse_unlabelled(set(images) - set(labels), folder)
    return [_Files(name, images[name], labels[name], _class_file(folder, name)) for name in images]


def _in_one_folder(folder: Path) -> list[_Files]:
    """Pairs of a folder that holds ``X.tif`` beside ``X_labels.tif``."""
    files = _tiffs(folder)
    labels = {
        name.removesuffix(suffix): path
        for suffix in _FLAT_SUFFIXES
        for name, path in files.items()
        if name.endswith(suffix)
    }
    images = {name: path for name, path in files.items() if path not in labels.values()}
    if labels:
        _refuse_unlabelled(set(images) - set(labels), folder)
    return [_Files(name, images[name], labels[name], _class_file(folder, name)) for name in images if name in labels]


def _first_with_tiffs(folder: Path, choices: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """TIFF files by name of the first sub-folder that has any: the predecessor's ``masks`` holds none."""
    for name, suffix in choices:
        files = _tiffs(folder / name)
        if files:
            return {stem.removesuffix(suffix): path for stem, path in files.items()}
    return {}


def _tiffs(folder: Path) -> dict[str, Path]:
    """TIFF files of a folder by name without ending; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    files = (p for p in sorted(folder.iterdir()) if p.suffix.lower() in {".tif", ".tiff"})
    return {p.stem: p for p in files if not p.name.startswith(".")}


def _class_file(folder: Path, name: str) -> Path | None:
    """Table with the classes of one image, if there is one."""
    candidates = (folder / sub / f"{name}{ending}" for sub, ending in _CLASS_FILES)
    return next((path for path in candidates if path.is_file()), None)


def _refuse_unlabelled(names: set[str], folder: Path) -> None:
    if names:
        raise UserError(
            f"{len(names)} image(s) in {folder} have no labels ({_listed(sorted(names))}): add label files of the same "
            "name or take these images out."
        )


def _class_names(tables: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Names of the classes that occur in a folder's tables."""
    texts = {text for table in tables for text in _read_classes(table).values()}
    if not texts:
        return UNNAMED
    if not all(text.isdecimal() for text in texts):
        return tuple(sorted(texts))
    numbers = [int(text) for text in texts]
    if not 1 <= min(numbers) <= max(numbers) <= _LARGEST_CLASS:
        raise UserError(
            f"The class tables of {folder} hold classes {min(numbers)} to {max(numbers)}: number classes from 1 "
            f"(0 is background) to at most {_LARGEST_CLASS}, or name them."
        )
    if max(numbers) <= len(seed_format.CLASS_NAMES) and any(seed_format.is_toy_table(table) for table in tables):
        return seed_format.CLASS_NAMES
    return UNNAMED if max(numbers) == 1 else tuple(f"class {k}" for k in range(1, max(numbers) + 1))


def _read_classes(path: Path) -> dict[int, str]:
    """Class of every label, as it stands in a table."""
    if seed_format.is_seed_table(path):
        return {label: str(number) for label, number in seed_format.read_classes(path).items()}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            texts = {int(row["label"]): row["class"].strip() for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} is no table of classes: it needs the columns label and class, with a whole number in label."
        ) from error
    if "" in texts.values():
        raise UserError(f"{path} has a label without a class: write its class or take the line out.")
    return texts


def _consecutive(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that occur, and the labels renumbered 1..n in their order."""
    ids = np.unique(labels)
    ids = ids[ids > 0]
    # position among the ids, counted from 1; background stays 0
    return ids, np.searchsorted(ids, labels, side="right").astype(np.int32)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"The group pattern {pattern!r} is no regular expression ({error}).") from error


def _group(name: str, pattern: re.Pattern[str]) -> str:
    """First bracket of the pattern on the name, else the name itself."""
    match = pattern.search(name)
    return (match.group(1) or name) if match and pattern.groups else name


def _drawn(items: Sequence[str], share: float, seed: int) -> list[str]:
    """A share of the items, at least one and not all."""
    count = min(max(round(share * len(items)), 1), len(items) - 1)
    return [items[k] for k in np.random.default_rng(seed).permutation(len(items))[:count]]


def _split_volumes(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Part a single group by volume."""
    if len(pairs) < 2:
        return list(pairs), []
    logger.warning(
        "All %d volumes belong to the group %s: validation volumes are drawn from the same group, so the figures will "
        "look better than on new data.",
        len(pairs),
        pairs[0].group,
    )
    chosen = set(_drawn([pair.name for pair in pairs], share, seed))
    return [p for p in pairs if p.name not in chosen], [p for p in pairs if p.name in chosen]


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Some names for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
