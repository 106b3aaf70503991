"""A training step of the `small` preset: memory layout and precision, and what share of it is not convolution."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import cyclopts
import numpy as np
import torch
from _machine import markdown_table, write_results
from torch.profiler import ProfilerActivity, profile

from napari_mrcnn3d.config import DataConfig, EmbryoConfig, preset
from napari_mrcnn3d.data.augment import augment
from napari_mrcnn3d.data.embryo import embryo_image
from napari_mrcnn3d.data.patches import Patch, PatchSampler, TrainingVolume
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Target
from napari_mrcnn3d.model.transform import intensity_range, normalize
from napari_mrcnn3d.training.anchor_tuning import fit_model, fit_patch

# oneDNN and BLAS do these; all else is glue that a better program would not need.
HEAVY = ("convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
WAYS = {
    "float32, channels first": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last_3d),
    "bfloat16, channels first": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last (used)": (torch.bfloat16, torch.channels_last_3d),
}


def main(*, repeats: int = 7) -> None:
    """Time one training step in four ways, profile the one that is used; bench/results/training_step.json and .md.

    Parameters
    ----------
    repeats
        Steps counted for each way, after one that is not.
    """
    patches, patch_seconds, config = _patches(repeats + 1)
    rows, results = [], []
    for name, (dtype, layout) in WAYS.items():
        seconds = _time(config, patches, dtype, layout)
        rows.append([name, median(seconds), min(seconds), max(seconds)])
        results.append({"way": name, "seconds": seconds})
    shares = _profile(config, patches[:3])
    text = "One training step, seconds; patch of " + " x ".join(map(str, patches[0].image.shape)) + " voxels.\n\n"
    text += markdown_table(["layout and precision", "median", "min", "max"], rows)
    text += f"\nCutting and varying a patch: {median(patch_seconds):.3f} s (median of {len(patch_seconds)}).\n\n"
    text += markdown_table(["self time by operation", "share"], [[k, v] for k, v in shares.items()])
    write_results("training_step", {"ways": results, "patch_seconds": patch_seconds, "shares": shares}, text)


def _patches(count: int) -> tuple[list[Patch], list[float], Any]:
    """Patches of a synthetic embryo, the seconds each took, and the network fitted to it."""
    image = embryo_image(EmbryoConfig(shape=(51, 125, 125)), 0)
    model, _, _ = preset("small")
    prepared = normalize(image.image, intensity_range(image.image, model.intensity_percentiles))
    classes = np.ones(int(image.labels.max()) + 1, np.int64)
    volume = TrainingVolume(prepared, image.labels.astype(np.int32), classes)
    config = fit_model(
        model.model_copy(update={"voxel_size": image.voxel_size}), volume.boxes[:, 3:] - volume.boxes[:, :3]
    )
    size = fit_patch(config, [prepared.shape])
    sampler = PatchSampler([volume], DataConfig(), size=size, seed=0, length=count + 1, augment=augment)
    sampler[count]  # the first one imports the library
    patches, seconds = [], []
    for index in range(count):
        start = time.perf_counter()
        patches.append(sampler[index])
        seconds.append(time.perf_counter() - start)
    return patches, seconds, config


def _step(model: MaskRCNN3D, optimizer: torch.optim.Optimizer, patch: Patch, dtype: torch.dtype) -> None:
    arrays = (patch.boxes, patch.classes, patch.ids, patch.labels)
    target = Target(*(torch.from_numpy(a) for a in arrays))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model.loss(torch.from_numpy(patch.image)[None, None], [target])
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()


def _network(config: Any, layout: torch.memory_format) -> tuple[MaskRCNN3D, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MaskRCNN3D(config).to(memory_format=layout)
    if layout == torch.contiguous_format:
        # The network itself asks for channels last; here the other layout is wanted.
        model.backbone.stem.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model, torch.optim.AdamW(model.parameters(), 1e-4)


def _time(config: Any, patches: list[Patch], dtype: torch.dtype, layout: torch.memory_format) -> list[float]:
    model, optimizer = _network(config, layout)
    seconds = []
    for patch in patches:
        start = time.perf_counter()
        _step(model, optimizer, patch, dtype)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _profile(config: Any, patches: list[Patch]) -> dict[str, float]:
    """Share of the self time of convolutions and matrix products, and of the five largest other operations."""
    model, optimizer = _network(config, torch.channels_last_3d)
    _step(model, optimizer, patches[0], torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for patch in patches:
            _step(model, optimizer, patch, torch.bfloat16)
    times = {event.key: float(event.self_cpu_time_total) for event in recorded.key_averages()}
    total = sum(times.values())
    heavy = {key for key in times if any(name in key for name in HEAVY)}
    others = sorted(set(times) - heavy, key=lambda key: -times[key])[:8]
    shares = {"convolutions and matrix products": sum(times[k] for k in heavy) / total}
    return shares | {key: times[key] / total for key in others}


if __name__ == "__main__":
    cyclopts.run(main)
