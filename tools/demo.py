"""The main job in one go: a stack is opened in napari, segmented with the bundled model, and shown with its objects.

python tools/demo.py [--image STACK.tif] [--screenshot PICTURE.png]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import napari
import numpy as np
from qtpy.QtWidgets import QApplication

from napari_mrcnn3d.config import EmbryoConfig
from napari_mrcnn3d.data.embryo import embryo_image
from napari_mrcnn3d.io.tiff import read_image, write_image
from napari_mrcnn3d.structures import UserError
from napari_mrcnn3d.widgets.segment import SegmentWidget

MODEL = "embryo-nuclei"
FOLDER = Path("demo")
WINDOW = (1580, 960)


def main() -> int:
    """Run the demo; the exit code is 2 if the image cannot be segmented."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="your own TIFF stack; a synthetic embryo if not given")
    parser.add_argument("--screenshot", type=Path, help="save a picture of the window here and end")
    options = parser.parse_args()
    try:
        path = options.image or synthetic_embryo()
        viewer, widget = open_napari(path)
        segment(widget)
    except UserError as error:
        print(f"mrcnn3d: {error}", file=sys.stderr)
        return 2
    print(f"==> {len(widget.result.instances)} objects found, {len(widget.result.footprints)} candidates in all.")
    show_side_by_side(viewer, widget)
    if options.screenshot is None:
        print("==> Move the sliders and turn the view; the grid button, bottom left, lays one over the other.")
        napari.run()
        return 0
    picture(viewer, options.screenshot)
    return 0


def synthetic_embryo() -> Path:
    """Write a synthetic embryo as a TIFF stack."""
    made = embryo_image(EmbryoConfig(min_nuclei=24), 0)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "embryo.tif"
    write_image(path, made.image, made.voxel_size)
    z, y, x = made.image.shape
    print(f"==> A synthetic embryo with {made.labels.max()} nuclei, {z} x {y} x {x} voxels, is in {path}.")
    return path


def open_napari(path: Path) -> tuple[napari.Viewer, SegmentWidget]:
    """Open an image in napari with the Segment widget beside it, as a user does."""
    read_image(path)  # refuses what is no grey stack, before a window opens
    print(f"==> Opening {path} in napari with the Segment widget.")
    viewer = napari.Viewer()
    viewer.window.resize(*WINDOW)
    viewer.open(path, plugin="napari")
    _dock, widget = viewer.window.add_plugin_dock_widget("napari-mrcnn3d", "Segment")
    return viewer, widget


def segment(widget: SegmentWidget) -> None:
    """Press Run and wait for the result."""
    widget.form.model.choose(MODEL)
    print(f"==> Segmenting with the model {MODEL}.")
    start = time.monotonic()
    widget.start()
    wait(lambda: not widget.running)
    if widget.result is None:
        raise UserError(widget.form.status.text())
    print(f"==> Done after {time.monotonic() - start:.0f} s.")


def show_side_by_side(viewer: napari.Viewer, widget: SegmentWidget) -> None:
    """Turn to 3D: on the left the image in its boxes, on the right the objects."""
    image = widget.result.target.image
    dark, bright = np.percentile(image.data, (5, 99.9))
    image.contrast_limits = (dark, max(bright, dark + 1))
    image.rendering = "attenuated_mip"
    viewer.dims.ndisplay = 3
    newer = hasattr(viewer, "canvas")  # napari 0.9 moved these two
    grid, camera = (viewer.canvas.grid, viewer.scene.camera) if newer else (viewer.grid, viewer.camera)
    grid.shape, grid.stride, grid.enabled = (1, 2), 2, True
    viewer.reset_view()
    camera.angles = (10, 25, 60)
    camera.zoom *= 0.95


def picture(viewer: napari.Viewer, path: Path) -> None:
    """Save what the window shows."""
    wait(lambda: False, seconds=2)  # the canvas is drawn when Qt finds time
    shot = viewer.window.screenshot(str(path), canvas_only=False, flash=False)
    canvas = np.asarray(viewer.screenshot(flash=False))
    if canvas[..., :3].max() == canvas[..., :3].min():
        raise SystemExit("mrcnn3d: The picture shows nothing: OpenGL does not work on this display.")
    print(f"==> The picture is in {path} ({shot.shape[1]} x {shot.shape[0]}).")
    viewer.close()


def wait(ready: Callable[[], bool], seconds: float = 3600.0) -> None:
    """Let the window live until something is ready."""
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
