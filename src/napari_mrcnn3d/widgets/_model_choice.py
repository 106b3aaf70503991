"""Choosing a model: those that come with the package, and files."""

from __future__ import annotations

from pathlib import Path

from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QComboBox, QFileDialog, QHBoxLayout, QPushButton, QSizePolicy, QVBoxLayout, QWidget

from napari_mrcnn3d.model.weights import ModelHeader, available_models, read_header
from napari_mrcnn3d.structures import UserError
from napari_mrcnn3d.widgets import _form

__all__ = ["ModelChoice"]


class ModelChoice(QWidget):
    """A list of models, a button for model files, and a line about the chosen one.

    Attributes
    ----------
    header : ModelHeader or None
        Of the chosen model; None if there is none or it cannot be read.

    Signals
    -------
    changed
        Another model was chosen.
    """

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.header: ModelHeader | None = None
        self.combo = QComboBox()
        self.combo.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.browse = QPushButton("Browse…")
        self.browse.setToolTip("Choose a model file (.safetensors) that you trained or were given.")
        self.about = _form.note()
        for name in available_models():
            self.combo.addItem(name, name)
        self.combo.currentIndexChanged.connect(self._describe)
        self.browse.clicked.connect(self._ask)
        row = QHBoxLayout()
        row.addWidget(self.combo, 1)
        row.addWidget(self.browse)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.about)
        self._describe()

    def value(self) -> str:
        """Return the name of a bundled model or the path of a model file.

        Raises
        ------
        UserError
            If none is chosen.
        """
        if self.combo.currentIndex() < 0:
            raise UserError("No model is here yet: press Browse and choose a model file.")
        return str(self.combo.currentData())

    def choose(self, model: str) -> None:
        """Select a bundled model or a file, which is added to the list.

        Raises
        ------
        UserError
            If it is no model file of this program.
        """
        read_header(model)
        index = self.combo.findData(model)
        if index < 0:
            self.combo.addItem(Path(model).stem, model)
            index = self.combo.count() - 1
        self.combo.setCurrentIndex(index)

    def _ask(self) -> None:
        path, _filter = QFileDialog.getOpenFileName(self, "Choose a model file", "", "Models (*.safetensors)")
        if path:
            try:
                self.choose(path)
            except UserError as exc:
                self._tell(str(exc))

    def _describe(self) -> None:
        try:
            self.header = read_header(self.value())
            self._tell(_sentence(self.header))
        except UserError as exc:
            self.header = None
            self._tell(str(exc))
        self.changed.emit()

    def _tell(self, sentence: str) -> None:
        self.about.setText(sentence)
        self.about.setVisible(bool(sentence))


def _sentence(header: ModelHeader) -> str:
    """Say in a line what a model was made for."""
    parts = [str(header.provenance.get("description", "")).rstrip(".")]
    if header.config.voxel_size is not None:
        z, y, x = header.config.voxel_size
        parts.append(f"Trained on voxels of {z:g} x {y:g} x {x:g} µm (z, y, x)")
    return " ".join(f"{part}." for part in parts if part)
