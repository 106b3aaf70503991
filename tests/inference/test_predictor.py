"""From an image to candidates, with a model that answers at once."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from napari_mrcnn3d.config import PredictConfig
from napari_mrcnn3d.data.patches import objects_in
from napari_mrcnn3d.inference import predictor as module
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.structures import Candidates, DeviceMemoryError, Progress, UserError, Volume, VoxelSize
from tests._tiny import EIGHT, BlobModel, ellipsoids, picture, tiny_config, tiny_model

SHAPE = (32, 44, 44)
LABELS = ellipsoids(SHAPE, EIGHT)
IMAGE = picture(LABELS)


def blobs(*, voxel_size: tuple[float, ...] | None = None, object_size: float | None = None, **model: Any) -> Predictor:
    config = tiny_config(
        intensity_percentiles=(0, 100),
        voxel_size=voxel_size,
        object_size=object_size,
        anchor_sizes=(((9, 15, 15),),) * 2,
    )
    return Predictor(BlobModel(config, **model), "cpu")  # type: ignore[arg-type]


def by_place(boxes: np.ndarray) -> np.ndarray:
    """Boxes in the order of their places, however they scored."""
    centre = (boxes[:, :3] + boxes[:, 3:]) / 2
    return boxes[np.lexsort((centre // 16).T)]


def true_boxes(labels: np.ndarray = LABELS) -> np.ndarray:
    return by_place(objects_in(labels)[0])


def test_objects_are_found_where_they_are_best_first() -> None:
    found = blobs().predict(Volume(IMAGE, VoxelSize(2, 1, 1)))
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes())
    assert (np.diff(found.scores) <= 0).all()
    assert found.shape == SHAPE
    assert found.voxel_size == VoxelSize(2, 1, 1)
    assert found.masks.dtype == np.uint8
    assert found.masks.min() == 255
    assert [found.boxes.dtype, found.scores.dtype, found.classes.dtype] == [np.float32, np.float32, np.int64]


@pytest.mark.parametrize("tile", [(32, 44, 44), (32, 30, 30), (20, 32, 32), (500, 500, 500)])
@pytest.mark.parametrize("overlap", [None, (9, 15, 15)])
def test_an_object_cut_by_tiles_is_found_once(tile: tuple[int, ...], overlap: tuple[int, ...] | None) -> None:
    config = PredictConfig(tile=tile, overlap=overlap)
    found = blobs().predict(Volume(IMAGE), config)
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes())


def test_tiles_that_disagree_neither_lose_nor_double_an_object() -> None:
    labels = ellipsoids((10, 16, 60), [((5, 8, x), (4, 6, 6)) for x in (10, 30, 50)])  # the second on the border
    for shift in (0.0, 0.9, -0.9):
        found = blobs(shift=shift).predict(
            Volume(picture(labels)), PredictConfig(tile=(10, 16, 40), overlap=(0, 0, 20))
        )
        np.testing.assert_allclose(by_place(found.boxes), true_boxes(labels), atol=1)


@pytest.mark.parametrize(
    ("have", "want"),
    [((2, 1, 1), (2, 1, 1)), ((2, 1, 1), (1, 1, 1)), ((1, 1, 1), (2, 2, 2)), ((3, 0.5, 0.5), (1, 1, 1))],
)
def test_boxes_are_in_voxels_of_the_image_whatever_the_models(have: tuple[float, ...], want: tuple[float, ...]) -> None:
    model = blobs(voxel_size=want)
    found = model.predict(Volume(IMAGE, VoxelSize.of(have)))
    expected = [round(n * h / w) for n, h, w in zip(SHAPE, have, want, strict=True)]
    assert model.model.seen == [tuple(expected)]
    tolerance = np.tile(np.maximum(np.divide(want, have), 1), 2) / 2 + 0.5
    assert (np.abs(by_place(found.boxes) - true_boxes()) <= tolerance).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 3:] <= SHAPE).all()


def test_the_voxel_size_given_wins_and_is_kept() -> None:
    model = blobs(voxel_size=(2, 1, 1))
    found = model.predict(Volume(IMAGE, VoxelSize(1, 1, 1)), PredictConfig(voxel_size=(2, 1, 1)))
    assert model.model.seen == [SHAPE]
    assert found.voxel_size == VoxelSize(2, 1, 1)


def test_objects_of_another_size_are_brought_to_the_models() -> None:
    model = blobs(voxel_size=(1, 1, 1), object_size=6.0)
    found = model.predict(Volume(IMAGE, VoxelSize(1, 1, 1)), PredictConfig(object_size=12.0))
    assert model.model.seen == [(16, 22, 22)]
    assert len(found) == 8


@pytest.mark.parametrize(
    "settings", [{"voxel_size": (1e-6, 1e-6, 1e-6)}, {"voxel_size": (1000, 1, 1)}, {"object_size": 0.01}]
)
def test_a_length_in_the_wrong_unit_is_refused(settings: dict[str, Any]) -> None:
    model = blobs(voxel_size=(2, 1, 1), object_size=10.0)
    with pytest.raises(UserError, match="more than 30 times"):
        model.predict(Volume(IMAGE, VoxelSize(2, 1, 1)), PredictConfig(**settings))


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">u2", ">f8"])
def test_every_number_type_works(dtype: str) -> None:
    low, high = {"b": (0, 1), "u": (0, 200)}.get(np.dtype(dtype).kind, (-100, 100))
    found = blobs().predict(Volume(np.where(LABELS > 0, high, low).astype(dtype)))
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes())


def test_views_of_arrays_work() -> None:
    found = blobs().predict(Volume(np.asfortranarray(IMAGE)[::-1, :, ::-1]))
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes(LABELS[::-1, :, ::-1].copy()))


class Lazy:
    """An array that is only read in parts, as dask's and zarr's are."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.shape, self.dtype, self.largest = data, data.shape, data.dtype, 0

    def __getitem__(self, key: Any) -> np.ndarray:
        part = self.data[key]
        if all(s.step in (None, 1) for s in key):
            self.largest = max(self.largest, part.size)
        return part


def test_a_large_volume_is_read_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napari_mrcnn3d.model.transform.SAMPLE", 1000)
    lazy = Lazy(IMAGE)
    found = blobs().predict(Volume(lazy), PredictConfig(tile=(20, 32, 32)))
    assert len(found) == 8
    assert lazy.largest == 20 * 32 * 32


@pytest.mark.parametrize("value", [0, 1000])
@pytest.mark.parametrize("shape", [(8, 16, 16), (1, 1, 1)])
def test_an_image_without_anything_has_no_candidates(value: int, shape: tuple[int, int, int]) -> None:
    predictor = Predictor(tiny_model(score_floor=0.0), "cpu")
    found = predictor.predict(Volume(np.full(shape, value, np.uint16)))
    assert len(found) == 0
    assert found.shape == shape
    assert found.masks.shape == (0, 8, 8, 8)


@pytest.mark.parametrize("shape", [(1, 40, 40), (40, 1, 1), (1, 1, 2), (3, 3, 3)])
def test_slices_and_tiny_volumes_are_volumes(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 99, shape, dtype=np.uint8)
    for size in (VoxelSize(1, 1, 1), VoxelSize(4, 0.5, 0.5), None):
        found = Predictor(tiny_model(score_floor=0.0, voxel_size=(1, 1, 1)), "cpu").predict(Volume(image, size))
        assert len(found) > 0
        assert (found.boxes[:, 3:] <= shape).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_numbers_that_are_none_are_refused(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = IMAGE.astype(np.float32)
    image[5, 5, 5] = bad
    with pytest.raises(UserError, match=r"stack\.tif holds NaN or infinite values"):
        blobs().predict(Volume(image, name="stack.tif"))
    monkeypatch.setattr("napari_mrcnn3d.model.transform.SAMPLE", 1000)  # the percentiles miss it
    with pytest.raises(UserError, match="NaN or infinite"):
        blobs().predict(Volume(image))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(0, 4, 4\).*nothing to segment"):
        blobs().predict(Volume(np.zeros((0, 4, 4))))
    with pytest.raises(UserError, match="complex64"):
        blobs().predict(Volume(np.zeros((4, 4, 4), np.complex64)))


def test_progress_rises_to_the_end() -> None:
    steps = list(blobs().predict_steps(Volume(IMAGE), PredictConfig(tile=(20, 32, 32))))
    done = [step.done for step in steps]
    assert all(isinstance(step, Progress) and step.total == 1000 for step in steps)
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 1000
    assert len(steps) > 8


def test_a_full_memory_leads_to_smaller_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SMALLEST_TILE", 1000)
    model = blobs(most_voxels=32_000)
    with caplog.at_level(logging.WARNING):
        found = model.predict(Volume(IMAGE, name="big"))
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes())
    assert max(np.prod(shape) for shape in model.model.seen[1:]) <= 32_000
    assert "trying (32, 22, 44)" in caplog.text


def test_a_memory_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_TILE", 10_000)
    model = blobs(most_voxels=100)
    with pytest.raises(DeviceMemoryError, match=r"memory is too small for stack\.tif even in tiles of"):
        model.predict(Volume(IMAGE, name="stack.tif"), PredictConfig(tile=(999, 999, 999)))
    assert len(model.model.seen) <= 4  # a tile larger than the volume is not halved in vain


def test_a_graphics_card_too_small_for_anything_leaves_it_to_the_processor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = blobs()
    original = model.model.detect_steps

    def full_card(image: torch.Tensor) -> Any:
        if image.device.type != "cpu":
            raise RuntimeError("backend out of memory")
        return original(image)

    monkeypatch.setattr(model.model, "detect_steps", full_card)
    model.device = torch.device("meta")  # stands in for the card
    with caplog.at_level(logging.WARNING):
        found = model.predict(Volume(IMAGE))
    np.testing.assert_array_equal(by_place(found.boxes), true_boxes())
    assert "using the processor" in caplog.text
    assert model.device.type == "cpu"


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    model = blobs()
    model.model.detect_steps = lambda image: (_ for _ in ()).throw(RuntimeError("shapes differ"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes differ"):
        model.predict(Volume(IMAGE))


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    predictor = Predictor(tiny_model(), "cpu")
    image = IMAGE.copy()
    watched = weakref.ref(image)
    steps = predictor.predict_steps(Volume(image), PredictConfig(tile=(20, 32, 32)))
    for _ in range(4):
        next(steps)
        assert torch.is_grad_enabled()  # torch's modes do not leak between two steps
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
    steps.close()
    del steps, image
    gc.collect()
    assert watched() is None
    assert isinstance(predictor.predict(Volume(IMAGE)), Candidates)


def test_other_classes_do_not_suppress_each_other() -> None:
    config = tiny_config(class_names=("a", "b"), score_floor=0.0, nms_iou=0.0, max_candidates=500)
    torch.manual_seed(0)
    found = Predictor(tiny_model(**config.model_dump()), "cpu").predict(Volume(IMAGE), PredictConfig(tile=(20, 32, 32)))
    assert set(found.classes) == {1, 2}
    assert found.class_names == ("a", "b")
    assert (np.diff(found.scores) <= 0).all()
