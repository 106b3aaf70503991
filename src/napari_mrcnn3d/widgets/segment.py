"""The Segment widget: image, model, one button, and sliders over what the network found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from napari.layers import Image
from napari.utils.notifications import show_error
from qtpy.QtCore import QEvent
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_mrcnn3d.config import PredictConfig
from napari_mrcnn3d.inference.paint import Footprints
from napari_mrcnn3d.model.weights import find_model
from napari_mrcnn3d.structures import Candidates, Progress, Steps, UserError, Volume
from napari_mrcnn3d.widgets import _form, _layers
from napari_mrcnn3d.widgets._jobs import Job, TimeLeft
from napari_mrcnn3d.widgets._segment_form import SegmentForm
from napari_mrcnn3d.widgets._session import Result, Session, Target

if TYPE_CHECKING:
    import napari.viewer

__all__ = ["SegmentWidget", "segment_steps"]

SegmentSteps = Callable[[Volume, str, PredictConfig], Steps[Candidates]]


def segment_steps(volume: Volume, model: str, config: PredictConfig) -> Steps[Candidates]:
    """Load a model and segment a volume with it; only here torch is imported.

    Parameters
    ----------
    volume : Volume
    model : str
        Name of a bundled model, or a model file.
    config : PredictConfig
    """
    yield Progress(0, 0, "Loading the model")
    import torch

    from napari_mrcnn3d.inference.predictor import Predictor
    from napari_mrcnn3d.model.weights import load_model

    yield Progress(0, 0, "Loading the model")
    predictor = Predictor(load_model(model), device=config.device)
    try:
        return (yield from predictor.predict_steps(volume, config))
    finally:
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()  # other programs, and a training, need what torch would keep in reserve


def _run_steps(steps: Steps[Candidates], model: str) -> Steps[tuple[Footprints, str]]:
    """Segment, and do what else takes time: candidates as voxels, and the hash of the model file."""
    candidates = yield from steps
    yield Progress(0, 0, "Drawing the objects")
    with find_model(model).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Footprints.of(candidates), digest


class SegmentWidget(QWidget):
    """Finds the objects of an image and lets sliders decide which of them are shown.

    Parameters
    ----------
    napari_viewer : napari.viewer.Viewer
    steps : callable
        What a run does, from (volume, model, config) to candidates; tests give their own.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer, steps: SegmentSteps = segment_steps) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._steps = steps
        self._session = Session(napari_viewer)
        self._job: Job[tuple[Footprints, str]] | None = None
        self._time_left = TimeLeft()
        self._shown: Result | None = None
        self._watched: Image | None = None
        self.form = SegmentForm()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.form)
        self._connect()
        self._on_image()

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._job is not None

    @property
    def result(self) -> Result | None:
        """What the sliders work on."""
        return self._shown

    def start(self) -> None:
        """Segment the chosen image, or say why it cannot be."""
        try:
            target, volume, config = self._ordered()
        except UserError as exc:
            self.form.say(str(exc))
            return
        model = str(target.provenance["model"])
        self.form.keep()
        self.form.show_running(True)
        self._time_left = TimeLeft()
        self._job = Job(
            _run_steps(self._steps(volume, model, config), model),
            progressed=self._on_progress,
            succeeded=partial(self._on_result, target),
            failed=self._on_failure,
            ended=self._on_end,
            owner=self,
        )

    def stop(self) -> None:
        """Cancel the run; the widget is usable again at once."""
        if self._job is not None:
            self.form.say("Cancelled.")
            self._job.cancel()

    def event(self, a0: QEvent | None) -> bool:
        """Stop everything when napari takes the widget out of its dock, which is how it closes one."""
        if a0 is not None and a0.type() == QEvent.Type.ParentChange and self.parent() is None:
            self._release()
        return bool(super().event(a0))

    def _connect(self) -> None:
        layers = self._viewer.layers
        for event in (layers.events.inserted, layers.events.removed, layers.events.reordered):
            event.connect(self._on_layers)
        layers.selection.events.active.connect(self._on_active)
        form = self.form
        self._selected = _form.coalesced(self, self._on_selection)
        form.image.changed.connect(self._on_image)
        form.voxel_size.apply_asked.connect(self._on_apply)
        form.run.clicked.connect(self.start)
        form.cancel.clicked.connect(self.stop)
        form.selection.changed.connect(self._selected.start)
        form.selection.renewal_asked.connect(self._on_renewal)

    def _release(self) -> None:
        if self._job is not None:
            self._job.cancel()
        self._watch(None)
        self._session.close()
        layers = self._viewer.layers
        for event in (layers.events.inserted, layers.events.removed, layers.events.reordered):
            event.disconnect(self._on_layers)
        layers.selection.events.active.disconnect(self._on_active)

    # ------------------------------------------------------------------------------------------ a run

    def _ordered(self) -> tuple[Target, Volume, PredictConfig]:
        """Collect what a run needs from layers and form.

        Raises
        ------
        UserError
            If something is missing or unsuitable.
        """
        layer = self.form.image.value
        if layer is None:
            raise UserError("No image is open: drop a TIFF stack on the viewer, or choose File > Open Sample.")
        model, config = self.form.model.value(), self.form.config()
        frame = self._frame(layer)
        voxel_size = self.form.voxel_size.value()
        volume = _layers.volume_of(layer, voxel_size, frame=frame)
        settings = config.model_dump(mode="json", exclude={"select"})
        return Target(layer, frame, voxel_size, {"model": model, "config": settings}), volume, config

    def _frame(self, layer: Image) -> int:
        """Tell which frame of a series the viewer shows; 0 for a single stack."""
        count = _layers.frame_count(layer)
        if count is None:
            return 0
        point = self._viewer.dims.point[-layer.ndim :]
        return int(min(max(round(layer.world_to_data(point)[0]), 0), count - 1))

    def _on_progress(self, progress: Progress) -> None:
        self.form.progress.setRange(0, progress.total)
        self.form.progress.setValue(progress.done)
        left = self._time_left.sentence(progress)
        self.form.say(f"{progress.stage}, {left}." if left else f"{progress.stage}…")

    def _on_result(self, target: Target, found: tuple[Footprints, str]) -> None:
        footprints, digest = found
        target = replace(target, provenance={**target.provenance, "model_hash": digest})
        result = self._add(Result(footprints, target, self.form.selection.config()))
        self.form.say(_outcome(result))

    def _on_failure(self, sentence: str) -> None:
        self.form.say(sentence)
        show_error(sentence)

    def _on_end(self) -> None:
        self._job = None
        self.form.show_running(False)

    # ------------------------------------------------------------------------------------------ after a run

    def _add(self, result: Result) -> Result:
        result.was_edited.connect(self._report)
        self._session.add(result)
        self._show(result)
        return result

    def _show(self, result: Result | None) -> None:
        """Let the sliders work on this result."""
        self._shown = result
        if result is None:
            self.form.selection.show_nothing()
        else:
            self.form.selection.show_result(result.footprints, result.config)
            self._report()

    def _on_selection(self) -> None:
        if self._shown is not None:
            self._shown.select(self.form.selection.config())
            self._report()

    def _report(self) -> None:
        """Say how many objects are shown, or why the sliders do nothing."""
        result = self._shown
        if result is None:
            return
        if result.edited:
            self.form.selection.show_locked(result.labels.name)
        else:
            shown = len(result.instances)
            self.form.selection.show_counts(shown, len(result.footprints) - shown)

    def _on_renewal(self) -> None:
        if self._shown is not None:
            self._add(self._shown.renewed())

    # ------------------------------------------------------------------------------------------ the viewer

    def _on_layers(self) -> None:
        self.form.image.reset_choices()
        if self._shown is not None and self._shown not in self._session.results:
            self._show(self._session.of(self.form.image.value))

    def _on_active(self) -> None:
        """Follow the layer list: the sliders belong to the result whose layer is selected."""
        result = self._session.of(self._viewer.layers.selection.active)
        if result is not None and result is not self._shown:
            self._show(result)

    def _on_image(self) -> None:
        """Show what is known of the chosen image, and its result."""
        layer = self.form.image.value
        if layer is not None and layer == self._watched:
            return
        self._watch(layer)
        known = self.form.voxel_size.show_layer(layer)
        if known.origin == "file" and len(self._viewer.layers) == 1 and _layers.is_uncalibrated(layer):
            self._on_apply()  # nothing else can get out of place
        self._explain_image()
        self._show(self._session.of(layer))

    def _watch(self, layer: Image | None) -> None:
        """Listen to the scale of the chosen image only."""
        for watched, action in ((self._watched, "disconnect"), (layer, "connect")):
            if watched is not None:
                getattr(watched.events.scale, action)(self._on_scale)
                getattr(watched.events.units, action)(self._on_scale)
        self._watched = layer

    def _on_scale(self) -> None:
        self.form.voxel_size.show_layer(self._watched)

    def _on_apply(self) -> None:
        """Show the image with the voxel size of the form."""
        try:
            size = self.form.voxel_size.value()
        except UserError as exc:
            self.form.say(str(exc))
            return
        if size is not None and self._watched is not None:
            shown = self._viewer.dims.current_step
            _layers.calibrate(self._viewer.layers, self._watched, size)
            self._viewer.dims.current_step = shown
            self._viewer.reset_view()

    def _explain_image(self) -> None:
        """Say beforehand what a run would say: that a series has a frame chosen, or why the image cannot be used."""
        layer, sentence = self._watched, ""
        if layer is not None:
            try:
                _layers.volume_of(layer, None)
            except UserError as exc:
                sentence = str(exc)
            else:
                count = _layers.frame_count(layer)
                sentence = "" if count is None else f"A series of {count} frames: the one shown is segmented."
        self.form.image_note.setText(sentence)
        self.form.image_note.setVisible(bool(sentence))


def _outcome(result: Result) -> str:
    """Say in a sentence what a run has found."""
    if len(result.instances):
        return f"Done: the objects are in “{result.labels.name}”. Save them with File > Save Selected Layers."
    if len(result.footprints):
        return "Done: no object is sure enough. Move the score slider to the left to see the less certain ones."
    return "Done: the model found no object. Check the voxel size, or choose another model."
