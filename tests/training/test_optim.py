"""Learning rate, optimisers, averaged weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_mrcnn3d.config import TrainConfig
from napari_mrcnn3d.training.optim import averaged, learning_rate, make_optimizer
from tests._tiny import tiny_model
from tests.ops.helpers import few


@few
@given(share=st.floats(0, 1.1), warmup=st.floats(0, 1), schedule=st.sampled_from(["cosine", "constant"]))
def test_the_rate_stays_between_nothing_and_its_peak(share: float, warmup: float, schedule: str) -> None:
    config = TrainConfig(warmup=warmup, schedule=schedule, learning_rate=0.1)
    assert 0 <= learning_rate(config, share) <= 0.1


def test_the_rate_rises_falls_like_a_cosine_and_ends_at_nothing() -> None:
    config = TrainConfig(warmup=0.2, learning_rate=1.0)
    rates = [learning_rate(config, s) for s in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])


def test_the_predecessors_rate_never_changes() -> None:
    config = TrainConfig(warmup=0.0, schedule="constant", learning_rate=1e-3)
    assert {learning_rate(config, s) for s in (0.0, 0.3, 1.0)} == {1e-3}


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_every_weight_is_optimised_once_and_only_kernels_decay(name: str, kind: type[torch.optim.Optimizer]) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    assert isinstance(optimizer, kind)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    for key, parameter in model.named_parameters():
        assert decay[parameter] == (0.3 if key.endswith("weight") and parameter.ndim > 1 else 0.0), key


def test_the_average_follows_the_weights_slowly() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = averaged(model, 0.9)
    expected = None
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0
