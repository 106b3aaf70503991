"""The Segment widget in a real viewer, with a stand-in for the network."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.qt.threading import WorkerBase
from qtpy.QtWidgets import QFileDialog

from napari_mrcnn3d.config import PredictConfig, SelectConfig
from napari_mrcnn3d.structures import Candidates, Progress, VoxelSize
from napari_mrcnn3d.widgets import _form
from napari_mrcnn3d.widgets.segment import SegmentWidget
from tests.gui.helpers import SHAPE, Bench, Network, cubes

pytestmark = pytest.mark.gui


class TestRun:
    def test_from_image_to_labels_and_boxes(self, bench: Bench) -> None:
        image = bench.add_image(translate=(10, 20, 30))
        bench.run()
        boxes, labels = bench.viewer.layers[-2:]
        assert (labels.name, boxes.name) == ("cells labels", "cells boxes")
        for layer in (labels, boxes):
            assert tuple(layer.scale) == tuple(image.scale)
            assert tuple(layer.translate) == tuple(image.translate)
            assert layer.units == image.units
        assert np.unique(labels.data).tolist() == [0, 1, 2, 3]
        assert labels.data[2:6, 2:8, 4:10].min() == labels.data[2:6, 2:8, 4:10].max() == 1
        features = labels.features
        assert list(features.columns) == ["index", "score", "class", "volume_um3", "z", "y", "x"]
        assert features["index"].tolist() == [1, 2, 3]
        assert features["score"].tolist() == pytest.approx([0.9, 0.8, 0.75])
        assert features["class"].tolist() == ["nucleus"] * 3
        assert features["volume_um3"].tolist() == pytest.approx([4 * 6 * 6 * 2 * 0.5 * 0.5] * 3)
        assert features.loc[0, ["z", "y", "x"]].tolist() == [3.5, 4.5, 6.5]

    def test_where_the_result_comes_from_is_kept_with_it(self, bench: Bench, model_file: str) -> None:
        bench.add_image()
        bench.run()
        facts = bench.widget.result.labels.metadata["napari-mrcnn3d"]
        assert json.loads(json.dumps(facts)) == facts
        assert facts["model"] == model_file
        assert len(facts["model_hash"]) == 64
        assert facts["source_layer"] == "cells"
        assert facts["config"]["voxel_size"] == [2, 0.5, 0.5]
        assert facts["config"]["select"]["min_score"] == SelectConfig().min_score
        assert {"version", "date"} <= set(facts)

    def test_settings_reach_the_network(self, bench: Bench, model_file: str) -> None:
        bench.add_image()
        form = bench.widget.form
        form.device.setCurrentIndex(form.device.findData("cpu"))
        form.tile.set_value((8, 16, 16))
        form.voxel_size.triple.spins[0].setValue(3)
        bench.run()
        volume, model, config = bench.network.seen[0]
        assert volume.voxel_size == config.voxel_size == VoxelSize(3, 0.5, 0.5)
        assert (model, config.device, config.tile) == (model_file, "cpu", (8, 16, 16))

    def test_progress_and_stage_are_shown(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.go.clear()
        bench.widget.form.run.click()
        form = bench.widget.form
        bench.qtbot.waitUntil(lambda: form.progress.value() == 500, timeout=5000)
        assert form.status.text().startswith("Segmenting")
        assert not form.progress.isHidden()
        assert not form.run.isEnabled()
        bench.finish()
        assert form.run.isEnabled()
        assert form.progress.isHidden()
        assert "cells labels" in form.status.text()

    def test_no_object_is_an_empty_result_and_no_error(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.found = lambda volume: Candidates.empty(volume.shape)
        bench.run()
        assert not bench.widget.result.labels.data.any()
        assert "found no object" in bench.widget.form.status.text()

    def test_nothing_sure_enough_points_to_the_slider(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.found = lambda volume: cubes(volume.voxel_size, scores=(0.2, 0.1))
        bench.run()
        assert "score slider" in bench.widget.form.status.text()
        bench.slide(min_score=0.05)
        assert bench.widget.result.labels.data.max() == 2

    def test_a_second_run_hides_the_first_result(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        first = bench.widget.result
        bench.run()
        assert bench.widget.result is not first
        assert not first.labels.visible
        assert bench.widget.result.labels.visible


class TestTrouble:
    def test_nothing_open(self, bench: Bench) -> None:
        bench.widget.start()
        assert "No image is open" in bench.widget.form.status.text()
        assert not bench.widget.running

    def test_half_a_voxel_size(self, bench: Bench) -> None:
        bench.add_image(scale=(1, 1, 1), units=("pixel",) * 3)
        bench.widget.form.voxel_size.triple.spins[0].setValue(2)
        bench.widget.start()
        assert "all three" in bench.widget.form.status.text()
        assert not bench.network.seen
        bench.widget.form.voxel_size.apply_asked.emit()
        assert tuple(bench.viewer.layers["cells"].scale) == (1, 1, 1)

    def test_out_of_memory_is_told_and_run_is_usable_again(self, bench: Bench) -> None:
        import torch

        bench.add_image()
        bench.network.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        bench.run()
        assert "smaller tile" in bench.widget.form.status.text()
        assert bench.widget.form.run.isEnabled()
        bench.network.error = None
        bench.run()
        assert bench.widget.result is not None

    def test_cancel_within_a_second_then_run_again(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.go.clear()
        bench.widget.form.run.click()
        bench.qtbot.waitUntil(lambda: bench.widget.form.progress.value() == 500, timeout=5000)
        start = time.monotonic()
        bench.widget.form.cancel.click()
        assert bench.widget.form.run.isEnabled()
        bench.qtbot.waitUntil(lambda: bench.network.closed == 1, timeout=5000)
        assert time.monotonic() - start < 1
        assert len(bench.viewer.layers) == 1
        bench.run()
        assert len(bench.viewer.layers) == 3

    def test_twenty_starts_and_cancels(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.go.clear()
        for _ in range(20):
            bench.widget.form.run.click()
            bench.widget.form.cancel.click()
        WorkerBase.await_workers(5000)
        bench.run()
        assert [layer.name for layer in bench.viewer.layers] == ["cells", "cells boxes", "cells labels"]

    def test_closing_the_widget_stops_its_run(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.go.clear()
        bench.widget.form.run.click()
        bench.qtbot.waitUntil(lambda: bench.widget.form.progress.value() == 500, timeout=5000)
        bench.viewer.window.remove_dock_widget(bench.widget)
        assert not bench.widget.running
        bench.qtbot.waitUntil(lambda: bench.network.closed == 1, timeout=5000)
        bench.add_image(name="another")  # nobody listens any more
        assert bench.widget.form.image.value.name == "cells"

    def test_closing_napari_stops_its_run(self, bench: Bench) -> None:
        bench.add_image()
        bench.network.go.clear()
        bench.widget.form.run.click()
        bench.qtbot.waitUntil(lambda: bench.widget.form.progress.value() == 500, timeout=5000)
        with bench.qtbot.waitSignal(bench.widget.destroyed, timeout=5000):
            bench.widget.deleteLater()
        bench.qtbot.waitUntil(lambda: bench.network.closed == 1, timeout=5000)


class TestMeanwhile:
    """The result belongs to the layer it came from, whatever happens during the run."""

    def started(self, bench: Bench) -> Any:
        image = bench.add_image()
        bench.network.go.clear()
        bench.widget.form.run.click()
        return image

    def test_another_image_is_chosen(self, bench: Bench) -> None:
        first = self.started(bench)
        second = bench.add_image(name="other", scale=(1, 1, 1))
        bench.widget.form.image.value = second
        bench.finish()
        labels = bench.viewer.layers["cells labels"]
        assert tuple(labels.scale) == tuple(first.scale)
        assert bench.network.seen[0][0].name == "cells"

    def test_the_image_is_removed(self, bench: Bench) -> None:
        image = self.started(bench)
        bench.viewer.layers.remove(image)
        bench.finish()
        assert tuple(bench.viewer.layers["cells labels"].scale) == (2, 0.5, 0.5)
        bench.slide(min_score=0.78)
        assert bench.viewer.layers["cells labels"].data.max() == 2

    def test_the_image_is_renamed_and_rescaled(self, bench: Bench) -> None:
        image = self.started(bench)
        image.name, image.scale = "embryo", (4, 1, 1)
        bench.finish()
        labels = bench.viewer.layers["embryo labels"]
        assert tuple(labels.scale) == (4, 1, 1)
        assert labels.features["volume_um3"][0] == pytest.approx(4 * 6 * 6 * 0.5)  # with the voxel size of the run


class TestSliders:
    def test_they_repaint_without_the_network(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        result, data = bench.widget.result, bench.widget.result.labels.data
        bench.slide(min_score=0.25)
        assert np.unique(result.labels.data).tolist() == [0, 1, 2, 3, 4]
        assert result.labels.data is data
        assert len(result.labels.features) == 4
        assert "<b>4</b> objects shown, 0 hidden" in bench.widget.form.selection.count.text()
        bench.slide(min_score=0.85)
        assert np.unique(data).tolist() == [0, 1]
        assert len(result.boxes.data) % 4 == 0
        assert set(result.boxes.features["index"]) == {1}
        assert len(bench.network.seen) == 1

    def test_size_is_in_cubic_micrometres_or_in_voxels(self, bench: Bench) -> None:
        image = bench.add_image()
        bench.run()
        captions = bench.widget.form.selection.captions
        assert "µm³" in captions["min_size"].text()
        bench.slide(min_size=4 * 6 * 6 * 0.5 + 1)
        assert not bench.widget.result.labels.data.any()
        image.scale, image.units = (1, 1, 1), ("pixel",) * 3
        bench.run()
        assert "voxels" in captions["min_size"].text()

    def test_five_hundred_candidates_are_repainted_in_a_tenth_of_a_second(self, bench: Bench) -> None:
        shape = (128, 256, 256)
        rng = np.random.default_rng(0)
        centre = rng.uniform(0.1, 0.9, (500, 3)) * shape
        half = (8, 16, 16)
        ball = 1.3 - sum(np.ix_(*(np.linspace(-1, 1, n) ** 2 for n in (20, 28, 28))))
        found = Candidates(
            np.concatenate([centre - half, centre + half], axis=1).astype(np.float32),
            np.sort(rng.uniform(0.05, 1, 500))[::-1].astype(np.float32),
            np.ones(500, np.int64),
            np.repeat((255 * ball.clip(0, 1)).astype(np.uint8)[None], 500, axis=0),
            shape,
        )
        bench.add_image(data=np.zeros(shape, np.uint8))
        bench.network.found = lambda volume: found
        bench.run()
        seconds = []
        for score in (0.3, 0.7, 0.2, 0.6, 0.1):
            bench.widget.form.selection.min_score.setValue(score)
            start = time.thread_time()  # other programs on the machine do not count
            bench.widget._on_selection()
            seconds.append(time.thread_time() - start)
        assert np.median(seconds) < 0.1

    def test_several_moves_at_once_repaint_once(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        painted: list[Any] = []
        bench.widget.result.labels.events.set_data.connect(lambda event: painted.append(event))
        bench.slide(min_score=0.1, max_overlap=0.9)
        assert len(painted) == 1

    def test_boxes_suit_the_view(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        boxes = bench.widget.result.boxes
        assert len(boxes.data) == 3 * 4 * 4  # a rectangle in each of four slices
        bench.viewer.dims.ndisplay = 3
        assert len(boxes.data) == 3 * 12
        assert len(boxes.features) == 36
        bench.viewer.dims.ndisplay = 2
        bench.viewer.dims.order = (1, 0, 2)
        assert len(boxes.data) == 3 * 6 * 4

    def test_they_follow_the_selected_layer(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        first = bench.widget.result
        second_image = bench.add_image(name="other")
        bench.widget.form.image.value = second_image
        assert bench.widget.result is None
        assert not bench.widget.form.selection.min_score.isEnabled()
        bench.run()
        bench.slide(min_score=0.78)
        bench.viewer.layers.selection.active = bench.viewer.layers["cells labels"]
        assert bench.widget.result is first
        assert bench.widget.form.selection.min_score.value() == SelectConfig().min_score
        assert first.labels.data.max() == 3

    def test_a_removed_result_is_forgotten(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        bench.viewer.layers.remove("cells labels")
        assert bench.widget.result is None
        assert not bench.widget.form.selection.min_score.isEnabled()

    def test_boxes_may_be_removed(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        bench.viewer.layers.remove("cells boxes")
        bench.slide(min_score=0.78)
        assert bench.widget.result.labels.data.max() == 2


class TestEdits:
    """A layer that somebody paints on belongs to them."""

    def edited(self, bench: Bench) -> Any:
        bench.add_image()
        bench.run()
        labels = bench.widget.result.labels
        labels.paint((4, 20, 20), 9)
        return labels

    def test_the_sliders_let_go_of_a_painted_layer(self, bench: Bench) -> None:
        labels = self.edited(bench)
        selection = bench.widget.form.selection
        assert not selection.min_score.isEnabled()
        assert "edited “cells labels”" in selection.lock.text()
        before = labels.data.copy()
        selection.min_score.setValue(0.1)
        bench.widget._on_selection()
        assert np.array_equal(labels.data, before)

    def test_undo_gives_back_what_was_painted_over(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        bench.slide(min_score=0.25)  # before the first stroke, so that there is no history to hurt
        labels = bench.widget.result.labels
        before = labels.data.copy()
        labels.paint((3, 4, 6), 9)
        assert not np.array_equal(labels.data, before)
        labels.undo()
        assert np.array_equal(labels.data, before)
        labels.redo()
        assert labels.data[3, 4, 6] == 9

    def test_going_on_makes_a_new_layer_and_keeps_the_edited_one(self, bench: Bench) -> None:
        labels = self.edited(bench)
        before = labels.data.copy()
        bench.widget.form.selection.renew.click()
        bench.slide(min_score=0.25)
        assert bench.widget.result.labels is not labels
        assert bench.widget.result.labels.data.max() == 4
        assert np.array_equal(labels.data, before)

    def test_replaced_data_counts_as_an_edit(self, bench: Bench) -> None:
        bench.add_image()
        bench.run()
        bench.widget.result.labels.data = np.zeros(SHAPE, np.int32)
        assert bench.widget.result.edited


class TestImages:
    def test_a_frame_of_a_series(self, bench: Bench) -> None:
        movie = np.zeros((3, *SHAPE), np.uint8)
        movie[1] = 7
        bench.add_image(data=movie, scale=(60, 2, 0.5, 0.5), units=("s", "um", "um", "um"))
        assert "3 frames" in bench.widget.form.image_note.text()
        bench.viewer.dims.set_current_step(0, 1)
        bench.run()
        volume = bench.network.seen[0][0]
        assert volume.shape == SHAPE
        assert np.all(volume.data == 7)
        labels = bench.widget.result.labels
        assert labels.data.shape == (1, *SHAPE)
        assert tuple(labels.translate) == (60, 0, 0, 0)
        bench.slide(min_score=0.25)
        assert labels.data.max() == 4

    def test_lazy_and_multiscale_images(self, bench: Bench) -> None:
        lazy = da.zeros(SHAPE, dtype=np.uint8, chunks=8)
        bench.add_image(data=lazy, name="lazy")
        bench.run()
        assert isinstance(bench.network.seen[0][0].data, da.Array)
        bench.viewer.layers.clear()
        full = np.zeros(SHAPE, np.uint8)
        bench.add_image(data=[full, full[::2, ::2, ::2]], multiscale=True, name="pyramid")
        bench.run()
        assert bench.network.seen[1][0].shape == SHAPE

    def test_an_image_that_cannot_be_used_says_so_before_and_at_run(self, bench: Bench) -> None:
        bench.add_image(data=np.zeros((40, 50)), scale=(1, 1), units=("pixel",) * 2, name="flat")
        assert "flat image" in bench.widget.form.image_note.text()
        bench.widget.start()
        assert "flat image" in bench.widget.form.status.text()
        assert not bench.widget.running

    def test_unknown_voxel_size_counts_voxels(self, bench: Bench) -> None:
        bench.add_image(scale=(1, 1, 1), units=("pixel",) * 3)
        assert "Not known" in bench.widget.form.voxel_size.origin.text()
        bench.run()
        assert bench.widget.result.labels.features["volume_voxels"].tolist() == [144] * 3
        assert bench.network.seen[0][0].voxel_size is None

    def test_a_guessed_voxel_size_is_marked_and_can_be_confirmed(self, bench: Bench) -> None:
        image = bench.add_image(units=("pixel",) * 3)
        edit = bench.widget.form.voxel_size
        assert "Guessed" in edit.origin.text()
        assert edit.value() == (2, 0.5, 0.5)
        edit.apply.click()
        assert [str(unit) for unit in image.units] == ["micrometer"] * 3
        assert edit.apply.isHidden()

    def test_a_typed_voxel_size_can_be_used_in_the_viewer(self, bench: Bench) -> None:
        image = bench.add_image()
        labels = bench.viewer.add_labels(np.zeros(SHAPE, int), scale=(1, 1, 1))
        edit = bench.widget.form.voxel_size
        edit.triple.spins[0].setValue(4)
        edit.apply.click()
        assert tuple(image.scale) == tuple(labels.scale) == (4, 0.5, 0.5)

    def test_the_scale_is_followed(self, bench: Bench) -> None:
        image = bench.add_image()
        image.scale = (5, 1, 1)
        assert bench.widget.form.voxel_size.value() == (5, 1, 1)


class TestForm:
    def test_every_control_explains_itself(self, bench: Bench) -> None:
        form = bench.widget.form
        assert form.selection.min_score.toolTip() == SelectConfig.model_fields["min_score"].description
        assert form.device.toolTip() == PredictConfig.model_fields["device"].description
        assert "model file" in form.model.browse.toolTip()
        assert form.selection.min_score.value() == SelectConfig().min_score
        assert form.selection.min_score.maximum() == 1

    def test_browse_takes_model_files_only(
        self, bench: Bench, model_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = [str(tmp_path / "photo.safetensors"), str(shutil.copy(model_file, tmp_path / "mine.safetensors")), ""]
        Path(chosen[0]).write_bytes(b"no model")
        monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_args: (chosen.pop(0), ""))
        model = bench.widget.form.model
        model.browse.click()
        assert "not a model file" in model.about.text()
        assert model.value() == model_file
        model.browse.click()
        model.browse.click()  # cancelled
        assert model.combo.currentText() == "mine"

    def test_damaged_settings_are_passed_over(self) -> None:
        memory = _form.Memory("damaged")
        memory.keep(min_score="half")
        assert memory.recall_number("min_score", 0.5) == 0.5


def test_choices_are_remembered(bench: Bench, network: Network, model_file: str) -> None:
    bench.add_image()
    form = bench.widget.form
    form.device.setCurrentIndex(form.device.findData("cpu"))
    form.selection.min_score.setValue(0.35)
    bench.run()
    again = SegmentWidget(bench.viewer, network.steps)
    bench.qtbot.addWidget(again)
    assert again.form.model.value() == model_file
    assert again.form.device.currentData() == "cpu"
    assert again.form.selection.min_score.value() == pytest.approx(0.35)


def test_the_model_says_what_it_is_for(bench: Bench) -> None:
    about = bench.widget.form.model.about
    assert "Nuclei made for tests" in about.text()
    assert "2 x 0.5 x 0.5 µm" in about.text()


def test_a_model_for_other_voxels_is_pointed_out(bench: Bench) -> None:
    image = bench.add_image()
    fit = bench.widget.form.fit
    assert fit.isHidden()
    image.scale = (0.4, 0.1, 0.1)
    assert "5.0 times finer" in fit.text()
    assert "shrunk" in fit.text()
    image.scale = (8, 2, 2)
    assert "4.0 times coarser" in fit.text()
    bench.widget.form.object_size.setValue(5)  # who gives the size of the objects has thought of it
    assert fit.isHidden()
    bench.widget.form.object_size.setValue(0)
    assert not fit.isHidden()
    bench.widget.form.voxel_size.triple.spins[0].setValue(0)
    assert fit.isHidden()


def test_the_diameter_of_the_objects_reaches_the_run(bench: Bench) -> None:
    bench.add_image()
    field = bench.widget.form.object_size
    assert "6 µm" in field.specialValueText()
    assert bench.widget.form.config().object_size is None
    field.setValue(3.5)
    assert bench.widget.form.config().object_size == 3.5


def test_progress_of_unknown_length_is_a_busy_bar(bench: Bench) -> None:
    bench.widget._on_progress(Progress(0, 0, "Loading the model"))
    assert bench.widget.form.progress.maximum() == 0
    assert bench.widget.form.status.text() == "Loading the model…"
