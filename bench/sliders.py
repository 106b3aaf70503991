"""How fast labels follow the sliders: candidates are turned into voxels once, then selected and painted per change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from _machine import markdown_table, write_results

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.structures import Candidates, VoxelSize

VOXEL_SIZE = VoxelSize(1.75, 0.8, 0.8)
MASK = (20, 28, 28)
CASES = (
    # candidates, image, goal in ms per change
    (500, (128, 256, 256), 100.0),
    (3000, (256, 256, 256), 200.0),
)
CHANGES = 15
"""Positions tried of every slider."""


def main() -> None:
    """Measure every case and write bench/results/sliders.json and .md."""
    cases = [measure(count, shape, goal) for count, shape, goal in CASES]
    header = ["candidates", "image", "once (s)", "median (ms)", "5 to 95 % (ms)", "slowest (ms)", "goal (ms)", "met"]
    rows = [
        [
            case["candidates"],
            " x ".join(map(str, case["shape"])),
            f"{case['once_s']:.2f}",
            f"{case['change_ms']['median']:.1f}",
            f"{case['change_ms']['p5']:.1f} to {case['change_ms']['p95']:.1f}",
            f"{case['change_ms']['max']:.1f}",
            f"{case['goal_ms']:.0f}",
            "yes" if case["met"] else "no",
        ]
        for case in cases
    ]
    text = "# Sliders\n\nSelection and painting after one change of one slider, without drawing on the screen.\n\n"
    write_results("sliders", {"mask": MASK, "cases": cases}, text + markdown_table(header, rows))


def measure(count: int, shape: tuple[int, int, int], goal: float) -> dict[str, Any]:
    """Time one case; every change is a new selection and a repainted label volume.

    Parameters
    ----------
    count : int
        Candidates.
    shape : tuple of int
        Image (z, y, x).
    goal : float
        Milliseconds that 95 % of the changes may take at most.
    """
    candidates = crowded_nuclei(count, shape)
    start = time.perf_counter()
    footprints = Footprints.of(candidates)
    once = time.perf_counter() - start
    labels = np.zeros(shape, np.uint16)
    paint(footprints, select(footprints, SelectConfig()), out=labels)  # the first touches the memory
    selecting, painting, kept = [], [], []
    for config in slider_positions(float(np.median(footprints.voxels)) * VOXEL_SIZE.volume):
        start = time.perf_counter()
        instances = select(footprints, config)
        selected = time.perf_counter()
        paint(footprints, instances, out=labels)
        selecting.append(selected - start)
        painting.append(time.perf_counter() - selected)
        kept.append(len(instances))
    change = np.add(selecting, painting)
    return {
        "candidates": count,
        "shape": shape,
        "voxels_per_candidate": float(footprints.voxels.mean()),
        "pairs_that_share_voxels": sum(map(len, footprints.shared)),
        "kept": {"fewest": min(kept), "most": max(kept)},
        "changes": len(change),
        "once_s": once,
        "select_ms": spread(selecting),
        "paint_ms": spread(painting),
        "change_ms": spread(change),
        "goal_ms": goal,
        "met": bool(np.percentile(change, 95) * 1000 <= goal),
    }


def crowded_nuclei(count: int, shape: tuple[int, int, int]) -> Candidates:
    """Ellipsoids of nuclear size, three answers to each object on average, as a network gives before selection."""
    rng = np.random.default_rng(0)
    objects = rng.integers(0, count // 3, count)
    centre = rng.uniform(0, shape, (count // 3, 3))[objects] + rng.normal(0, 1, (count, 3))
    radius = rng.uniform((4, 7, 7), (8, 14, 14), (count // 3, 3))[objects] * rng.normal(1, 0.05, (count, 3))
    boxes = np.concatenate([np.clip(centre - radius, 0, shape), np.clip(centre + radius, 0, shape)], axis=1)
    cells = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1 for size in MASK], indexing="ij")
    inside = 255 / (1 + np.exp(12 * (np.linalg.norm(cells, axis=0) - 0.95)))
    masks = np.clip(inside + rng.normal(0, 10, (count, *MASK)), 0, 255)
    scores = np.sort(rng.beta(1, 1, count) * 0.95 + 0.05)[::-1]
    return Candidates(
        boxes.astype(np.float32), scores.astype(np.float32), np.ones(count, np.int64), masks.astype(np.uint8),
        shape, VOXEL_SIZE,
    )  # fmt: skip


def slider_positions(typical: float) -> Iterator[SelectConfig]:
    """Drag each of the three sliders through its range while the others rest; ``typical`` is a size in µm³."""
    for at in np.linspace(0, 1, CHANGES).tolist():
        yield SelectConfig(min_score=at)
        yield SelectConfig(min_score=0.05, max_overlap=at)
        yield SelectConfig(min_score=0.05, min_size=2 * typical * at)


def spread(seconds: Any) -> dict[str, float]:
    """Median, range and 5th and 95th percentile in milliseconds."""
    names = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    return {name: round(float(np.percentile(seconds, at)) * 1000, 3) for name, at in names.items()}


if __name__ == "__main__":
    main()
