"""Grey values and voxel sizes on the way to the network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from napari_mrcnn3d.model.transform import intensity_range, normalize, padded_shape, resample, resample_factors
from napari_mrcnn3d.structures import VoxelSize
from tests._tiny import ellipsoids, tiny_config
from tests.ops.helpers import few

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">u2", ">f4", ">i4"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_range_becomes_zero_to_one_for_any_type(dtype: str) -> None:
    image = (np.arange(60).reshape(3, 4, 5) % 2).astype(dtype)
    result = normalize(image, intensity_range(image, (0, 100)))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, image.astype(float))


@pytest.mark.parametrize(
    "image",
    [
        np.arange(64, dtype=np.int32) + 2_000_000_000,
        np.arange(64, dtype=np.uint64) + 2**40,
        np.arange(64) * 1e300,
        np.arange(64) * 1e-300 + 1e-290,
    ],
    ids=["offset", "large", "huge", "small"],
)
def test_large_offsets_and_scales_lose_nothing(image: np.ndarray) -> None:
    volume = image.reshape(4, 4, 4)
    result = normalize(volume, intensity_range(volume, (0, 100)))
    np.testing.assert_allclose(result.ravel(), np.arange(64) / 63, atol=1e-3)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_image_is_nothing(value: int) -> None:
    image = np.full((2, 3, 4), value, np.uint16)
    result = normalize(image, intensity_range(image, (1.0, 99.8)))
    assert result.shape == image.shape
    assert not result.any()


def test_outliers_are_cut() -> None:
    image = np.array([-1000.0, -0.5, 0, 1, 2, 1000]).reshape(1, 1, 6)
    assert normalize(image, (0.0, 1.0)).ravel().tolist() == [-1, -0.5, 0, 1, 2, 4]


def test_an_image_is_not_changed_by_being_normalised() -> None:
    image = np.random.default_rng(0).random((4, 4, 4)).astype(np.float32)
    before = image.copy()
    normalize(image, (0.2, 0.4))
    np.testing.assert_array_equal(image, before)


def test_percentiles_of_a_large_image_are_estimated() -> None:
    rows = np.linspace(0, 1000, 2000, dtype=np.float32)
    image = np.broadcast_to(rows, (1500, 1500, 2000))  # 18 GB if it were real
    assert intensity_range(image, (10, 90)) == pytest.approx((100, 900), abs=10)


@pytest.mark.parametrize(
    ("model", "image", "factors"),
    [
        ((2, 1, 1), (2, 1, 1), (1, 1, 1)),
        ((2, 1, 1), (2.3, 0.9, 1.1), (1, 1, 1)),  # within the tolerance of 1.2
        ((2, 1, 1), (2.2, 2, 2), (1.1, 2, 2)),
        ((2, 1, 1), (1, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (None, (1, 1, 1), (1, 1, 1)),
        ((2, 1, 1), None, (1, 1, 1)),
    ],
)
def test_images_are_brought_to_the_models_voxel_size(
    model: tuple[float, ...] | None, image: tuple[float, ...] | None, factors: tuple[float, ...]
) -> None:
    size = VoxelSize.of(image) if image else None
    assert resample_factors(tiny_config(voxel_size=model), size) == pytest.approx(factors)


def test_objects_of_another_size_are_scaled_to_the_models() -> None:
    config = tiny_config(voxel_size=(2, 1, 1), object_size=10.0)
    assert resample_factors(config, VoxelSize(2, 1, 1), 40.0) == pytest.approx((0.25, 0.25, 0.25))
    assert resample_factors(config, VoxelSize(4, 1, 1), 5.0) == pytest.approx((4, 2, 2))
    assert resample_factors(config, None, 5.0) == pytest.approx((2, 2, 2))
    assert resample_factors(config, None, 10.0) == (1, 1, 1)
    assert resample_factors(tiny_config(), None, 5.0) == (1, 1, 1)  # a model that does not know its own


@pytest.mark.parametrize("factors", [(0.5, 0.5, 0.5), (2.0, 2.0, 2.0), (1.5, 0.7, 1.0), (2.0, 0.4, 0.4)])
def test_things_stay_where_they_are(factors: tuple[float, float, float]) -> None:
    shape = (20, 40, 40)
    image = ndimage.gaussian_filter(ellipsoids(shape, [((8, 22.5, 15), (4, 7, 6))]).astype(np.float32), 1)
    result = resample(image, factors)
    assert result.dtype == np.float32
    scale = np.array(result.shape) / shape
    np.testing.assert_allclose(scale, factors, rtol=0.05)
    before = np.add(ndimage.center_of_mass(image), 0.5)
    after = np.add(ndimage.center_of_mass(result), 0.5) / scale
    np.testing.assert_allclose(after, before, atol=0.1)
    np.testing.assert_allclose(result.mean(), image.mean(), rtol=0.02)


@few
@given(factors=st.tuples(*[st.floats(0.3, 3)] * 3), seed=st.integers(0, 100))
def test_labels_stay_labels(factors: tuple[float, float, float], seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 2**31 - 1, (4, 5, 6), dtype=np.int32)
    result = resample(labels, factors, nearest=True)
    assert result.dtype == np.int32
    assert np.isin(result, labels).all()
    assert result.shape == tuple(max(1, round(n * f)) for n, f in zip(labels.shape, factors, strict=True))


def test_one_slice_stays_one_slice() -> None:
    image = np.random.default_rng(0).random((1, 8, 8)).astype(np.float32)
    assert resample(image, (0.3, 0.5, 0.5)).shape == (1, 4, 4)
    assert resample(image, (2.0, 1.0, 1.0)).shape == (2, 8, 8)
    assert resample(image, (1.0, 1.0, 1.0)) is image


@few
@given(shape=st.tuples(*[st.integers(1, 70)] * 3))
def test_padding_is_the_least_that_fits(shape: tuple[int, int, int]) -> None:
    top = tiny_config().level_strides[-1]
    for n, padded, stride in zip(shape, padded_shape(shape, tiny_config()), top, strict=True):
        assert padded % stride == 0
        assert n <= padded < n + stride
