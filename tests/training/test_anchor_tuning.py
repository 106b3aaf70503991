"""Network settings that follow from the objects."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.config import ModelConfig, preset
from napari_mrcnn3d.training.anchor_tuning import (
    PATCH_VOXELS,
    anchor_coverage,
    fit_anchors,
    fit_model,
    fit_patch,
)
from tests._tiny import tiny_config
from tests.ops.helpers import few


def sides(*means: tuple[float, float, float], count: int = 60, spread: float = 0.15) -> np.ndarray:
    """Objects of a few kinds, each varying by a share of its sides."""
    rng = np.random.default_rng(0)
    return np.concatenate([mean * np.exp(rng.normal(0, spread, (count, 3))) for mean in np.array(means)])


NUCLEI = sides((8, 20, 20), (16, 40, 40))


@few
@given(
    size=st.floats(1, 80),
    flat=st.floats(0.1, 1),
    spread=st.floats(0, 0.8),
    count=st.integers(1, 30),
    extra=st.booleans(),
)
def test_a_fitted_network_can_always_be_built(size: float, flat: float, spread: float, count: int, extra: bool) -> None:
    config = preset("seed")[0] if extra else ModelConfig()
    fitted = fit_model(config, np.maximum(sides((size * flat, size, size), count=count, spread=spread), 1))
    assert ModelConfig.model_validate(fitted.model_dump()) == fitted
    assert 1 <= sum(len(group) for group in fitted.anchor_sizes) <= 6


def test_the_anchors_cover_the_objects() -> None:
    fitted = fit_model(ModelConfig(), NUCLEI)
    assert anchor_coverage(fitted, NUCLEI, 0.5) > 0.95
    assert anchor_coverage(ModelConfig(), NUCLEI / 3, 0.5) < 0.5


def test_larger_anchors_lie_on_coarser_levels() -> None:
    levels, groups = fit_anchors(ModelConfig(), sides((5, 10, 10), (25, 50, 50), (60, 120, 120)))
    assert len(levels) > 1
    assert levels == tuple(sorted(set(levels)))
    volumes = [[np.prod(size) for size in group] for group in groups]
    assert all(max(fine) < min(coarse) for fine, coarse in pairwise(volumes))
    assert 0 not in levels


def test_a_network_of_one_level_has_its_anchors_there() -> None:
    config = tiny_config(
        stage_channels=(8,), stage_blocks=(1,), stage_strides=((1, 1, 1),), rpn_levels=(0,), roi_levels=(0,),
        anchor_sizes=(((4, 8, 8),),),
    )  # fmt: skip
    assert fit_anchors(config, NUCLEI)[0] == (0,)


@pytest.mark.parametrize("objects", [np.full((5, 3), 7.0), np.full((1, 3), 12.0), np.full((3, 3), 0.2)])
def test_objects_of_one_size_need_one_anchor(objects: np.ndarray) -> None:
    _, groups = fit_anchors(ModelConfig(), objects)
    assert groups == (((max(1.0, objects[0, 0]),) * 3,),)


def test_the_fit_repeats() -> None:
    assert fit_anchors(ModelConfig(), NUCLEI) == fit_anchors(ModelConfig(), NUCLEI)


def test_resolution_is_kept_along_axes_where_objects_are_thin() -> None:
    flat = fit_model(ModelConfig(), sides((5, 30, 30)))
    assert flat.stem_stride == (1, 2, 2)
    assert flat.stem_kernel == (3, 5, 5)
    assert flat.mask_pool_size == (10, 14, 14)
    assert fit_model(ModelConfig(), sides((30, 30, 30))).stem_stride == (2, 2, 2)
    assert fit_model(ModelConfig(), sides((6, 6, 6))).stem_stride == (1, 1, 1)
    coarse_z = ModelConfig(voxel_size=(2, 0.5, 0.5))
    assert fit_model(coarse_z, sides((30, 30, 30))).stem_stride == (1, 2, 2)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_size_of_the_objects_is_kept_in_micrometres(scale: float) -> None:
    config = ModelConfig(voxel_size=(2 * scale, scale, scale))
    fitted = fit_model(config, np.full((9, 3), [5.0, 10, 10]))
    assert fitted.object_size == pytest.approx(10 * scale)
    assert fit_model(ModelConfig(), np.full((9, 3), 8.0)).object_size == 8


def test_without_objects_nothing_is_fitted() -> None:
    config = ModelConfig()
    assert fit_model(config, np.zeros((0, 3))) is config
    assert anchor_coverage(config, np.zeros((0, 3)), 0.5) == 0


def test_coverage_against_a_loop() -> None:
    config, objects = ModelConfig(), NUCLEI[::7]
    anchors = [size for group in config.anchor_sizes for size in group]

    def iou(a: np.ndarray, b: tuple[float, ...]) -> float:
        shared = np.prod(np.minimum(a, b))
        return float(shared / (np.prod(a) + np.prod(b) - shared))

    best = [max(iou(side, anchor) for anchor in anchors) for side in objects]
    for limit in (0.3, 0.5, 0.7):
        assert anchor_coverage(config, objects, limit) == pytest.approx(np.mean(np.array(best) >= limit))


@few
@given(shape=st.tuples(st.integers(1, 90), st.integers(1, 600), st.integers(1, 600)))
def test_a_patch_fits_the_strides_and_the_images(shape: tuple[int, int, int]) -> None:
    config = ModelConfig()
    patch = fit_patch(config, [shape, (1, 1, 1)])
    for side, stride, length in zip(patch, config.level_strides[-1], shape, strict=True):
        assert side % stride == 0
        assert 0 < side < length + stride
    assert np.prod(patch) < 1.6 * PATCH_VOXELS


def test_a_patch_is_as_large_as_a_step_allows() -> None:
    patch = fit_patch(ModelConfig(), [(500, 500, 500)])
    assert np.prod(patch) > 0.6 * PATCH_VOXELS
    assert patch[0] < patch[1] == patch[2]
