"""A training step and a prediction of `small`: layouts and precisions, and what share of either is not convolution."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import cyclopts
import numpy as np
import torch
from _machine import markdown_table, write_results
from torch.profiler import ProfilerActivity, profile

from napari_mrcnn3d._ops import _backends
from napari_mrcnn3d.config import DataConfig, EmbryoConfig, TrainConfig, preset
from napari_mrcnn3d.data.augment import augment
from napari_mrcnn3d.data.embryo import embryo_image
from napari_mrcnn3d.data.patches import Patch, PatchSampler, TrainingVolume
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Target
from napari_mrcnn3d.model.transform import intensity_range, normalize
from napari_mrcnn3d.model.weights import load_model
from napari_mrcnn3d.structures import Volume
from napari_mrcnn3d.training.anchor_tuning import fit_model, fit_patch
from napari_mrcnn3d.training.optim import make_optimizer

# oneDNN and BLAS do these; all else is glue that a better program would not need.
HEAVY = ("convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
WAYS = {
    "float32, channels first": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last_3d),
    "bfloat16, channels first": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last (used)": (torch.bfloat16, torch.channels_last_3d),
}


def main(*, repeats: int = 7) -> None:
    """Time a training step in four ways and a prediction, profile both; bench/results/detector.json and .md.

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
    predict = _prediction(config)
    seconds = [_seconds(predict) for _ in range(repeats + 1)][1:]
    rows.append(["prediction, bfloat16, channels last", median(seconds), min(seconds), max(seconds)])
    results.append({"way": "prediction", "seconds": seconds})
    shares = {"training step": _shares(_training(config, patches)), "prediction": _shares(predict)}
    text = "Seconds; patch and image of " + " x ".join(map(str, patches[0].image.shape)) + " voxels.\n\n"
    text += markdown_table(["layout and precision", "median", "min", "max"], rows)
    text += f"\nCutting and varying a patch: {median(patch_seconds):.3f} s (median of {len(patch_seconds)}).\n"
    text += f"Operations: {_backends.describe(torch.device('cpu'))}.\n"
    for what, share in shares.items():
        text += "\n" + markdown_table([f"self time of a {what}", "share"], [[k, v] for k, v in share.items()])
    content = {"ways": results, "patch_seconds": patch_seconds, "shares": shares}
    write_results("detector", content, text)


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
    return model, make_optimizer(model, TrainConfig())


def _time(config: Any, patches: list[Patch], dtype: torch.dtype, layout: torch.memory_format) -> list[float]:
    model, optimizer = _network(config, layout)
    return [_seconds(partial(_step, model, optimizer, patch, dtype)) for patch in patches][1:]


def _training(config: Any, patches: list[Patch]) -> Callable[[], None]:
    """A step on one patch after the other."""
    model, optimizer = _network(config, torch.channels_last_3d)
    turn = cycle(patches)
    return lambda: _step(model, optimizer, next(turn), torch.bfloat16)


def _prediction(config: Any) -> Callable[[], object]:
    """Candidates of a synthetic embryo, found by the network that comes with the package."""
    image = embryo_image(EmbryoConfig(shape=(51, 125, 125)), 0)
    predictor = Predictor(load_model("embryo-nuclei"), device="cpu")
    volume = Volume(image.image, image.voxel_size, "synthetic embryo")
    return lambda: predictor.predict(volume)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _shares(work: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Share of the self time of convolutions and matrix products, and of the eight largest other operations."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            work()
    times = {event.key: float(event.self_cpu_time_total) for event in recorded.key_averages()}
    total = sum(times.values())
    heavy = {key for key in times if any(name in key for name in HEAVY)}
    others = sorted(set(times) - heavy, key=lambda key: -times[key])[:8]
    shares = {"convolutions and matrix products": sum(times[k] for k in heavy) / total}
    return shares | {key: times[key] / total for key in others}


if __name__ == "__main__":
    cyclopts.run(main)
