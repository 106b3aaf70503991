"""Interactive 3D instance segmentation: a 3D Mask R-CNN for napari and the command line."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("napari-mrcnn3d")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_PUBLIC = {
    "Candidates": "structures",
    "Instances": "structures",
    "Progress": "structures",
    "UserError": "structures",
    "Volume": "structures",
    "VoxelSize": "structures",
    "Predictor": "inference.predictor",
    "load_model": "model.weights",
    "paint": "inference.paint",
    "select": "inference.select",
    "read_image": "io.tiff",
    "read_labels": "io.tiff",
    "write_labels": "io.tiff",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import public names when first asked for: the package itself must cost nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
