"""Optimiser, learning rate and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from napari_mrcnn3d.config import TrainConfig

__all__ = ["averaged", "learning_rate", "make_optimizer"]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Optimiser over all weights; biases and normalisation are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    one_pass = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=one_pass)


def learning_rate(config: TrainConfig, share: float) -> float:
    """Learning rate after this share of the run: a linear rise, then half a cosine down, or constant.

    Notes
    -----
    Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, a single period that ends at zero.
    """
    if share < config.warmup:
        return config.learning_rate * max(share / config.warmup, 0.01)
    if config.schedule == "constant":
        return config.learning_rate
    rest = min((share - config.warmup) / (1 - config.warmup), 1.0) if config.warmup < 1 else 1.0
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
