"""A viewer with the Segment widget, and a network's stand-in that tests hold by a string."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from napari.qt.threading import WorkerBase
from qtpy.QtCore import QSettings
from safetensors.numpy import save_file

from napari_mrcnn3d.config import PredictConfig
from napari_mrcnn3d.structures import Candidates, Progress, Steps, Volume
from napari_mrcnn3d.widgets.segment import SegmentWidget

SHAPE = (16, 32, 32)
"""Extent of the images that tests segment."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no display, tests with a window are left out; in CI they fail."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    for item in items:
        if item.get_closest_marker("gui"):
            item.add_marker(pytest.mark.usefixtures("display"))


@pytest.fixture
def display() -> None:
    message = "no display: run under xvfb-run"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def cubes(voxel_size: Any = None, scores: tuple[float, ...] = (0.9, 0.8, 0.6, 0.3), shape: Any = SHAPE) -> Candidates:
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


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path) -> None:
    """Keep what widgets remember out of the home of whoever runs the tests."""
    QSettings.setPath(QSettings.Format.IniFormat, QSettings.Scope.UserScope, str(tmp_path / "settings"))


@pytest.fixture(autouse=True)
def no_leaked_worker() -> Iterator[None]:
    """Every test ends with all its workers gone."""
    yield
    WorkerBase.await_workers(5000)
    gc.collect()


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    """A file with a model's header and no network in it."""
    header = {
        "format": 1,
        "config": {"voxel_size": (2.0, 0.5, 0.5), "class_names": ("nucleus",)},
        "provenance": {"description": "Nuclei made for tests"},
    }
    path = tmp_path / "test-nuclei.safetensors"
    save_file({"nothing": np.zeros(1, np.float32)}, path, {"napari-mrcnn3d": json.dumps(header)})
    return str(path)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def bench(make_napari_viewer_proxy: Any, network: Network, model_file: str, qtbot: Any) -> Bench:
    viewer = make_napari_viewer_proxy()
    widget = SegmentWidget(viewer, network.steps)
    viewer.window.add_dock_widget(widget, name="Segment")
    widget.form.model.choose(model_file)
    return Bench(viewer, widget, network, qtbot)
