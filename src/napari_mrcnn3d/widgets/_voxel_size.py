"""The voxel size of an image: shown with where it comes from, corrected by the user, handed to the viewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QPushButton, QVBoxLayout, QWidget

from napari_mrcnn3d.structures import VoxelSize
from napari_mrcnn3d.widgets import _form, _layers

if TYPE_CHECKING:
    from napari.layers import Image

__all__ = ["VoxelSizeEdit"]


class VoxelSizeEdit(QWidget):
    """Three lengths in µm, a line that says where they come from, and a button to use them in the viewer.

    Signals
    -------
    apply_asked
        The image shall be shown with this voxel size.
    changed
        Other lengths are shown.
    """

    apply_asked = Signal()
    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self._layer_size: VoxelSize | None = None
        self.triple = _form.Triple(unknown="?", what="Voxel size", decimals=3)
        self.triple.changed.connect(self._on_typed)
        self.origin = _form.note()
        self.apply = QPushButton("Show the image in these proportions")
        self.apply.setToolTip(
            "Gives the image this scale in napari, and with it every layer without a scale that lies over it."
        )
        self.apply.clicked.connect(self.apply_asked)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for part in (self.triple, self.origin, self.apply):
            layout.addWidget(part)
        self.show_layer(None)

    def value(self) -> VoxelSize | None:
        """Return the voxel size, None if it is not known.

        Raises
        ------
        UserError
            If only some of the lengths are given.
        """
        lengths = self.triple.value()
        return None if lengths is None else VoxelSize.of(lengths)

    def show_layer(self, layer: Image | None) -> _layers.Calibration:
        """Fill in what is known of a layer."""
        known = _layers.Calibration(None, "unknown") if layer is None else _layers.calibration_of(layer)
        shown = _layers.Calibration(None, "unknown") if layer is None else _layers.calibration(layer.scale, layer.units)
        self._layer_size = shown.voxel_size if shown.origin == "layer" else None
        self.triple.set_value(known.voxel_size)
        self._explain(_origin_sentence(known, layer))
        self.apply.setVisible(known.voxel_size is not None and self._layer_size is None)
        self.changed.emit()
        return known

    def _on_typed(self) -> None:
        """Explain numbers that the user has changed."""
        complete = all(spin.value() for spin in self.triple.spins)
        nothing = not any(spin.value() for spin in self.triple.spins)
        differs = self._layer_size is None or not np.allclose(
            [spin.value() for spin in self.triple.spins], self._layer_size, atol=5e-4, rtol=0
        )
        self.apply.setVisible(complete and differs)
        self._explain("Typed in." if complete and differs else _UNKNOWN if nothing else "")
        self.changed.emit()

    def _explain(self, sentence: str) -> None:
        self.origin.setText(sentence)
        self.origin.setVisible(bool(sentence))


_UNKNOWN = "Not known: type it in. Without it sizes are counted in voxels, and the model may fit badly."


def _origin_sentence(known: _layers.Calibration, layer: Image | None) -> str:
    """Say where a voxel size comes from."""
    if layer is None:
        return ""
    return {
        "layer": "As the image layer says.",
        "file": f"Read from the file {Path(layer.source.path or '').name}.",
        "guessed": "Guessed: the image layer has a scale but no unit, so µm are assumed. Please check.",
        "unknown": _UNKNOWN,
    }[known.origin]
