"""Opening and saving: samples, candidates, labels with their table, and a real stack end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from napari.layers import Labels
from npe2 import PluginManager
from skimage.measure import block_reduce

from napari_mrcnn3d.io.candidates import save_candidates
from napari_mrcnn3d.io.tables import read_table
from napari_mrcnn3d.io.tiff import read_image, read_labels
from napari_mrcnn3d.structures import VoxelSize
from napari_mrcnn3d.widgets import reader, sample_data, writer
from tests.gui.helpers import SHAPE, Bench, cubes


def saved(path: Path, layer: Labels) -> list[str]:
    data, attributes, _kind = layer.as_layer_data_tuple()
    return writer.write_labels(str(path), data, attributes)


class TestWriter:
    def test_labels_and_table_come_back(self, tmp_path: Path) -> None:
        data, attributes, _ = reader.read_candidates(self.candidates(tmp_path))[0]
        files = saved(tmp_path / "cells.tif", Labels(data, **attributes))
        assert files == [str(tmp_path / "cells.tif"), str(tmp_path / "cells.csv")]
        back = read_labels(files[0])
        assert np.array_equal(back.data, data)
        assert back.voxel_size == pytest.approx((2, 0.5, 0.25))
        table = read_table(files[1])
        assert table["label"].tolist() == [1, 2, 3]
        assert table["score"] == pytest.approx([0.9, 0.8, 0.75])
        assert table["class"].tolist() == ["nucleus"] * 3
        assert table["volume_um3"] == pytest.approx([36] * 3)

    def test_painted_objects_have_a_row_without_score(self, tmp_path: Path) -> None:
        data, attributes, _ = reader.read_candidates(self.candidates(tmp_path))[0]
        data[-1, -1, -1] = 9
        table = read_table(saved(tmp_path / "cells.tif", Labels(data, **attributes))[1])
        assert table["label"].tolist() == [1, 2, 3, 9]
        assert np.isnan(table["score"][3])
        assert table["class"][3] == ""

    def test_a_voxel_size_that_only_the_run_knew(self, tmp_path: Path) -> None:
        layer = Labels(np.ones((2, 3, 4), int), metadata={"napari-mrcnn3d": {"config": {"voxel_size": (2, 0.5, 0.25)}}})
        assert read_labels(saved(tmp_path / "a.tif", layer)[0]).voxel_size == pytest.approx((2, 0.5, 0.25))

    def test_labels_of_other_origin(self, tmp_path: Path) -> None:
        table = read_table(saved(tmp_path / "a.tif", Labels(np.eye(3, dtype=int)[None]))[1])
        assert table["volume_voxels"].tolist() == [3]

    @pytest.mark.parametrize("data", [np.eye(4, dtype=int), np.ones((2, 3, 4, 5), int), -np.ones((2, 2, 2), int)])
    def test_what_has_no_table_is_saved_all_the_same(self, tmp_path: Path, data: np.ndarray) -> None:
        assert saved(tmp_path / "a.tif", Labels(data)) == [str(tmp_path / "a.tif")]
        assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), data)

    def candidates(self, folder: Path) -> str:
        save_candidates(folder / "cells.mrcnn3d", cubes(VoxelSize(2, 0.5, 0.25)))
        return str(folder / "cells.mrcnn3d")


class TestReader:
    def test_candidates_open_as_labels(self, tmp_path: Path) -> None:
        path = tmp_path / "cells.mrcnn3d"
        save_candidates(path, cubes(VoxelSize(2, 0.5, 0.25)))
        read = reader.get_reader(str(path))
        assert read is not None
        ((data, attributes, kind),) = read([str(path)])
        assert kind == "labels"
        layer = Labels(data, **attributes)
        assert tuple(layer.scale) == (2, 0.5, 0.25)
        assert {str(unit) for unit in layer.units} == {"micrometer"}
        assert layer.features["index"].tolist() == np.unique(data)[1:].tolist()

    @pytest.mark.parametrize("path", ["cells.tif", "cells", "", [], ["a.mrcnn3d", "b.tif"]])
    def test_anything_else_is_left_to_others(self, path: Any) -> None:
        assert reader.get_reader(path) is None


class TestSamples:
    def test_the_embryo_is_calibrated(self) -> None:
        ((data, attributes, kind),) = sample_data.embryo()
        assert kind == "image"
        assert data.ndim == 3
        assert data.std() > 0
        assert len(attributes["scale"]) == len(attributes["units"]) == 3

    def test_toy_shapes_are_a_cube(self) -> None:
        ((data, _attributes, kind),) = sample_data.toy()
        assert kind == "image"
        assert len(set(data.shape)) == 1


@pytest.mark.gui
class TestInTheViewer:
    def test_a_real_stack_from_drop_to_file(self, bench: Bench, shared_data: Path, tmp_path: Path) -> None:
        path = shared_data / "gonuclear_mini" / "images" / "1135.tif"
        truth = read_image(path).voxel_size
        bench.viewer.open(path, plugin="napari")
        (image,) = bench.viewer.layers
        edit = bench.widget.form.voxel_size
        assert edit.value() == truth
        assert edit.value() == pytest.approx((0.284, 0.127, 0.127), abs=1e-3)
        assert "1135.tif" in edit.origin.text()
        assert tuple(image.scale) == pytest.approx(tuple(truth))  # shown in its true proportions
        assert {str(unit) for unit in image.units} == {"micrometer"}
        bench.run()
        assert bench.network.seen[0][0].voxel_size == truth
        bench.viewer.layers.selection = {bench.viewer.layers["1135 labels"]}
        files = bench.viewer.layers.save(str(tmp_path / "1135_labels.tif"), selected=True)
        assert sorted(Path(file).name for file in files) == ["1135_labels.csv", "1135_labels.tif"]
        assert read_labels(tmp_path / "1135_labels.tif").voxel_size == pytest.approx(truth)
        assert len(read_table(tmp_path / "1135_labels.csv")["label"]) == 3

    def test_a_stack_beside_others_keeps_its_place_until_asked(self, bench: Bench, shared_data: Path) -> None:
        bench.viewer.add_labels(np.zeros((100, 100, 100), int), name="mine")
        bench.viewer.open(shared_data / "gonuclear_mini" / "images" / "1135.tif", plugin="napari")
        assert tuple(bench.viewer.layers["1135"].scale) == (1, 1, 1)
        assert bench.widget.form.voxel_size.value() == pytest.approx((0.284, 0.127, 0.127), abs=1e-3)
        bench.widget.form.voxel_size.apply.click()
        assert bench.viewer.layers["1135"].scale == pytest.approx(bench.viewer.layers["mine"].scale)
        assert bench.viewer.layers["1135"].scale[0] == pytest.approx(0.284, abs=1e-3)

    def test_a_run_with_a_real_network(
        self, make_napari_viewer_proxy: Any, tmp_path: Path, shared_data: Path, qtbot: Any
    ) -> None:
        from napari_mrcnn3d.model.weights import save_model
        from tests._tiny import tiny_model

        PluginManager.instance().discover()
        model = save_model(tiny_model(score_floor=0.0), tmp_path / "tiny.safetensors", {})
        stack = read_image(shared_data / "gonuclear_mini" / "images" / "1135.tif").data
        viewer = make_napari_viewer_proxy()
        viewer.add_image(block_reduce(stack, (5, 5, 5), np.mean).astype(np.uint8), name="real")
        _dock, widget = viewer.window.add_plugin_dock_widget("napari-mrcnn3d", "Segment")
        widget.form.model.choose(str(model))
        widget.form.device.setCurrentIndex(widget.form.device.findData("cpu"))
        widget.form.selection.min_score.setValue(0)
        widget.start()
        qtbot.waitUntil(lambda: not widget.running, timeout=60_000)
        assert widget.result is not None, widget.form.status.text()
        assert widget.result.labels.data.shape == (20, 20, 20)
        assert len(widget.result.footprints) > 0


def test_shape_of_the_bench_fits_its_cubes() -> None:
    assert (cubes().boxes[:, 3:] <= SHAPE).all()
