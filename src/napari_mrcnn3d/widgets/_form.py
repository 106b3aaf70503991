"""Form parts shared by the widgets: what a config field says becomes label, tooltip, range and default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel
from qtpy.QtCore import QSettings, Qt, QTimer, Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QAbstractSpinBox, QDoubleSpinBox, QFormLayout, QHBoxLayout, QLabel, QSizePolicy, QWidget
from superqt import QLabeledDoubleSlider

from napari_mrcnn3d.structures import UserError

__all__ = [
    "Memory",
    "Triple",
    "add_row",
    "bounds",
    "coalesced",
    "default_of",
    "note",
    "open_number",
    "slider",
    "stacked",
    "tooltip",
]


def tooltip(config: type[BaseModel], name: str) -> str:
    """Give the sentence that explains a config field."""
    return config.model_fields[name].description or ""


def default_of(config: type[BaseModel], name: str) -> Any:
    """Default of a config field."""
    return config.model_fields[name].get_default(call_default_factory=True)


def bounds(config: type[BaseModel], name: str, *, maximum: float = 1.0) -> tuple[float, float]:
    """Smallest and largest value a config field allows; ``maximum`` where it sets no upper bound."""
    limits = {"ge": 0.0, "le": maximum}
    for constraint in config.model_fields[name].metadata:
        limits |= {key: float(value) for key in limits if (value := getattr(constraint, key, None)) is not None}
    return limits["ge"], limits["le"]


def stacked() -> QFormLayout:
    """Make a form with its labels above the fields, which leaves these the whole width."""
    form = QFormLayout()
    form.setContentsMargins(0, 0, 0, 0)
    form.setRowWrapPolicy(QFormLayout.RowWrapPolicy.WrapAllRows)
    form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
    return form


def add_row(form: QFormLayout, text: str, widget: QWidget, explanation: str) -> QLabel:
    """Add a labelled row whose label and widget both explain themselves."""
    label = QLabel(text)
    label.setBuddy(widget)
    for part in (label, widget, *widget.findChildren(QWidget)):
        if not part.toolTip():  # a button of its own in the row keeps its own
            part.setToolTip(explanation)
    form.addRow(label, widget)
    return label


def note(text: str = "") -> QLabel:
    """Make a line of explanation that breaks where the widget is narrow."""
    label = QLabel(text)
    label.setWordWrap(True)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    label.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
    label.setVisible(bool(text))
    return label


def slider(config: type[BaseModel], name: str, *, maximum: float = 1.0, decimals: int = 2) -> QLabeledDoubleSlider:
    """Make a slider over the values a config field allows, at its default; its number can be typed, too."""
    control = QLabeledDoubleSlider(Qt.Orientation.Horizontal)
    control.setRange(*bounds(config, name, maximum=maximum))
    control.setDecimals(decimals)
    control.setValue(default_of(config, name))
    return control


def open_number(*, what: str, decimals: int) -> QDoubleSpinBox:
    """Make a field for a number that may be left open, which is 0; typed, not stepped."""
    spin = QDoubleSpinBox()
    spin.setDecimals(decimals)
    spin.setRange(0, 1e6)
    spin.setButtonSymbols(QAbstractSpinBox.ButtonSymbols.NoButtons)
    spin.setStyleSheet("QDoubleSpinBox { min-width: 44px; padding: 1px 4px; }")  # napari's is for buttons
    spin.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
    spin.setAccessibleName(what)
    spin.setKeyboardTracking(False)
    return spin


class Triple(QWidget):
    """Three numbers along z, y, x that are either all known or all left open.

    Parameters
    ----------
    unknown : str
        Shown while a number is 0, that is, left open.
    what : str
        What the numbers are, for the message when only some are given.
    decimals : int
        0 for whole numbers.

    Signals
    -------
    changed
        The user has changed a number.
    """

    changed = Signal()

    def __init__(self, *, unknown: str, what: str, decimals: int) -> None:
        super().__init__()
        self._what = what
        self._given = (0.0, 0.0, 0.0)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        self.spins: list[QDoubleSpinBox] = []
        for axis in "zyx":
            spin = open_number(what=f"{what} {axis}", decimals=decimals)
            spin.setSpecialValueText(unknown)
            spin.valueChanged.connect(self.changed)
            row.addWidget(QLabel(axis))
            row.addWidget(spin, 1)
            self.spins.append(spin)

    def value(self) -> tuple[float, float, float] | None:
        """Return the three numbers, None if all are left open.

        Raises
        ------
        UserError
            If only some are given.
        """
        z, y, x = (
            given if spin.value() == round(given, spin.decimals()) else spin.value()  # not rounded unless changed
            for spin, given in zip(self.spins, self._given, strict=True)
        )
        if z and y and x:
            return z, y, x
        if z or y or x:
            raise UserError(f"{self._what}: give all three numbers (z, y, x) or set all of them to 0.")
        return None

    def set_value(self, values: Iterable[float] | None) -> None:
        """Show three numbers, or that they are open; nobody is told."""
        z, y, x = values or (0.0, 0.0, 0.0)
        self._given = (z, y, x)
        for spin, number in zip(self.spins, self._given, strict=True):
            spin.blockSignals(True)
            spin.setValue(number)
            spin.blockSignals(False)


def coalesced(owner: QWidget, call: Callable[[], None]) -> QTimer:
    """Make a timer whose ``start`` asks for a call; asks within one turn of the event loop are one call."""
    timer = QTimer(owner)
    timer.setSingleShot(True)
    timer.timeout.connect(call)
    return timer


class Memory:
    """What was last chosen in a widget, kept over restarts.

    Parameters
    ----------
    widget : str
        Name of the widget.
    """

    def __init__(self, widget: str) -> None:
        self._settings = QSettings(QSettings.Format.IniFormat, QSettings.Scope.UserScope, "napari-mrcnn3d", widget)

    def recall(self, name: str, default: str = "") -> str:
        """Return the kept text, or the default."""
        return str(self._settings.value(name, default))

    def recall_number(self, name: str, default: float) -> float:
        """Return the kept number, or the default where there is none."""
        try:
            return float(self._settings.value(name, default))
        except (TypeError, ValueError):
            return default

    def keep(self, **values: str | float) -> None:
        """Keep these for the next start."""
        for name, value in values.items():
            self._settings.setValue(name, value)
