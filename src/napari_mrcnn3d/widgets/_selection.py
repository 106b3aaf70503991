"""The three sliders that decide, after the run and without the network, which candidates are shown."""

from __future__ import annotations

import numpy as np
from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QFormLayout, QPushButton, QVBoxLayout, QWidget

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints
from napari_mrcnn3d.widgets import _form

__all__ = ["SelectionPanel"]


class SelectionPanel(QWidget):
    """Score, overlap and size sliders with the count of what they keep.

    Signals
    -------
    changed
        A slider was moved; :meth:`config` says where to.
    renewal_asked
        The user wants new layers in place of those that were edited.
    """

    changed = Signal()
    renewal_asked = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.min_score = _form.slider(SelectConfig, "min_score")
        self.max_overlap = _form.slider(SelectConfig, "max_overlap")
        self.min_size = _form.slider(SelectConfig, "min_size", decimals=0)
        self.count = _form.note(" ")
        self.lock = _form.note()
        self.renew = QPushButton("Go on with a new layer")
        self.renew.setToolTip("Adds a new label layer that the sliders change; the edited one stays as it is.")
        form = QFormLayout()
        form.setContentsMargins(0, 0, 0, 0)
        self.captions = {}
        for name, text in (("min_score", "Score from"), ("max_overlap", "Overlap up to"), ("min_size", "Size from")):
            control = getattr(self, name)
            self.captions[name] = _form.add_row(form, text, control, _form.tooltip(SelectConfig, name))
            control.valueChanged.connect(self.changed)
        self.renew.clicked.connect(self.renewal_asked)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.count)
        layout.addLayout(form)
        layout.addWidget(self.lock)
        layout.addWidget(self.renew)
        self.show_nothing()

    def config(self) -> SelectConfig:
        """Return the selection that the sliders describe."""
        return SelectConfig(
            min_score=self.min_score.value(), max_overlap=self.max_overlap.value(), min_size=self.min_size.value()
        )

    def show_result(self, footprints: Footprints, config: SelectConfig) -> None:
        """Set the sliders to a selection; sizes reach twice the typical candidate, in µm³ or else in voxels."""
        voxel_size = footprints.candidates.voxel_size
        typical = float(np.median(footprints.voxels)) if len(footprints) else 0.0
        largest = max(2 * typical * (voxel_size.volume if voxel_size else 1.0), 1.0)
        self.blockSignals(True)
        self.min_size.setRange(0, max(float(f"{largest:.2g}"), config.min_size))
        self.min_size.setDecimals(0 if largest >= 50 else 1)
        for name in ("min_score", "max_overlap", "min_size"):
            getattr(self, name).setValue(getattr(config, name))
        self.blockSignals(False)
        self.captions["min_size"].setText(f"Size from ({'µm³' if voxel_size else 'voxels'})")

    def show_counts(self, shown: int, hidden: int) -> None:
        """Say how many candidates are kept and how many the sliders hide."""
        self.count.setText(f"<b>{shown}</b> {'object' if shown == 1 else 'objects'} shown, {hidden} hidden")
        self._unlock(True)
        self.lock.hide()
        self.renew.hide()

    def show_locked(self, layer: str) -> None:
        """Stop the sliders because the user has painted on the layer."""
        self.lock.setText(f"You have edited “{layer}”, so the sliders leave it alone.")
        self._unlock(False)
        self.lock.show()
        self.renew.show()

    def show_nothing(self) -> None:
        """Wait for a result."""
        self.count.setText("After a run, choose here which objects are shown.")
        self._unlock(False)
        self.lock.hide()
        self.renew.hide()

    def _unlock(self, usable: bool) -> None:
        for control in (self.min_score, self.max_overlap, self.min_size):
            control.setEnabled(usable)
