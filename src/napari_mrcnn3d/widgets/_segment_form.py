"""What the Segment widget looks like: its controls, in order, and the values they hold."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import cast

from magicgui.widgets import ComboBox, create_widget
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QFrame,
    QHBoxLayout,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_mrcnn3d.config import PredictConfig
from napari_mrcnn3d.structures import UserError, VoxelSize
from napari_mrcnn3d.widgets import _form
from napari_mrcnn3d.widgets._model_choice import ModelChoice
from napari_mrcnn3d.widgets._selection import SelectionPanel
from napari_mrcnn3d.widgets._voxel_size import VoxelSizeEdit

__all__ = ["SegmentForm"]

_DEVICES = {"Automatic": "auto", "Processor": "cpu"} | (
    {"Apple graphics": "mps"} if sys.platform == "darwin" else {"NVIDIA graphics card": "cuda"}
)
_FAR_OFF = 2.5
"""Voxel sizes that differ by more than this factor are worth a word."""


class SegmentForm(QScrollArea):
    """Image, model and voxel size; Run and Cancel; what is going on; the sliders over the result."""

    def __init__(self) -> None:
        super().__init__()
        self.image = cast(ComboBox, create_widget(annotation="napari.layers.Image", name="image"))
        self.image.native.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.image_note = _form.note()
        self.model = ModelChoice()
        self.voxel_size = VoxelSizeEdit()
        self.object_size = _form.open_number(what="Object diameter", decimals=1)
        self.object_size.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.fit = _form.note()
        self.device = QComboBox()
        for text, name in _DEVICES.items():
            self.device.addItem(text, name)
        self.tile = _form.Triple(unknown="auto", what="Tile", decimals=0)
        self.run = QPushButton("Run")
        self.run.setStyleSheet("QPushButton { font-weight: bold; padding: 8px; }")
        self.cancel = QPushButton("Cancel")
        self.progress = QProgressBar()
        self.status = _form.note("Press Run to find the objects of the image.")
        self.selection = SelectionPanel()
        self._memory = _form.Memory("segment")
        self._lay_out()
        self._recall()
        self.model.changed.connect(self._on_model)
        self.object_size.valueChanged.connect(self._explain_fit)
        self.voxel_size.changed.connect(self._explain_fit)
        self._on_model()
        self.show_running(False)

    def config(self) -> PredictConfig:
        """Return the settings of a run.

        Raises
        ------
        UserError
            If a voxel size or tile is given for some axes only.
        """
        tile = self.tile.value()
        return PredictConfig(
            voxel_size=self.voxel_size.value(),
            object_size=self.object_size.value() or None,
            device=self.device.currentData(),
            tile=None if tile is None else (int(tile[0]), int(tile[1]), int(tile[2])),
        )

    def show_running(self, running: bool) -> None:
        """Offer either Run or Cancel."""
        self.run.setEnabled(not running)
        self.cancel.setEnabled(running)
        self.progress.setVisible(running)
        self.progress.setRange(0, 0)

    def say(self, sentence: str) -> None:
        """Write into the status line."""
        self.status.setText(sentence)

    def keep(self) -> None:
        """Remember what is chosen, for the next start."""
        self._memory.keep(
            model=self.model.value(),
            device=self.device.currentData(),
            min_score=self.selection.min_score.value(),
            max_overlap=self.selection.max_overlap.value(),
        )

    def _recall(self) -> None:
        """Set what was chosen last time."""
        with suppress(UserError):  # the model file has gone meanwhile
            if model := self._memory.recall("model"):
                self.model.choose(model)
        self.device.setCurrentIndex(max(self.device.findData(self._memory.recall("device", "auto")), 0))
        for name in ("min_score", "max_overlap"):
            control = getattr(self.selection, name)
            control.setValue(self._memory.recall_number(name, control.value()))

    def _on_model(self) -> None:
        """Show the size of the objects that the chosen model knows; another one is not meant for it."""
        config = self.model.header.config if self.model.header is not None else None
        size = config.object_size if config is not None else None
        unit = "voxels" if config is not None and config.voxel_size is None else "µm"
        self.object_size.setSpecialValueText(f"as the model's, {size:g} {unit}" if size else "as the model's")
        self.object_size.setSuffix(f" {unit}")
        self.object_size.setValue(0)
        self.object_size.setEnabled(size is not None)
        self._explain_fit()

    def _explain_fit(self) -> None:
        """Warn where the model knows a very different voxel size, and nothing was said about the objects."""
        header, sentence = self.model.header, ""
        with suppress(UserError):  # told when Run is pressed
            size = None if self.object_size.value() else self.voxel_size.value()
            if header is not None and header.config.voxel_size is not None and size is not None:
                sentence = _misfit(VoxelSize(*header.config.voxel_size), size)
        self.fit.setText(sentence)
        self.fit.setVisible(bool(sentence))

    def _lay_out(self) -> None:
        body = QWidget()
        layout = QVBoxLayout(body)
        layout.addLayout(self._choices())
        layout.addWidget(self._advanced())
        buttons = QHBoxLayout()
        buttons.addWidget(self.run, 2)
        buttons.addWidget(self.cancel, 1)
        layout.addLayout(buttons)
        line = QFrame()
        line.setFrameShape(QFrame.Shape.HLine)
        for part in (self.progress, self.status, line, self.selection):
            layout.addWidget(part)
        layout.addStretch(1)
        self.setWidget(body)
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumWidth(340)

    def _choices(self) -> QFormLayout:
        form = _form.stacked()
        _form.add_row(form, "Image", self.image.native, "The stack to segment.")
        form.addRow(self.image_note)
        _form.add_row(form, "Model", self.model, "The network that looks for objects.")
        _form.add_row(form, "Voxel size (µm)", self.voxel_size, _form.tooltip(PredictConfig, "voxel_size"))
        _form.add_row(form, "Object diameter", self.object_size, _form.tooltip(PredictConfig, "object_size"))
        form.addRow(self.fit)
        return form

    def _advanced(self) -> QCollapsible:
        inner = QWidget()
        form = _form.stacked()
        inner.setLayout(form)
        _form.add_row(form, "Computed on", self.device, _form.tooltip(PredictConfig, "device"))
        _form.add_row(form, "Tile (voxels)", self.tile, _form.tooltip(PredictConfig, "tile"))
        advanced = QCollapsible("Advanced")
        advanced.addWidget(inner)
        return advanced


def _misfit(model: VoxelSize, image: VoxelSize) -> str:
    """Say what happens to an image whose voxels are much finer or coarser than the model's; empty if they are not."""
    ratio = (image.volume / model.volume) ** (1 / 3)
    if max(ratio, 1 / ratio) <= _FAR_OFF:
        return ""
    kind, change = ("finer", "shrunk") if ratio < 1 else ("coarser", "enlarged")
    return (
        f"These voxels are {max(ratio, 1 / ratio):.1f} times {kind} than the model's, so the image is {change} for it. "
        "If your objects are smaller or larger than the model's, too, give their diameter."
    )
