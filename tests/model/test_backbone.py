"""Where cells of the feature maps lie, and how large the maps are."""

from __future__ import annotations

import pytest
import torch

from napari_mrcnn3d.config import preset
from napari_mrcnn3d.model.backbone import Affine, ResNet3D, conv3d, norm3d
from napari_mrcnn3d.model.fpn import FeaturePyramidNetwork3D
from tests._tiny import tiny_config


def seen_by(layer: torch.nn.Module, cell: int, length: int = 60) -> list[torch.Tensor]:
    """Input positions, for each axis, that an output cell on the diagonal depends on."""
    image = torch.ones(1, 1, length, length, length, requires_grad=True)
    layer(image)[0, 0, cell, cell, cell].backward()
    assert image.grad is not None
    return [index.double() for index in torch.nonzero(image.grad[0, 0]).T]


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("strides", [(1, 2, 3), (4, 5, 2)])
def test_a_cell_looks_symmetrically_at_the_voxels_it_stands_for(kernel: int, strides: tuple[int, int, int]) -> None:
    layer = conv3d(1, 1, (kernel, kernel, kernel), strides)
    torch.nn.init.ones_(layer.weight)
    for positions, stride in zip(seen_by(layer, 5), strides, strict=True):
        middle = (5 + 0.5) * stride - 0.5
        assert (positions.min() + positions.max()) / 2 == middle
        assert positions.max() - positions.min() + 1 >= max(kernel, stride)  # no voxel falls between two cells


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_map_has_its_share_of_the_cells(kernel: int) -> None:
    layer = conv3d(1, 2, (kernel, 1, kernel), (1, 2, 4))
    assert layer(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 4, 2)


@pytest.mark.parametrize("channels", [1, 6, 8, 20, 24, 64, 96])
def test_group_normalisation_works_on_a_batch_of_one(channels: int) -> None:
    norm = norm3d("group", channels)
    assert isinstance(norm, torch.nn.GroupNorm)
    x = norm(5 + 3 * torch.randn(1, channels, 4, 4, 4))
    groups = x.reshape(norm.num_groups, -1)
    torch.testing.assert_close(groups.mean(1), torch.zeros(norm.num_groups), atol=1e-4, rtol=0)
    torch.testing.assert_close(groups.var(1), torch.ones(norm.num_groups), atol=0.05, rtol=0)
    assert channels // norm.num_groups >= min(8, channels)


@pytest.mark.parametrize("side", [8, 14])
@pytest.mark.parametrize("layouts", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_group_normalisation_of_half_precision_is_that_of_float32(side: int, layouts: tuple[int, int]) -> None:
    """Forwards and backwards, on either side of the size where another kernel is used, whatever the memory is like."""
    formats = [(torch.contiguous_format, torch.channels_last_3d)[kind] for kind in layouts]
    generator = torch.Generator().manual_seed(side)
    x, grad = torch.randn(2, 2, 16, side, side, side, generator=generator)
    norm = norm3d("group", 16)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    half = x.bfloat16().to(memory_format=formats[0]).requires_grad_()
    whole = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normal = norm(half)
    found = torch.autograd.grad(normal, (half, *norm.parameters()), grad.bfloat16().to(memory_format=formats[1]))
    expected_normal = torch.nn.functional.group_norm(whole, 2, *norm.parameters())
    expected = torch.autograd.grad(expected_normal, (whole, *norm.parameters()), grad)
    assert normal.dtype == found[0].dtype == torch.bfloat16
    for one, other in zip((normal, *found), (expected_normal, *expected), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.01 * float(other.detach().abs().max()))


def test_affine_changes_nothing_until_it_has_learnt() -> None:
    layer, x = Affine(3), torch.randn(2, 3, 2, 2, 2)
    assert torch.equal(layer(x), x)
    layer.weight.data, layer.bias.data = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 0, 5])
    torch.testing.assert_close(layer(x)[:, 2], 3 * x[:, 2] + 5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("pool", [False, True])
def test_every_stage_has_the_stride_that_the_settings_say(block: str, pool: bool) -> None:
    config = tiny_config(
        block=block, stem_pool=pool, stem_stride=(1, 2, 3), stage_strides=((1, 1, 1), (1, 2, 2), (3, 2, 1))
    )
    shape = tuple(2 * s for s in config.level_strides[-1])
    with torch.device("meta"):
        features = ResNet3D(config)(torch.zeros(2, 1, *shape))
    for level, channels, stride in zip(features, config.stage_channels, config.level_strides, strict=True):
        assert level.shape == (2, channels, *(n // s for n, s in zip(shape, stride, strict=True)))


def test_the_predecessors_network_is_a_resnet50() -> None:
    config, _, _ = preset("seed")
    with torch.device("meta"):
        network = ResNet3D(config)
        features = network(torch.zeros(1, 1, 64, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [
        (256, *[16] * 3),
        (512, *[8] * 3),
        (1024, *[4] * 3),
        (2048, *[2] * 3),
    ]
    convolutions = [m for stage in network.stages for m in stage.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(convolutions) - 4 == 48  # 16 blocks of three; four stages begin with a shortcut


def test_the_pyramid_adds_every_coarser_level_to_the_finer_ones() -> None:
    fpn = FeaturePyramidNetwork3D((1, 1), 1)
    for lateral, smooth in zip(fpn.lateral, fpn.smooth, strict=True):
        torch.nn.init.ones_(lateral.weight)
        torch.nn.init.zeros_(smooth.weight)
        smooth.weight.data[0, 0, 1, 1, 1] = 1
    fine, coarse = torch.randn(1, 1, 3, 5, 4), torch.randn(1, 1, 3, 3, 2)
    top, bottom = fpn([fine, coarse])[::-1]
    assert torch.equal(top, coarse)
    for z, y, x in [(0, 0, 0), (2, 4, 3), (1, 2, 1)]:
        torch.testing.assert_close(bottom[0, 0, z, y, x], fine[0, 0, z, y, x] + coarse[0, 0, z, y * 3 // 5, x // 2])
