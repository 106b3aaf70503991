"""The operations as PyTorch knows them (``torch.ops.mrcnn3d``): schema, shapes without values, gradients.

Python functions with documentation stand in front of them (``nms_3d`` and the others), kernels behind them
(``_backends``). This way they work under ``torch.compile``, with fake tensors, and in every autograd mode. They are
registered once for all devices; kernels that have no gradient of their own are reached below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from napari_mrcnn3d._ops import _crop_and_resize as _crop
from napari_mrcnn3d._ops import _torch
from napari_mrcnn3d._ops._backends import kernels
from napari_mrcnn3d._ops._torch import RoIGrid

_library = torch.library.Library("mrcnn3d", "DEF")
_INT32 = torch.iinfo(torch.int32)


def rank(scores: Tensor) -> Tensor:
    """Order by descending score: equal ones by ascending index, those that are no number last."""
    comparable = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(comparable, descending=True, stable=True).indices


def _grid(size: Sequence[int], scale: Sequence[float], samples: int) -> RoIGrid:
    (depth, height, width), (z, y, x) = size, scale
    return RoIGrid((depth, height, width), (z, y, x), samples)


def _precise(boxes: Tensor, values: Tensor) -> Tensor:
    """Boxes in the precision that values of this type are computed in."""
    return boxes.to(torch.promote_types(values.dtype, torch.float32)).contiguous()


# --- box_iou(a, b)


def _box_iou(a: Tensor, b: Tensor) -> Tensor:
    return _torch.box_iou(a, b)


def _box_iou_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


# --- nms(boxes, scores, iou_threshold, groups, max_keep)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, groups: Tensor | None, max_keep: int | None) -> Tensor:
    order = rank(scores)
    sorted_boxes = boxes[order].float().contiguous()
    sorted_groups = None if groups is None else groups[order].long()
    kept = kernels(boxes.device).nms_sorted(sorted_boxes, iou_threshold, sorted_groups, max_keep)
    return order[kept]


def _nms_fake(
    boxes: Tensor, scores: Tensor, iou_threshold: float, groups: Tensor | None, max_keep: int | None
) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


# --- roi_align(features, boxes, batch_index, output_size, spatial_scale, sampling_ratio), linear in the features


def _roi_align(
    features: Tensor, boxes: Tensor, batch_index: Tensor, size: Sequence[int], scale: Sequence[float], samples: int
) -> Tensor:
    result: Tensor = kernels(features.device).roi_align(
        features, _precise(boxes, features), batch_index.long().contiguous(), _grid(size, scale, samples)
    )
    return result


def _roi_align_fake(
    features: Tensor, boxes: Tensor, batch_index: Tensor, size: Sequence[int], scale: Sequence[float], samples: int
) -> Tensor:
    return features.new_empty((boxes.shape[0], *size, features.shape[1])).permute(0, 4, 1, 2, 3)


def _roi_align_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, batch_index, _, ctx.scale, ctx.samples = inputs
    ctx.shape = tuple(features.shape)
    ctx.save_for_backward(boxes, batch_index)


def _roi_align_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, batch_index = ctx.saved_tensors
    transposed = torch.ops.mrcnn3d.roi_align_transposed
    return transposed(grad, boxes, batch_index, ctx.shape, ctx.scale, ctx.samples), None, None, None, None, None


# --- roi_align_transposed(values, boxes, batch_index, shape, spatial_scale, sampling_ratio)


def _transposed(
    values: Tensor, boxes: Tensor, batch_index: Tensor, shape: Sequence[int], scale: Sequence[float], samples: int
) -> Tensor:
    grid = _grid(values.shape[2:], scale, samples)
    result: Tensor = kernels(values.device).roi_align_transposed(
        values, _precise(boxes, values), batch_index.long().contiguous(), grid, tuple(shape)
    )
    return result


def _transposed_fake(
    values: Tensor, boxes: Tensor, batch_index: Tensor, shape: Sequence[int], scale: Sequence[float], samples: int
) -> Tensor:
    batch, channels, *extent = shape
    return values.new_empty((batch, *extent, channels)).permute(0, 4, 1, 2, 3)


def _transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, boxes, batch_index, _, ctx.scale, ctx.samples = inputs
    ctx.size = tuple(values.shape[2:])
    ctx.save_for_backward(boxes, batch_index)


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, batch_index = ctx.saved_tensors
    forward = torch.ops.mrcnn3d.roi_align
    return forward(grad, boxes, batch_index, ctx.size, ctx.scale, ctx.samples), None, None, None, None, None


# --- crop_and_resize(image, boxes, box_index, crop_size, nearest, extrapolation_value)


def _crop_and_resize(
    image: Tensor, boxes: Tensor, box_index: Tensor, size: Sequence[int], nearest: bool, outside: float
) -> Tensor:
    if len(box_index) and not 0 <= int(box_index.min()) <= int(box_index.max()) < len(image):
        raise ValueError(f"box_index has values outside [0, batch_size), batch_size is {len(image)}")
    return _crop.forward(image, boxes, box_index, tuple(size), nearest, outside)


def _crop_and_resize_fake(
    image: Tensor, boxes: Tensor, box_index: Tensor, size: Sequence[int], nearest: bool, outside: float
) -> Tensor:
    return image.new_empty((boxes.shape[0], *size, image.shape[4]))


def _crop_and_resize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, boxes, box_index, _, ctx.nearest, _ = inputs
    ctx.save_for_backward(image, boxes, box_index)


def _crop_and_resize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.mrcnn3d.crop_and_resize_backward
    to_image, to_boxes = backward(grad, *ctx.saved_tensors, ctx.nearest, *ctx.needs_input_grad[:2])
    image_wants, boxes_want = ctx.needs_input_grad[:2]
    return to_image if image_wants else None, to_boxes if boxes_want else None, None, None, None, None


def _crop_gradients(
    grad: Tensor, image: Tensor, boxes: Tensor, box_index: Tensor, nearest: bool, of_image: bool, of_boxes: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to the image and to the boxes; the one that is not wanted is empty."""
    lattice = _crop.Lattice.of(image, boxes, box_index, (grad.shape[1], grad.shape[2], grad.shape[3]))
    to_image = lattice.gradient_to_image(grad, nearest) if of_image else image.new_empty(0)
    to_boxes = lattice.gradient_to_boxes(grad) if of_boxes else boxes.new_empty(0)
    return to_image, to_boxes


def _crop_gradients_fake(
    grad: Tensor, image: Tensor, boxes: Tensor, box_index: Tensor, nearest: bool, of_image: bool, of_boxes: bool
) -> tuple[Tensor, Tensor]:
    to_image = image.new_empty(image.shape if of_image else (0,))
    return to_image, boxes.new_empty(boxes.shape if of_boxes else (0,))


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep nothing."""


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("crop_and_resize_3d has no second derivative.")


# --- paste_masks(masks, boxes, labels, scores, shape, threshold)


def _paste_masks(
    masks: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, shape: Sequence[int], threshold: float
) -> Tensor:
    if len(labels) and not _INT32.min <= int(labels.min()) <= int(labels.max()) <= _INT32.max:
        raise ValueError("labels must fit int32")
    order = rank(scores)
    best_first = masks[order].to(torch.promote_types(masks.dtype, torch.float32)).contiguous()
    depth, height, width = shape
    volume: Tensor = kernels(masks.device).paste_masks(
        best_first, boxes[order], labels[order].to(torch.int32), (depth, height, width), threshold
    )
    return volume


def _paste_masks_fake(
    masks: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, shape: Sequence[int], threshold: float
) -> Tensor:
    return masks.new_empty(tuple(shape), dtype=torch.int32)


_ROI = "Tensor boxes, Tensor batch_index, SymInt[] {}, float[3] spatial_scale, int sampling_ratio"
_OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "box_iou(Tensor a, Tensor b) -> Tensor": (_box_iou, _box_iou_fake),
    "nms(Tensor boxes, Tensor scores, float iou_threshold, Tensor? groups, int? max_keep) -> Tensor": (
        _nms,
        _nms_fake,
    ),
    f"roi_align(Tensor features, {_ROI.format('output_size')}) -> Tensor": (_roi_align, _roi_align_fake),
    f"roi_align_transposed(Tensor values, {_ROI.format('shape')}) -> Tensor": (_transposed, _transposed_fake),
    "crop_and_resize(Tensor image, Tensor boxes, Tensor box_index, SymInt[] crop_size, bool nearest, "
    "float extrapolation_value) -> Tensor": (_crop_and_resize, _crop_and_resize_fake),
    "crop_and_resize_backward(Tensor grad, Tensor image, Tensor boxes, Tensor box_index, bool nearest, "
    "bool of_image, bool of_boxes) -> (Tensor, Tensor)": (_crop_gradients, _crop_gradients_fake),
    "paste_masks(Tensor masks, Tensor boxes, Tensor labels, Tensor scores, SymInt[] shape, "
    "float threshold) -> Tensor": (_paste_masks, _paste_masks_fake),
}
_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "roi_align": (_roi_align_backward, _roi_align_setup),
    "roi_align_transposed": (_transposed_backward, _transposed_setup),
    "crop_and_resize": (_crop_and_resize_backward, _crop_and_resize_setup),
    "crop_and_resize_backward": (_no_second_derivative, _no_setup),
}

for _schema, (_kernel, _fake) in _OPERATIONS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mrcnn3d::{_name}", _fake, lib=_library)
for _name, (_backward, _setup) in _GRADIENTS.items():
    torch.library.register_autograd(f"mrcnn3d::{_name}", _backward, setup_context=_setup, lib=_library)
