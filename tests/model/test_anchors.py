"""Anchors against a loop over cells."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.model.anchors import anchors_on_grid
from tests.ops.helpers import few

CPU = torch.device("cpu")
triples = st.tuples(*[st.integers(1, 4)] * 3)
sides = st.tuples(*[st.floats(0.5, 50, width=32)] * 3)


@few
@given(grid=triples, stride=triples, sizes=st.lists(sides, min_size=1, max_size=3), offset=st.sampled_from([0.0, 0.5]))
def test_anchors_stand_in_every_cell(
    grid: tuple[int, int, int], stride: tuple[int, int, int], sizes: list[tuple[float, float, float]], offset: float
) -> None:
    expected = []
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3).tolist():
        for size in sizes:
            centre = [(c + offset) * s for c, s in zip(cell, stride, strict=True)]
            low = [c - side / 2 for c, side in zip(centre, size, strict=True)]
            expected.append(low + [c + side / 2 for c, side in zip(centre, size, strict=True)])
    found = anchors_on_grid(grid, stride, sizes, offset=offset, device=CPU)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))


def test_half_cell_anchors_lie_symmetrically_in_the_volume() -> None:
    found = anchors_on_grid((3, 4, 2), (4, 2, 8), [(5, 3, 9)], offset=0.5, device=CPU)
    extent = torch.tensor([12.0, 8, 16])
    mirrored = torch.cat([extent - found[:, 3:], extent - found[:, :3]], 1)
    torch.testing.assert_close(mirrored.flip(0), found)
