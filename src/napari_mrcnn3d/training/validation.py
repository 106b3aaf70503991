"""How good the network is on images it does not learn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from napari_mrcnn3d.config import PredictConfig, SelectConfig, TrainConfig
from napari_mrcnn3d.data.volumes import LabelledVolume
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.metrics.matching import matching_dataset
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.structures import Candidates, Progress, Steps, Volume

__all__ = ["validate_steps"]


def _as_validation(steps: Steps[Candidates], index: int, count: int) -> Steps[Candidates]:
    """The steps of volume ``index`` of ``count``, reported as parts of the validation."""
    while True:
        try:
            part = next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        yield Progress(index * part.total + part.done, count * part.total, "Validating")


def validate_steps(
    model: MaskRCNN3D, volumes: Sequence[LabelledVolume], config: TrainConfig
) -> Steps[dict[str, float]]:
    """Segment volumes with the default selection and compare with their labels.

    Returns
    -------
    dict
        ``val_f1`` (F1 at IoU 0.5, all volumes pooled) and ``val_iou`` (mean IoU of the matches); empty without volumes.
    """
    if not volumes:
        return {}
    predictor = Predictor(copy.deepcopy(model), config.device)
    truth, found = [], []
    for index, volume in enumerate(volumes):
        steps = predictor.predict_steps(Volume(volume.image, volume.voxel_size, volume.name), PredictConfig())
        candidates = yield from _as_validation(steps, index, len(volumes))
        footprints = Footprints.of(candidates)
        found.append(np.asarray(paint(footprints, select(footprints, SelectConfig()))))
        truth.append(volume.labels)
    (result,) = matching_dataset(truth, found, (0.5,))
    return {"val_f1": float(result.f1), "val_iou": float(result.mean_matched_score)}
