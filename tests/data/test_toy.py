"""The toy images against the literal recipe and its published statistics (SEEDS.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import find_objects, rotate

from napari_mrcnn3d.config import DataConfig, ToyConfig
from napari_mrcnn3d.data import toy
from napari_mrcnn3d.data.seed_format import CLASS_NAMES
from napari_mrcnn3d.data.toy import generate_toy_steps, toy_image
from napari_mrcnn3d.data.volumes import find_pairs
from napari_mrcnn3d.structures import drain

SMALL = ToyConfig(image_size=32, base_radius=4, max_objects=8, seed=3)
PERCENTILES = (5, 25, 50, 75, 95)


# the recipe, word for word and slowly


def literal_shape(number: int, half: np.ndarray) -> np.ndarray:
    """Upright voxels by loops over their coordinates."""
    a, b, c = half.tolist()
    if number == 1:
        side = 2 * max(a, b, c)
        out = np.zeros((side,) * 3, np.uint8)
        for z, y, x in np.ndindex(out.shape):
            distance = sum(((v - side // 2) / r) ** 2 for v, r in ((z, a), (y, b), (x, c)))
            out[z, y, x] = distance <= 1
        return out
    out = np.zeros((2 * a, 2 * b, 2 * c), np.uint8)
    for z, y, x in np.ndindex(out.shape):
        left = 1 - x / (2 * c) if number == 3 else 1
        out[z, y, x] = z < int(left * 2 * a) and y < int(left * 2 * b)
    return out


def literal_turn(voxels: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Three spline rotations one after the other, then the bounding box."""
    turned = np.pad(voxels, 1)
    for angle, axes in zip(angles, ((1, 2), (0, 2), (0, 1)), strict=True):
        turned = rotate(turned, angle, axes=axes, reshape=True, order=3, mode="nearest")
    return turned[find_objects((turned > 0).astype(int))[0]] > 0


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("half", [(1, 1, 1), (7, 4, 5), (3, 9, 6)])
def test_upright_shapes_are_the_recipes(number: int, half: tuple[int, int, int]) -> None:
    sides = np.array(half)
    assert np.array_equal(toy._shape(number, sides), literal_shape(number, sides))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_turned_shapes_are_the_recipes_voxel_for_voxel(number: int, seed: int) -> None:
    rng = np.random.default_rng([number, seed])
    half, angles = rng.integers(3, 20, 3), rng.uniform(0, 360, 3)
    voxels = toy._shape(number, half)
    assert np.array_equal(toy._turned(voxels, angles), literal_turn(voxels, angles))


@pytest.mark.parametrize("angles", [(0, 0, 0), (90, 180, 270), (45, 0, 0)])
def test_special_angles_are_no_exception(angles: tuple[float, float, float]) -> None:
    voxels = toy._shape(3, np.array([6, 4, 5]))
    expected = literal_turn(voxels, np.array(angles, float))
    turned = toy._turned(voxels, np.array(angles, float))
    # right angles put voxel centres on ties, which rounding errors decide
    assert turned.shape == expected.shape
    assert (turned != expected).mean() < 0.02


def test_sizes_are_half_to_twice_the_base_radius() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([toy._half_sides(ToyConfig(), rng) for _ in range(2000)])
    assert (drawn.min(), drawn.max()) == (7, 29)
    assert drawn.mean() == pytest.approx(18.25, abs=0.3)  # of int(15 U(0.5, 2))
    assert toy._half_sides(ToyConfig(base_radius=0.5), rng).min() == 1


# one image


def test_an_image_and_its_objects_agree() -> None:
    made = toy_image(SMALL, 5)
    n = len(made.classes)
    assert 0 < n <= made.requested
    assert np.unique(made.labels).tolist() == list(range(n + 1))
    for label, box in enumerate(made.boxes, start=1):
        where = np.argwhere(made.labels == label)
        assert [*where.min(0), *(where.max(0) + 1)] == box.tolist()
    assert set(made.classes.tolist()) <= {1, 2, 3}
    assert ((made.signals >= 0.02) & (made.signals <= 0.10)).all()
    assert (made.image.dtype, made.labels.dtype) == (np.uint8, np.uint8)
    assert (made.image.min(), made.image.max()) == (0, 255)
    assert made.image.shape == made.labels.shape == (32, 32, 32)


def test_an_image_depends_on_its_number_and_the_seed_alone() -> None:
    first = toy_image(SMALL, 2)
    toy_image(SMALL, 9)
    assert np.array_equal(first.image, toy_image(SMALL, 2).image)
    assert not np.array_equal(first.image, toy_image(SMALL, 3).image)
    assert not np.array_equal(first.image, toy_image(SMALL.model_copy(update={"seed": 4}), 2).image)


def test_noise_is_photons_inside_objects_only() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[10:30, 10:30, 10:30] = 1
    image = toy._observed(labels, np.array([0.5]), np.random.default_rng(0)).astype(float)
    inside, outside = image[labels == 1], image[labels == 0]
    # per unit of signal: photons have mean 0.5 and variance 0.5 / 10, the rest 0.05 squared and 0.01 squared / 12
    unit = (inside.mean() - outside.mean()) / 0.5
    assert outside.std() / unit == pytest.approx(np.sqrt(0.05**2 + 0.01**2 / 12), rel=0.03)
    assert inside.std() / unit == pytest.approx(np.sqrt(0.05 + 0.05**2 + 0.01**2 / 12), rel=0.03)


def test_objects_too_large_for_the_image_are_given_up() -> None:
    made = toy_image(ToyConfig(image_size=16, base_radius=16), 0)
    assert (len(made.boxes), made.boxes.shape, made.labels.max()) == (0, (0, 6), 0)


def test_an_image_without_objects_is_possible() -> None:
    made = toy_image(ToyConfig(image_size=16, min_objects=0, max_objects=0), 0)
    assert (made.requested, len(made.classes)) == (0, 0)


def test_many_objects_get_wider_labels() -> None:
    assert toy_image(ToyConfig(image_size=16, base_radius=1, max_objects=300), 0).labels.dtype == np.uint16


# the published statistics


@dataclass
class Statistics:
    """What SEEDS.md publishes of 120 images, gathered."""

    requested: list[int] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    sides: list[np.ndarray] = field(default_factory=list)
    volumes: list[int] = field(default_factory=list)
    occupancy: list[float] = field(default_factory=list)
    background: list[tuple[float, float]] = field(default_factory=list)
    brightness: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, made: toy.ToyImage) -> None:
        self.requested.append(made.requested)
        self.placed.append(len(made.boxes))
        self.classes += made.classes.tolist()
        self.sides += list(made.boxes[:, 3:] - made.boxes[:, :3])
        self.volumes += np.bincount(made.labels.ravel(), minlength=len(made.boxes) + 1)[1:].tolist()
        self.occupancy.append(float((made.labels > 0).mean()))
        empty = made.image[made.labels == 0]
        self.background.append((empty.mean(), empty.std()))
        for label, signal in enumerate(made.signals, start=1):
            values = made.image[made.labels == label]
            self.brightness.append((signal, values.mean(), values.std()))

    def fill(self, number: int) -> float:
        chosen = np.array(self.classes) == number
        return float(np.median(np.array(self.volumes)[chosen] / np.prod(self.sides, axis=1)[chosen]))

    def grey(self, low: float) -> np.ndarray:
        """Mean grey value and deviation of objects with a signal in low..low + 0.02."""
        return np.mean([row[1:] for row in self.brightness if low <= row[0] < low + 0.02], axis=0)


def gathered(count: int) -> Statistics:
    found = Statistics()
    for index in range(count):
        found.add(toy_image(ToyConfig(seed=1), index))
    return found


def check(found: Statistics, *, error: float) -> None:
    """Compare with the published figures; ``error`` scales the allowed deviations, 1 for 120 images."""
    sides = np.array(found.sides)
    assert np.percentile(sides, PERCENTILES) == pytest.approx([20, 29, 38, 48, 62], abs=1.5 * error)
    geometric = np.cbrt(sides.prod(axis=1))
    assert np.percentile(geometric, PERCENTILES) == pytest.approx([23.4, 31.2, 36.9, 44.3, 55.5], abs=1.6 * error)
    aspect = sides.min(axis=1) / sides.max(axis=1)
    assert np.percentile(aspect, PERCENTILES) == pytest.approx([0.39, 0.55, 0.67, 0.78, 0.91], abs=0.03 * error)
    assert np.median(found.volumes) == pytest.approx(14022, rel=0.06 * error)
    assert np.percentile(found.volumes, 25) == pytest.approx(8092, rel=0.06 * error)
    assert [found.fill(number) for number in (1, 2, 3)] == pytest.approx([0.42, 0.28, 0.17], abs=0.02 * error)
    shares = np.bincount(found.classes, minlength=4)[1:] / len(found.classes)
    assert shares == pytest.approx([0.39, 0.22, 0.39], abs=0.05 * error)
    assert np.mean(found.requested) == pytest.approx(10.8, abs=1.4 * error)
    assert np.mean(found.placed) == pytest.approx(9.7, abs=1.2 * error)
    assert np.mean(found.occupancy) == pytest.approx(0.083, abs=0.012 * error)
    assert np.mean(found.background, axis=0) == pytest.approx([64.6, 13.0], abs=1.0 * error)
    published = {0.02: (71.3, 18.9), 0.04: (77.3, 22.4), 0.06: (81.4, 24.8), 0.08: (85.7, 27.1)}
    for low, (mean, deviation) in published.items():
        assert found.grey(low) == pytest.approx([mean, deviation], abs=1.3 * error)


def test_statistics_of_few_images_are_near_the_published() -> None:
    check(gathered(8), error=4.5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_statistics_of_120_images_are_the_published() -> None:
    found = gathered(120)
    check(found, error=1)
    given_up = np.mean(np.array(found.placed) < found.requested)
    assert given_up == pytest.approx(0.30, abs=0.12)
    assert 3 <= min(found.placed) <= 5 < 16 <= max(found.placed) <= 20


# data sets


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    made = {}
    for workers in (1, 2):
        folder = drain(generate_toy_steps(SMALL, tmp_path / str(workers), 3, workers=workers))
        made[workers] = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.parent.name != "datasets"
        }
    assert made[1] == made[2]
    assert sorted(made[1]) == sorted(
        f"{sub}/{k:06d}.{ending}"
        for k in (1, 2, 3)
        for sub, ending in (("images", "tiff"), ("seg", "tiff"), ("classes_and_boxes", "dat"), ("csvs", "csv"))
    )


def test_a_data_set_opens_and_holds_the_images_made(tmp_path: Path) -> None:
    folder = drain(generate_toy_steps(SMALL, tmp_path / "toy", 2))
    pairs, names = find_pairs(folder, DataConfig().group_pattern)
    assert names == CLASS_NAMES
    assert [p.name for p in pairs] == ["000001", "000002"]
    assert len({p.group for p in pairs}) == 2
    made, volume = toy_image(SMALL, 1), pairs[1].load()
    assert np.array_equal(volume.image, made.image)
    assert np.array_equal(volume.labels, made.labels)
    assert volume.classes.tolist() == [0, *made.classes]
    train, _ = find_pairs(folder / "datasets" / "train.csv", DataConfig().group_pattern)
    test, _ = find_pairs(folder / "datasets" / "test.csv", DataConfig().group_pattern)
    assert (len(train), len(test)) == (1, 1)


def test_masks_are_written_only_when_asked_for(tmp_path: Path) -> None:
    folder = drain(generate_toy_steps(SMALL, tmp_path, 1, masks=True))
    assert [p.name for p in (folder / "masks").iterdir()] == ["000001.pickle"]
