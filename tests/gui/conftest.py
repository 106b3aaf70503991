"""Fixtures of the tests that open windows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from napari.qt.threading import WorkerBase
from qtpy.QtCore import QSettings
from safetensors.numpy import save_file

from napari_mrcnn3d.widgets.segment import SegmentWidget
from tests.gui.helpers import Bench, Network


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where there is no display, tests with a window are skipped; in CI they fail."""
    has_display = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if item.get_closest_marker("gui") and not has_display:
        message = "no display: run under xvfb-run"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path) -> None:
    """Keep what widgets remember out of the home of whoever runs the tests."""
    QSettings.setPath(QSettings.Format.IniFormat, QSettings.Scope.UserScope, str(tmp_path / "settings"))


@pytest.fixture(autouse=True)
def no_leaked_worker() -> Iterator[None]:
    """Every test ends with all its workers gone."""
    yield
    WorkerBase.await_workers(5000)


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    """A file with a model's header and no network in it."""
    header = {
        "format": 1,
        "config": {"voxel_size": (2.0, 0.5, 0.5), "object_size": 6.0, "class_names": ("nucleus",)},
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
