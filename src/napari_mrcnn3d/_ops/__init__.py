"""The five tensor operations of the detector that PyTorch does not have: one Python interface each, any device."""

from napari_mrcnn3d._ops import _library as _library  # registers torch.ops.mrcnn3d, which the functions call
from napari_mrcnn3d._ops.boxes import box_iou_3d
from napari_mrcnn3d._ops.crop_and_resize import crop_and_resize_3d
from napari_mrcnn3d._ops.nms import nms_3d
from napari_mrcnn3d._ops.paste_masks import paste_masks_3d
from napari_mrcnn3d._ops.roi_align import roi_align_3d

__all__ = ["box_iou_3d", "crop_and_resize_3d", "nms_3d", "paste_masks_3d", "roi_align_3d"]
