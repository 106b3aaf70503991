"""Settings: every one explained, checked, and kept in files."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from napari_mrcnn3d import config as module
from napari_mrcnn3d.config import DataConfig, ModelConfig, PredictConfig, SelectConfig, TrainConfig, preset
from tests._tiny import tiny_config

CONFIGS = [getattr(module, name) for name in module.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_setting_has_a_default_and_a_sentence(config: type[BaseModel]) -> None:
    assert config.__doc__
    for name, field in config.model_fields.items():
        assert not field.is_required(), name
        if name != "select":  # whose own settings are explained
            assert field.description, name
            assert field.description.endswith("."), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_settings_survive_a_file_and_are_not_changed(config: type[BaseModel]) -> None:
    default = config()
    assert config.model_validate_json(default.model_dump_json()) == default
    with pytest.raises(ValidationError, match="frozen"):
        setattr(default, next(iter(config.model_fields)), None)
    with pytest.raises(ValidationError, match="unheard_of"):
        config(unheard_of=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_blocks": (1, 1)}, "one entry per stage"),
        ({"stage_strides": ((1, 1, 1),)}, "one entry per stage"),
        ({"stage_channels": (), "stage_blocks": (), "stage_strides": ()}, "at least 1"),
        ({"stage_channels": (0, 8, 8)}, "greater than or equal to 1"),
        ({"rpn_levels": (1,)}, "one group per level"),
        ({"rpn_extra_level": True}, "one group per level"),
        ({"anchor_sizes": ((), ())}, "at least one anchor"),
        ({"anchor_sizes": (((4, 4, 4),), ())}, "at least one anchor"),
        ({"anchor_sizes": (((0, 4, 4),), ((8, 8, 8),))}, "greater than 0"),
        ({"rpn_levels": (), "anchor_sizes": ()}, "levels of 0..2"),
        ({"rpn_levels": (1, 3)}, "levels of 0..2"),
        ({"rpn_levels": (-1, 1)}, "levels of 0..2"),
        ({"roi_levels": (0, 5)}, "levels of 0..2"),
        ({"roi_levels": ()}, "neighbours"),
        ({"roi_levels": (0, 2)}, "neighbours"),  # a region of level 1 would be pooled from nowhere
        ({"roi_levels": (1, 0)}, "neighbours"),
        ({"stem_kernel": (3, 4, 3)}, "odd"),
        ({"stem_stride": (1, 0, 1)}, "greater than or equal to 1"),
        ({"intensity_percentiles": (50, 50)}, "rise"),
        ({"intensity_percentiles": (-1, 50)}, "rise"),
        ({"voxel_size": (1, 1, 0)}, "greater than 0"),
        ({"voxel_size": (1, 1, float("inf"))}, "finite"),
        ({"class_names": ()}, "at least 1"),
        ({"score_floor": 1.5}, "less than or equal to 1"),
        ({"norm": "batch"}, "group"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (PredictConfig, {"tile": (0, 8, 8)}),
        (PredictConfig, {"overlap": (-1, 0, 0)}),
        (PredictConfig, {"object_size": 0}),
        (DataConfig, {"patch_size": (8, 8, 0)}),
        (TrainConfig, {"ema": 1.0}),
        (TrainConfig, {"learning_rate": float("nan")}),
        (SelectConfig, {"min_score": 2}),
    ],
)
def test_values_out_of_range_are_refused(config: type[BaseModel], changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


def test_strides_multiply_from_level_to_level() -> None:
    assert tiny_config().level_strides == ((1, 2, 2), (2, 4, 4), (4, 8, 8))
    assert tiny_config(stem_pool=True).level_strides == ((2, 4, 4), (4, 8, 8), (8, 16, 16))


def test_what_follows_from_other_settings() -> None:
    config = ModelConfig(class_names=("a", "b"), mask_pool_size=(4, 5, 6))
    assert config.num_classes == 3
    assert config.mask_size == (8, 10, 12)


def test_presets_are_consistent_and_differ() -> None:
    small, seed = preset("small"), preset("seed")
    assert small == (ModelConfig(), DataConfig(), TrainConfig())
    for config in (*small, *seed):
        assert type(config).model_validate(config.model_dump()) == config
    assert seed[0].level_strides == ((4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32))
    assert seed[2].optimizer == "sgd"
    with pytest.raises(ValueError, match=r"no preset 'large'"):
        preset("large")
