"""Which level a region is pooled from, and that its features are those under it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d.model.poolers import MultiScaleRoIAlign3D
from tests._tiny import tiny_config
from tests.ops.helpers import random_boxes, zeros_index

SHAPE = (32, 64, 64)


def ramps(level: int, batch: int = 1) -> Tensor:
    """A map whose three channels say where a cell's centre lies, in voxels."""
    stride = tiny_config().level_strides[level]
    axes = [(torch.arange(n // s) + 0.5) * s for n, s in zip(SHAPE, stride, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].repeat(batch, 1, 1, 1, 1)


def boxes_inside(count: int, seed: int) -> Tensor:
    """Boxes of all sizes, far enough from the border for every level."""
    return random_boxes(count, seed, extent=8.0, sides=(2.0, 16.0)) + torch.tensor([12.0, 28, 28]).repeat(2)


@pytest.mark.parametrize(
    ("sides", "level"),
    [((8, 8, 8), 1), ((2, 16, 16), 1), ((16, 16, 16), 2), ((64, 64, 64), 2), ((4, 4, 4), 0), ((0.1, 1, 1), 0)],
)
def test_the_level_follows_the_geometric_mean_side(sides: tuple[float, ...], level: int) -> None:
    config = tiny_config(roi_levels=(0, 1, 2), roi_canonical_level=1, roi_canonical_size=8.0)
    box = torch.tensor([[5.0, 5, 5, *(5 + s for s in sides)]])
    assert MultiScaleRoIAlign3D(config, (1, 1, 1)).levels_of(box).tolist() == [level]


def test_the_level_changes_half_way_between_two_sizes() -> None:
    pool = MultiScaleRoIAlign3D(tiny_config(roi_canonical_size=8.0), (1, 1, 1))
    for factor, level in (0.99, 0), (1.01, 1):
        side = 8 * math.sqrt(2) * factor
        assert pool.levels_of(torch.tensor([[0.0, 0, 0, side, side, side]])).tolist() == [level]


def test_pooled_features_are_those_under_the_box_on_every_level() -> None:
    config = tiny_config(roi_levels=(0, 1, 2), roi_canonical_size=4.0)
    boxes = boxes_inside(30, 0)
    pool = MultiScaleRoIAlign3D(config, (2, 3, 4))
    assert set(pool.levels_of(boxes).tolist()) == {0, 1, 2}
    pooled = pool([ramps(k) for k in range(3)], boxes, zeros_index(30), SHAPE)
    assert pooled.shape == (30, 3, 2, 3, 4)
    for axis, cells in enumerate((2, 3, 4)):
        steps = (torch.arange(cells) + 0.5) / cells
        expected = boxes[:, axis, None] + steps * (boxes[:, axis + 3] - boxes[:, axis])[:, None]
        found = pooled[:, axis].movedim(axis + 1, 1).flatten(2).mean(2)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampling", ["roi_align", "crop_and_resize"])
def test_regions_keep_their_order_and_their_image(sampling: str) -> None:
    config = tiny_config(roi_levels=(0, 1, 2), roi_canonical_size=4.0, roi_sampling=sampling)
    boxes = boxes_inside(24, 1)
    images = torch.arange(24) % 2
    maps = [torch.randn(2, 4, *ramps(k).shape[2:], generator=torch.Generator().manual_seed(k)) for k in range(3)]
    pool = MultiScaleRoIAlign3D(config, (2, 2, 2))
    together = pool(maps, boxes, images, SHAPE)
    alone = [pool(maps, boxes[i : i + 1], images[i : i + 1], SHAPE) for i in range(24)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.equal(together, pool(maps, boxes, 1 - images, SHAPE))


def test_boxes_side_by_side_by_level_are_pooled_in_place() -> None:
    pool = MultiScaleRoIAlign3D(tiny_config(roi_levels=(0, 1, 2), roi_canonical_size=4.0), (2, 2, 2))
    boxes = boxes_inside(24, 1)
    order = pool.by_level(boxes)
    assert order.tolist() != list(range(24))
    sorted_levels = pool.levels_of(boxes[order])
    assert torch.equal(sorted_levels, sorted_levels.sort().values)
    maps = [ramps(k) for k in range(3)]
    together = pool(maps, boxes, zeros_index(24), SHAPE)
    assert torch.equal(pool(maps, boxes[order], zeros_index(24), SHAPE), together[order])


def test_the_predecessors_sampling_reaches_from_the_first_to_the_last_voxel() -> None:
    config = tiny_config(roi_sampling="crop_and_resize", roi_levels=(0,))
    whole = torch.tensor([[0.0, 0, 0, *SHAPE]])
    features = torch.randn(1, 2, *SHAPE)
    pooled = MultiScaleRoIAlign3D(config, SHAPE)([features], whole, zeros_index(1), SHAPE)
    torch.testing.assert_close(pooled, features)


def test_no_region_gives_no_features() -> None:
    pooled = MultiScaleRoIAlign3D(tiny_config(), (2, 3, 4))(
        [ramps(0), ramps(1)], torch.zeros(0, 6), zeros_index(0), SHAPE
    )
    assert pooled.shape == (0, 3, 2, 3, 4)
