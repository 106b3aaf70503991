"""The figures of a validation, with a model that makes no mistakes and one that sees nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_mrcnn3d.config import TrainConfig
from napari_mrcnn3d.data.volumes import LabelledVolume
from napari_mrcnn3d.structures import Progress, VoxelSize
from napari_mrcnn3d.training.validation import validate_steps
from tests._tiny import BlobModel, picture, tiny_config

CONFIG = TrainConfig(device="cpu")


def cuboids(count: int, drawn: int | None = None) -> LabelledVolume:
    """A volume of some objects that fill their boxes, of which the image shows the first ones."""
    labels = np.zeros((12, 20, 60), np.int32)
    for k in range(count):
        labels[2:10, 3:17, 3 + 14 * k : 13 + 14 * k] = k + 1
    image = picture(np.where(labels <= (count if drawn is None else drawn), labels, 0))
    return LabelledVolume(image, labels, np.r_[0, np.ones(count, np.int64)], VoxelSize(1, 1, 1), "a", "a")


def validate(volumes: list[LabelledVolume]) -> tuple[dict[str, float], list[Progress]]:
    model = BlobModel(tiny_config(intensity_percentiles=(0, 100))).train()
    steps, seen = validate_steps(model, volumes, CONFIG), []  # type: ignore[arg-type]
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            assert model.training  # the network that learns is not touched
            return stop.value, seen


def test_a_perfect_model() -> None:
    found, _ = validate([cuboids(4), cuboids(2)])
    assert found == {"val_f1": 1.0, "val_iou": 1.0}


def test_objects_of_all_volumes_count_alike() -> None:
    found, _ = validate([cuboids(4, drawn=2), cuboids(2)])
    assert found["val_f1"] == pytest.approx(2 * 4 / (2 * 4 + 2))
    assert found["val_iou"] == 1.0


def test_volumes_where_nothing_is_found() -> None:
    assert validate([cuboids(3, drawn=0)])[0]["val_f1"] == 0.0
    assert np.isfinite(validate([cuboids(0)])[0]["val_f1"])


def test_progress_goes_from_the_first_volume_to_the_last() -> None:
    _, seen = validate([cuboids(1), cuboids(2), cuboids(3)])
    shares = [step.done / step.total for step in seen]
    assert {step.stage for step in seen} == {"Validating"}
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_without_volumes_there_is_nothing_to_say() -> None:
    assert validate([]) == ({}, [])


def test_a_validation_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    validate([cuboids(2)])
    assert torch.equal(torch.rand(1), expected)
