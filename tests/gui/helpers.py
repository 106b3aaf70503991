"""A network's stand-in that tests hold by a string, and a viewer with the Segment widget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from napari_mrcnn3d.config import PredictConfig
from napari_mrcnn3d.structures import Candidates, Progress, Steps, Volume
from napari_mrcnn3d.widgets.segment import SegmentWidget

SHAPE = (16, 32, 32)
"""Extent of the images that tests segment."""


def cubes(voxel_size: Any = None, scores: tuple[float, ...] = (0.9, 0.8, 0.75, 0.3), shape: Any = SHAPE) -> Candidates:
    """Cubes of 4 x 6 x 6 voxels side by side, one per score."""
    starts = [(2 + 6 * (k % 2), 2 + 8 * (k // 2), 4) for k in range(len(scores))]
    boxes = np.array([[z, y, x, z + 4, y + 6, x + 6] for z, y, x in starts], np.float32).reshape(-1, 6)
    count = len(scores)
    masks = np.full((count, 4, 6, 6), 255, np.uint8)
    return Candidates(
        boxes, np.array(scores, np.float32), np.ones(count, np.int64), masks, shape, voxel_size, ("nucleus",)
    )


class Network:
    """Stands in for model and predictor; a test decides what comes out, and when.

    Attributes
    ----------
    found : callable
        Makes the candidates from the volume.
    error : Exception or None
        Raised instead.
    go : threading.Event
        The run waits for it, step by step, until it is set.
    seen : list
        (volume, model, config) of every run.
    closed : int
        Runs whose clean-up has happened.
    """

    def __init__(self) -> None:
        self.found: Callable[[Volume], Candidates] = lambda volume: cubes(volume.voxel_size, shape=volume.shape)
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.seen: list[tuple[Volume, str, PredictConfig]] = []
        self.closed = 0

    def steps(self, volume: Volume, model: str, config: PredictConfig) -> Steps[Candidates]:
        self.seen.append((volume, model, config))
        try:
            yield Progress(0, 1000, "Segmenting")
            while not self.go.wait(0.02):
                yield Progress(500, 1000, "Segmenting")
            if self.error is not None:
                raise self.error
            return self.found(volume)
        finally:
            self.closed += 1


class Bench:
    """A viewer with the Segment widget docked, and the network behind it."""

    def __init__(self, viewer: Any, widget: SegmentWidget, network: Network, qtbot: Any) -> None:
        self.viewer, self.widget, self.network, self.qtbot = viewer, widget, network, qtbot

    def add_image(self, **attributes: Any) -> Any:
        """Add a calibrated stack."""
        calibrated = {"scale": (2, 0.5, 0.5), "units": ("um",) * 3, "name": "cells"}
        data = attributes.pop("data", np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8))
        return self.viewer.add_image(data, **(calibrated | attributes))

    def run(self) -> None:
        """Press Run and wait for the end."""
        self.widget.form.run.click()
        self.finish()

    def finish(self) -> None:
        self.network.go.set()
        self.qtbot.waitUntil(lambda: not self.widget.running, timeout=20_000)

    def slide(self, **values: float) -> None:
        """Move sliders and wait until that has taken effect."""
        selection = self.widget.form.selection
        with self.qtbot.waitSignal(selection.changed, timeout=5000):
            for name, value in values.items():
                getattr(selection, name).setValue(value)
        self.qtbot.waitUntil(lambda: selection.config() == self.widget.result.config, timeout=5000)
