"""Patches with their targets, cut from labelled volumes.

Patch ``n`` of a run depends on the seed and ``n`` alone: a resumed run, or one with more worker processes, sees the
same patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from napari_mrcnn3d.config import DataConfig, Triple

__all__ = ["Patch", "PatchSampler", "TrainingVolume", "objects_in"]

Augment = Callable[[np.ndarray, np.ndarray, Triple, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Patch:
    """One training example.

    Attributes
    ----------
    image : float32[D, H, W]
    labels : int32[D, H, W]
    boxes : float32[M, 6]
    classes, ids : int64[M]
        Class and value in ``labels`` of each object.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    ids: np.ndarray


class TrainingVolume:
    """A volume ready to be cut: image normalised, voxels of the model's size.

    Parameters
    ----------
    image : float32[D, H, W]
    labels : int32[D, H, W]
        1..n and 0.
    classes : int64[n + 1]
        Class of each label.
    """

    def __init__(self, image: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> None:
        self.image, self.labels, self.classes = image, labels, classes
        self.voxels = np.bincount(labels.ravel(), minlength=len(classes))
        boxes, _ = objects_in(labels)
        self.boxes = boxes

    @property
    def objects(self) -> int:
        """Number of objects."""
        return len(self.boxes)


def objects_in(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32[M, 6] and ids int64[M] of the labels that occur in a label volume."""
    found = [(i, s) for i, s in enumerate(ndimage.find_objects(labels), start=1) if s is not None]
    boxes = [[*(a.start for a in s), *(a.stop for a in s)] for _, s in found]
    return np.asarray(boxes, np.float32).reshape(-1, 6), np.asarray([i for i, _ in found], np.int64)


class PatchSampler:
    """Random patches of a set of volumes; a map-style dataset for a torch loader.

    Parameters
    ----------
    volumes : sequence of TrainingVolume
    config : DataConfig
    size : tuple of 3 int
        Extent of the patches.
    seed : int
    length : int
        Number of patches in the run.
    augment : callable or None
        ``augment(image, labels, size, seed)`` gives a varied centre part of a larger cut; None cuts plainly.

    Notes
    -----
    A volume is drawn with a probability proportional to the square root of its number of objects: crowded volumes hold
    most objects, sparse ones most kinds of background.
    """

    def __init__(
        self,
        volumes: Sequence[TrainingVolume],
        config: DataConfig,
        *,
        size: Triple,
        seed: int,
        length: int,
        augment: Augment | None,
    ) -> None:
        self.volumes, self.config, self.size = volumes, config, size
        self.seed, self.length, self.augment = seed, length, augment
        weight = np.sqrt([1.0 + v.objects for v in volumes])
        self.share = weight / weight.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self.seed, index])
        volume = self.volumes[rng.choice(len(self.volumes), p=self.share)]
        size = self.size
        centre = self._centre(volume, rng)
        if self.augment is None:
            image, labels = (_cut(a, centre, size) for a in (volume.image, volume.labels))
        else:
            z, y, x = size
            # The margin keeps turned and stretched patches filled with image. It is even, so that the middle of the
            # cut is the middle of the patch: half a voxel between them would blur images and shift labels.
            wide = (z + 2 * (z // 8), y + 2 * (y // 6), x + 2 * (x // 6))
            image, labels = (_cut(a, centre, wide) for a in (volume.image, volume.labels))
            image, labels = self.augment(image, labels, size, int(rng.integers(2**31)))
        return self._patch(volume, image, labels)

    def _centre(self, volume: TrainingVolume, rng: np.random.Generator) -> np.ndarray:
        """Middle of a patch: near a random object, or anywhere; never so far out that it holds little image."""
        shape, size = np.array(volume.image.shape), np.array(self.size)
        if volume.objects and rng.random() < self.config.object_centred:
            box = volume.boxes[rng.integers(volume.objects)]
            centre = (box[:3] + box[3:]) / 2 + (rng.random(3) - 0.5) * size * 0.7
        else:
            centre = rng.random(3) * shape
        inside = np.minimum(size, shape) / 2
        kept: np.ndarray = np.clip(centre, inside, shape - inside)
        return kept

    def _patch(self, volume: TrainingVolume, image: np.ndarray, labels: np.ndarray) -> Patch:
        boxes, ids = objects_in(labels)
        visible = np.bincount(labels.ravel(), minlength=len(volume.voxels))[ids]
        keep = visible >= np.maximum(self.config.min_visible * volume.voxels[ids], 1)
        return Patch(image, labels, boxes[keep], volume.classes[ids[keep]], ids[keep])


def _cut(array: np.ndarray, centre: np.ndarray, size: Triple) -> np.ndarray:
    """Part of an array around a centre, zero where it leaves the array."""
    start = np.round(centre - np.array(size) / 2).astype(int)
    stop = start + size
    inside = tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(start, stop, array.shape, strict=True))
    pad = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(start, stop, array.shape, strict=True)]
    filled: np.ndarray = np.pad(array[inside], pad)
    return filled
