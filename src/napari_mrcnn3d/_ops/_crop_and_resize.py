"""Crop and resize in plain PyTorch, with both its gradients: the predecessor's operation.

Its gradient to the image is the transpose of a RoIAlign of boxes that sample alike, up to rounding. Forwards that
rounding would show: the last sample is to fall exactly on the second corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from napari_mrcnn3d._ops._backends import kernels
from napari_mrcnn3d._ops._torch import RoIGrid, full_precision

_CORNERS = tuple(product((0, 1), repeat=3))
"""The eight voxels around a sample: 0 below and 1 above it, along each axis."""


def forward(
    image: Tensor, boxes: Tensor, box_index: Tensor, size: tuple[int, ...], nearest: bool, outside: float
) -> Tensor:
    """Crops [N, ch, cw, cd, C] of images [B, H, W, D, C], in the image's floating type."""
    lattice = Lattice.of(image, boxes, box_index, size)
    with full_precision(image.device):
        values = lattice.nearest_values() if nearest else lattice.values()
    return torch.where(lattice.inside, values, outside)


@dataclass(frozen=True)
class Lattice:
    """Where the samples of every crop lie in its image.

    Attributes
    ----------
    image : Tensor[B, H, W, D, C]
    boxes : Tensor[N, 6]
    box_index : integer Tensor[N]
    positions : tuple of Tensor[N, count]
        Along each axis, in voxels; 0 for a sample that is outside.
    along : tuple of bool Tensor[N, count]
        Whether it is inside, along each axis.
    """

    image: Tensor
    boxes: Tensor
    box_index: Tensor
    positions: tuple[Tensor, ...]
    along: tuple[Tensor, ...]

    @classmethod
    def of(cls, image: Tensor, boxes: Tensor, box_index: Tensor, size: tuple[int, ...]) -> Lattice:
        """Lay ``size`` samples over each box, the outer ones on its corners; a single one lies in the middle."""
        positions, along = [], []
        for axis, count in enumerate(size):
            last = image.shape[axis + 1] - 1
            share = _share(boxes, count)
            position = (boxes[:, axis, None] * (1 - share) + boxes[:, axis + 3, None] * share) * last
            inside = (position >= 0) & (position <= last)
            positions.append(torch.where(inside, position, 0).to(image.dtype))
            along.append(inside)
        return cls(image, boxes, box_index.long().contiguous(), tuple(positions), tuple(along))

    @property
    def inside(self) -> Tensor:
        """Whether a sample is inside along all axes; bool[N, ch, cw, cd, 1]."""
        i, j, k = self.along
        return (i[:, :, None, None] & j[:, None, :, None] & k[:, None, None, :])[..., None]

    def values(self) -> Tensor:
        """Trilinear values, as sums of the eight voxels around."""
        if self.image.shape[4] == 0:  # embedding_bag refuses vectors of no length
            return self.image.new_empty((*self._shape, 0))
        rows = torch.stack([self._rows(corner) for corner in _CORNERS], -1)
        weights = torch.stack([self._weights(corner) for corner in _CORNERS], -1)
        flat = embedding_bag(rows, self.image.flatten(0, 3), mode="sum", per_sample_weights=weights)
        return flat.view(*self._shape, self.image.shape[4])

    def nearest_values(self) -> Tensor:
        """Values of the nearest voxels, in a tie of the farther one."""
        return self.image.flatten(0, 3)[self._nearest_rows()].view(*self._shape, self.image.shape[4])

    def gradient_to_image(self, grad: Tensor, nearest: bool) -> Tensor:
        """Every sample's gradient, added to the voxels that it came from; in the shape of the image."""
        batch, *extent, channels = self.image.shape
        if nearest:
            flat = torch.zeros_like(self.image, memory_format=torch.contiguous_format).flatten(0, 3)
            return flat.index_add_(0, self._nearest_rows(), self._cut(grad)).view(self.image.shape)
        part = self._cut(grad).view(*self._shape, channels).permute(0, 4, 1, 2, 3)
        _, height, width, depth = self._shape
        grid = RoIGrid((height, width, depth), (1.0, 1.0, 1.0), 1)
        spread: Tensor = kernels(self.image.device).roi_align_transposed(
            part, self._regions(), self.box_index, grid, (batch, channels, *extent)
        )
        return spread.permute(0, 2, 3, 4, 1).contiguous()

    def gradient_to_boxes(self, grad: Tensor) -> Tensor:
        """Slope of the trilinear values along the corners [N, 6]; on a voxel it is 0, as in the predecessor."""
        slopes = [torch.zeros_like(position) for position in self.positions]
        flat, part = self.image.flatten(0, 3), self._cut(grad)
        for corner in _CORNERS:
            share = (part * flat[self._rows(corner)]).sum(1)
            for axis, slope in enumerate(slopes):
                signed = share if corner[axis] else -share
                weighted = (signed * self._weights(corner, but=axis)).view(self._shape)
                slope += weighted.sum([a + 1 for a in range(3) if a != axis])
        columns = []
        for second, (axis, slope) in product((False, True), enumerate(slopes)):
            share = _share(self.boxes, slope.shape[1])
            in_voxels = torch.where(self.along[axis], slope, 0).to(self.boxes.dtype) * (self.image.shape[axis + 1] - 1)
            columns.append((in_voxels * (share if second else 1 - share)).sum(1))
        return torch.stack(columns, 1)

    def _regions(self) -> Tensor:
        """Boxes [N, 6] in whose bins RoIAlign's single samples are these; a bin is a step, its middle a sample."""
        sides: list[list[Tensor]] = [[], []]
        for axis, count in enumerate(self._shape[1:]):
            first, second = (self.boxes[:, axis + 3 * side] * (self.image.shape[axis + 1] - 1) for side in (0, 1))
            step = second - first if count == 1 else (second - first) / (count - 1)
            low = first + 0.5 if count == 1 else first - step / 2 + 0.5  # the centre of voxel 0 is at one half
            sides[0].append(low)
            sides[1].append(low + count * step)
        return torch.stack(sides[0] + sides[1], 1).to(self.image.dtype).contiguous()

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self.boxes), *(position.shape[1] for position in self.positions))

    def _cut(self, grad: Tensor) -> Tensor:
        """Gradients of the samples inside, one row each; the others give nothing."""
        return torch.where(self.inside, grad, 0).reshape(self._shape[0] * self._per_crop, self.image.shape[4])

    @property
    def _per_crop(self) -> int:
        _, i, j, k = self._shape
        return i * j * k

    def _rows(self, corner: tuple[int, ...]) -> Tensor:
        """For every sample, the row of one of its eight voxels in ``image.flatten(0, 3)``."""
        return self._rows_of([p.ceil() if up else p.floor() for p, up in zip(self.positions, corner, strict=True)])

    def _nearest_rows(self) -> Tensor:
        """Not ``floor(position + 0.5)``: for the float just below one half that sum rounds up to 1."""
        return self._rows_of([p.floor() + (p - p.floor() >= 0.5) for p in self.positions])

    def _rows_of(self, cells: list[Tensor]) -> Tensor:
        i, j, k = (cell.long() for cell in cells)
        _, height, width, depth, _ = self.image.shape
        plane = ((self.box_index[:, None] * height + i)[:, :, None] * width + j[:, None]) * depth
        return (plane[..., None] + k[:, None, None]).flatten()

    def _weights(self, corner: tuple[int, ...], but: int | None = None) -> Tensor:
        """For every sample, the weight of one of its eight voxels; ``but`` leaves an axis out."""
        product_of_axes = self.image.new_ones(())
        for axis, (position, up) in enumerate(zip(self.positions, corner, strict=True)):
            share = position - position.floor()
            weight = torch.ones_like(share) if axis == but else share if up else 1 - share
            shape = [len(position), 1, 1, 1]
            shape[axis + 1] = position.shape[1]
            product_of_axes = product_of_axes * weight.view(shape)
        return product_of_axes.flatten()


def _share(boxes: Tensor, count: int) -> Tensor:
    """Way from the first to the second corner at each sample.

    The corners are weighted with it rather than stepped between, so that the last sample falls exactly on the second.
    """
    if count == 1:
        return boxes.new_full((1,), 0.5)
    return torch.arange(count, device=boxes.device, dtype=boxes.dtype) / (count - 1)
