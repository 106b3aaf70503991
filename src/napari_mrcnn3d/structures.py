"""The nouns of the package: small immutable types that every room shares.

Nothing here imports torch or Qt, so that the command line's help and napari's menus open at once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

__all__ = [
    "ArrayLike",
    "Candidates",
    "DeviceMemoryError",
    "Instances",
    "Progress",
    "Steps",
    "UserError",
    "Volume",
    "VoxelSize",
    "drain",
]

T = TypeVar("T")


class UserError(Exception):
    """Something the user can repair: one sentence with what is wrong, which value, what to do."""


class DeviceMemoryError(UserError):
    """The device ran out of memory and no smaller tile was left to try."""


class VoxelSize(NamedTuple):
    """Edge lengths of a voxel in micrometres, in the order of the array axes."""

    z: float
    y: float
    x: float

    @classmethod
    def of(cls, values: Any) -> VoxelSize:
        """Check three user-given lengths.

        Raises
        ------
        UserError
            If there are not three finite positive numbers.
        """
        try:
            numbers = [] if isinstance(values, str) else [float(v) for v in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != 3 or not all(np.isfinite(v) and v > 0 for v in numbers):
            raise UserError(f"Voxel size {values!r} is not usable: give three positive lengths in µm, z y x.")
        return cls(*numbers)

    @property
    def volume(self) -> float:
        """Volume of one voxel in µm³."""
        return self.z * self.y * self.x


class ArrayLike(Protocol):
    """What a volume's data must offer; numpy, dask and zarr arrays all do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the elements."""
        ...

    def __getitem__(self, key: Any) -> Any: ...


@dataclass(frozen=True)
class Volume:
    """A single-channel 3D image or label volume with its calibration.

    Attributes
    ----------
    data : array-like, shape (z, y, x)
    voxel_size : VoxelSize or None
        None where the source does not say.
    name : str
        Where it came from, for messages.
    """

    data: ArrayLike
    voxel_size: VoxelSize | None = None
    name: str = "image"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extent in voxels (z, y, x)."""
        z, y, x = self.data.shape
        return int(z), int(y), int(x)


@dataclass(frozen=True)
class Candidates:
    """Everything the network found down to a low score floor, best first.

    Attributes
    ----------
    boxes : float32[N, 6]
        z1, y1, x1, z2, y2, x2 in voxels of the image, half-open, inside it.
    scores : float32[N]
        In [0, 1], descending.
    classes : int64[N]
        Index into ``class_names`` plus one; 0 is background and never occurs.
    masks : uint8[N, mz, my, mx]
        Foreground probability times 255 on a regular grid over the box (cell centres).
    shape : tuple of int
        Extent of the image (z, y, x).
    voxel_size : VoxelSize or None
        Of the image.
    class_names : tuple of str
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray
    shape: tuple[int, int, int]
    voxel_size: VoxelSize | None = None
    class_names: tuple[str, ...] = ("object",)

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 6) or self.masks.ndim != 4:
            raise ValueError(f"boxes must be [N, 6] and masks [N, z, y, x], got {self.boxes.shape}, {self.masks.shape}")
        if not (len(self.scores) == len(self.classes) == len(self.masks) == n):
            raise ValueError("boxes, scores, classes and masks differ in length")

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        mask_size: tuple[int, int, int] = (1, 1, 1),
        voxel_size: VoxelSize | None = None,
        class_names: tuple[str, ...] = ("object",),
    ) -> Candidates:
        """No candidate at all, for an image of this shape."""
        return cls(
            np.zeros((0, 6), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros((0, *mask_size), np.uint8),
            shape,
            voxel_size,
            class_names,
        )

    def take(self, index: np.ndarray) -> Candidates:
        """The candidates at these positions (integers or a boolean mask), in that order."""
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            classes=self.classes[index],
            masks=self.masks[index],
        )


@dataclass(frozen=True)
class Instances:
    """What a selection keeps of the candidates; label ``k`` belongs to row ``k - 1``.

    Attributes
    ----------
    candidates : Candidates
        The kept ones, best first.
    index : int64[N]
        Their positions in the candidates that were selected from.
    voxels : int64[N]
        Voxels each one paints; those of the final volume once better-scoring neighbours took theirs.
    """

    candidates: Candidates
    index: np.ndarray
    voxels: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Progress:
    """One step of a long job.

    Attributes
    ----------
    done, total : int
        In units of ``stage``; ``total`` 0 means unknown.
    stage : str
        What is being done, for people: "Segmenting", "Training".
    metrics : dict
        Figures worth showing (losses, F1, seconds left).
    """

    done: int
    total: int
    stage: str
    metrics: dict[str, float] = field(default_factory=dict)


Steps = Generator[Progress, None, T]
"""A long job: yields :class:`Progress`, returns its result, is cancelled by closing it."""


def drain(steps: Steps[T]) -> T:
    """Run a job to its end and give its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
