"""Residual backbone with a stride per axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from napari_mrcnn3d.config import ModelConfig, Triple

__all__ = ["Affine", "ResNet3D", "conv3d", "norm3d"]


class Affine(nn.Module):
    """A learnt scale and shift per channel: what batch normalisation with frozen initial statistics amounts to."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x[N, C, D, H, W]``."""
        shape = (1, -1, 1, 1, 1)
        return x * self.weight.view(shape).to(x.dtype) + self.bias.view(shape).to(x.dtype)


def norm3d(kind: str, channels: int) -> nn.Module:
    """Normalisation that works for a batch of one: groups of eight channels, or a plain scale and shift."""
    if kind == "affine":
        return Affine(channels)
    groups = max(g for g in range(1, max(channels // 8, 1) + 1) if channels % g == 0)
    return _GroupNorm(groups, channels)


class _GroupNorm(nn.GroupNorm):
    """Group normalisation that goes through float32 where PyTorch's own bfloat16 is slow on processors.

    On two cores with AVX-512 (torch 2.13) bfloat16 takes six times as long backwards, and forwards eight times as
    long on the small maps of regions; forwards on whole volumes it is the faster one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        if x[0, 0].numel() < 2048:  # where PyTorch changes to another kernel
            return super().forward(x.float()).to(x.dtype)
        normal: Tensor = _GroupNormBF16.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return normal


class _GroupNormBF16(torch.autograd.Function):
    """Group normalisation of bfloat16 forwards, of float32 backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        sizes = len(x), x.shape[1], x[0, 0].numel(), groups
        normal, mean, scale = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.sizes = sizes
        return normal

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if last else torch.contiguous_format  # the kernel takes it for granted
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            grad.float().contiguous(memory_format=layout),
            x.float().contiguous(memory_format=layout),
            mean.float(),
            scale.float(),
            weight,
            *ctx.sizes,
            [True, True, True],
        )
        return to_x.to(x.dtype), to_weight, to_bias, None, None


def conv3d(inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), *, bias: bool = False) -> nn.Conv3d:
    """Convolution whose output cell ``i`` is centred on the middle of the ``stride`` input voxels it stands for.

    Kernels are odd. With stride 2 such a kernel is centred on the first of its two voxels, half a cell off what anchors
    and RoIAlign assume; along such axes it is made one longer. It is never shorter than its stride.
    """
    z, y, x = (max(k + (s % 2 == 0), s) if k > 1 else s for k, s in zip(kernel, stride, strict=True))
    front, top, left = ((k - s) // 2 for k, s in zip((z, y, x), stride, strict=True))
    return nn.Conv3d(inputs, outputs, (z, y, x), stride, (front, top, left), bias=bias)


class _BasicBlock(nn.Module):
    """Two 3³ convolutions and a shortcut (He et al. 2016, arXiv:1512.03385, fig. 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: Triple, norm: str) -> None:
        super().__init__()
        k = (3, 3, 3)
        self.body = nn.Sequential(
            conv3d(inputs, outputs, k, stride),
            norm3d(norm, outputs),
            nn.ReLU(inplace=True),
            conv3d(outputs, outputs, k),
            norm3d(norm, outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1³, 3³, 1³ convolutions and a shortcut (He et al. 2016, fig. 5 right)."""

    def __init__(self, inputs: int, outputs: int, stride: Triple, norm: str) -> None:
        super().__init__()
        inner, one = outputs // 4, (1, 1, 1)
        self.body = nn.Sequential(
            conv3d(inputs, inner, one),
            norm3d(norm, inner),
            nn.ReLU(inplace=True),
            conv3d(inner, inner, (3, 3, 3), stride),
            norm3d(norm, inner),
            nn.ReLU(inplace=True),
            conv3d(inner, outputs, one),
            norm3d(norm, outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: Triple, norm: str) -> nn.Module:
    if inputs == outputs and stride == (1, 1, 1):
        return nn.Identity()
    return nn.Sequential(conv3d(inputs, outputs, (1, 1, 1), stride), norm3d(norm, outputs))


class ResNet3D(nn.Module):
    """Residual network that gives the output of every stage.

    Parameters
    ----------
    config : ModelConfig
        ``block``, ``norm``, ``stem_*`` and ``stage_*`` are used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block = _BasicBlock if config.block == "basic" else _Bottleneck
        stem: list[nn.Module] = [
            conv3d(1, config.stem_channels, config.stem_kernel, config.stem_stride),
            norm3d(config.norm, config.stem_channels),
            nn.ReLU(inplace=True),
        ]
        if config.stem_pool:
            stem.append(nn.MaxPool3d(2))
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList()
        width = config.stem_channels
        for outputs, blocks, stride in zip(
            config.stage_channels, config.stage_blocks, config.stage_strides, strict=True
        ):
            layers = [block(width, outputs, stride, config.norm)]
            layers += [block(outputs, outputs, (1, 1, 1), config.norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*layers))
            width = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of each stage, finest first, for ``x[N, 1, D, H, W]`` whose extent the strides divide."""
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features
