"""What a layer says about its image, and where results lie: bare layers, no window."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
from napari.components import ViewerModel
from napari.layers import Image, Labels, Points

from napari_mrcnn3d.io.tiff import write_image
from napari_mrcnn3d.structures import UserError, VoxelSize
from napari_mrcnn3d.widgets import _layers

STACK = np.zeros((4, 5, 6), np.uint8)


def opened(path: Path, data: np.ndarray, monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> Image:
    """An image layer that came from a file."""
    layer = Image(data, name=path.stem, **attributes)
    monkeypatch.setattr(type(layer), "source", SimpleNamespace(path=str(path)))
    return layer


class TestCalibration:
    def test_scale_with_a_length_unit(self) -> None:
        layer = Image(STACK, scale=(2000, 500, 250), units="nm")
        known = _layers.calibration_of(layer)
        assert known.origin == "layer"
        assert known.voxel_size == pytest.approx((2, 0.5, 0.25))

    def test_scale_without_unit_is_a_guess(self) -> None:
        assert _layers.calibration_of(Image(STACK, scale=(2, 0.5, 0.5))) == _layers.Calibration(
            VoxelSize(2, 0.5, 0.5), "guessed"
        )

    def test_nothing_known(self) -> None:
        assert _layers.calibration_of(Image(STACK)) == _layers.Calibration(None, "unknown")

    def test_one_micrometre_is_not_unknown(self) -> None:
        assert _layers.calibration_of(Image(STACK, units="um")).voxel_size == (1, 1, 1)

    def test_the_last_three_axes_of_a_series_count(self) -> None:
        series = Image(STACK[None], scale=(60, 2, 0.5, 0.5), units=("s", "um", "um", "um"))
        assert _layers.calibration_of(series).voxel_size == (2, 0.5, 0.5)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint32])  # ImageJ and OME
    def test_the_file_knows_what_the_reader_dropped(
        self, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_image(tmp_path / "cells.tif", STACK.astype(dtype), VoxelSize(2, 0.5, 0.25))
        known = _layers.calibration_of(opened(tmp_path / "cells.tif", STACK, monkeypatch))
        assert known.origin == "file"
        assert known.voxel_size == pytest.approx((2, 0.5, 0.25))

    def test_a_file_of_another_shape_is_not_believed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_image(tmp_path / "cells.tif", STACK, VoxelSize(2, 0.5, 0.25))
        layer = opened(tmp_path / "cells.tif", STACK[:, :2], monkeypatch)
        assert _layers.calibration_of(layer).origin == "unknown"

    def test_the_users_scale_wins_over_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_image(tmp_path / "cells.tif", STACK, VoxelSize(2, 0.5, 0.25))
        layer = opened(tmp_path / "cells.tif", STACK, monkeypatch, scale=(3, 1, 1), units="um")
        assert _layers.calibration_of(layer) == _layers.Calibration(VoxelSize(3, 1, 1), "layer")

    @pytest.mark.parametrize("content", [b"no tiff at all", b"II*\0\0\0\0\0"])
    def test_a_damaged_file_is_passed_over(
        self, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cells.tif").write_bytes(content)
        assert _layers.calibration_of(opened(tmp_path / "cells.tif", STACK, monkeypatch)).origin == "unknown"


class TestCalibrate:
    def test_everything_over_the_image_follows_and_the_rest_stays(self) -> None:
        viewer = ViewerModel()
        image = viewer.add_image(STACK, translate=(1, 2, 3))
        labels = viewer.add_labels(STACK.astype(int))
        points = viewer.add_points([[1, 2, 3]])
        other = viewer.add_image(STACK[:2])
        calibrated = viewer.add_image(STACK, scale=(9, 9, 9), units="um")
        _layers.calibrate(viewer.layers, image, VoxelSize(2, 0.5, 0.25))
        for layer in (image, labels, points):
            assert tuple(layer.scale) == (2, 0.5, 0.25)
            assert {str(unit) for unit in layer.units} == {"micrometer"}
        assert tuple(image.translate) == (2, 1, 0.75)
        assert tuple(other.scale) == (1, 1, 1)
        assert tuple(calibrated.scale) == (9, 9, 9)

    def test_time_is_left_alone(self) -> None:
        viewer = ViewerModel()
        series = viewer.add_image(STACK[None], scale=(60, 1, 1, 1), units=("s", "pixel", "pixel", "pixel"))
        _layers.calibrate(viewer.layers, series, VoxelSize(2, 0.5, 0.25))
        assert tuple(series.scale) == (60, 2, 0.5, 0.25)
        assert [str(unit) for unit in series.units] == ["second"] + ["micrometer"] * 3


class TestVolume:
    def test_lazy_data_stays_lazy(self) -> None:
        lazy = da.zeros((4, 5, 6), chunks=2)
        assert _layers.volume_of(Image(lazy), None).data is lazy

    def test_full_resolution_of_a_multiscale_image(self) -> None:
        layer = Image([STACK, STACK[::2, ::2, ::2]], multiscale=True)
        assert _layers.volume_of(layer, None).shape == STACK.shape

    def test_the_wanted_frame_of_a_series(self) -> None:
        series = Image(np.arange(3)[:, None, None, None] * np.ones((4, 5, 6)))
        assert _layers.frame_count(series) == 3
        assert np.unique(_layers.volume_of(series, None, frame=2).data).tolist() == [2]

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (Image(np.zeros((5, 6))), "flat image"),
            (Image(np.zeros((4, 40, 40, 3), np.uint8), rgb=True), "Split RGB"),
            (Image(np.zeros((2, 3, 4, 5, 6))), "Split Stack"),
            (Image(np.zeros((2, 4, 5, 6)), axis_labels=("channel", "z", "y", "x")), "Split Stack"),
            (Image(np.zeros((2, 5, 6)), axis_labels=("t", "y", "x")), "series of flat images"),
        ],
        ids=["2d", "rgb", "5d", "channels", "film"],
    )
    def test_what_cannot_be_segmented_is_refused_in_one_sentence(self, layer: Image, reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            _layers.volume_of(layer, None)
        assert layer.name in str(caught.value)

    def test_channels_that_only_the_file_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = np.zeros((4, 2, 5, 6), np.uint16)
        tifffile.imwrite(tmp_path / "two.tif", data, imagej=True, metadata={"axes": "ZCYX"})
        with pytest.raises(UserError, match="Split Stack"):
            _layers.volume_of(opened(tmp_path / "two.tif", data, monkeypatch), None)


class TestGeometry:
    def test_a_result_lies_where_its_image_lies(self) -> None:
        affine = np.eye(4)
        affine[:3, 3] = (5, 6, 7)
        image = Image(
            STACK, scale=(2, 0.5, 0.25), translate=(1, 2, 3), rotate=20, shear=(0.1, 0, 0), affine=affine, units="um"
        )
        labels = Labels(STACK.astype(int), **_layers.geometry_of(image))
        assert np.allclose(labels.data_to_world((1, 2, 3)), image.data_to_world((1, 2, 3)))
        assert labels.units == image.units
        assert labels.axis_labels == image.axis_labels

    def test_a_frame_lies_at_its_time(self) -> None:
        series = Image(np.zeros((3, 4, 5, 6)), scale=(60, 2, 1, 1), translate=(10, 0, 0, 0))
        frame = Labels(np.zeros((1, 4, 5, 6), int), **_layers.geometry_of(series, frame=2))
        assert np.allclose(frame.data_to_world((0, 1, 2, 3)), series.data_to_world((2, 1, 2, 3)))


class TestBoxes:
    BOXES = np.array([[1, 2, 3, 4, 7, 9], [0, 0, 0, 1, 1, 1]], float)

    def test_edges_join_the_corners_of_the_box(self) -> None:
        vectors, owner = _layers.box_edges(self.BOXES)
        assert vectors.shape == (24, 2, 3)
        assert np.bincount(owner).tolist() == [12, 12]
        for box, one in zip(self.BOXES, (vectors[owner == 0], vectors[owner == 1]), strict=True):
            ends = {tuple(end) for end in np.concatenate([one[:, 0], one.sum(axis=1)]).tolist()}
            assert ends == set(product(*zip(box[:3] - 0.5, box[3:] - 0.5, strict=True)))
            assert (np.count_nonzero(one[:, 1], axis=1) == 1).all()
            assert one[:, 1].sum(axis=0) == pytest.approx(4 * (box[3:] - box[:3]))

    @pytest.mark.parametrize("along", [0, 1, 2])
    def test_outlines_go_round_the_box_in_each_of_its_slices(self, along: int) -> None:
        vectors, owner = _layers.box_outlines(self.BOXES, along)
        for k, box in enumerate(self.BOXES):
            one = vectors[owner == k]
            assert sorted(set(one[:, 0, along].tolist())) == list(range(int(box[along]), int(box[along + 3])))
            others = [axis for axis in range(3) if axis != along]
            for position in set(one[:, 0, along].tolist()):
                ring = one[one[:, 0, along] == position]
                assert np.allclose(ring[:, 1].sum(axis=0), 0)  # closed
                assert np.abs(ring[:, 1]).sum() == pytest.approx(2 * sum(box[a + 3] - box[a] for a in others))

    def test_leading_axes_are_zero(self) -> None:
        vectors, _ = _layers.box_edges(self.BOXES, axes=4)
        assert vectors.shape == (24, 2, 4)
        assert not vectors[..., 0].any()

    def test_no_box(self) -> None:
        assert _layers.box_edges(np.zeros((0, 6)))[0].shape == (0, 2, 3)
        assert _layers.box_outlines(np.zeros((0, 6)), 0)[0].shape == (0, 2, 3)


def test_points_have_no_voxels_to_compare() -> None:
    assert _layers.is_uncalibrated(Points(np.zeros((1, 3))))
    assert not _layers.is_uncalibrated(Points(np.zeros((1, 2))))
