"""What a user can check on their own machine: what is installed, and whether it computes what it should.

The five operations of the detector are compared with references that follow their definitions voxel by voxel in plain
Python, slowly and on tiny inputs, in every way that this machine has of computing them.
"""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch

from napari_mrcnn3d import __version__, _ops
from napari_mrcnn3d._ops import _backends, _cpu, _cuda, _torch
from napari_mrcnn3d.config import EmbryoConfig, ModelConfig, SelectConfig
from napari_mrcnn3d.data.embryo import embryo_image
from napari_mrcnn3d.device import choose_device, free_memory
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.metrics.matching import matching
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Target
from napari_mrcnn3d.model.weights import available_models, load_model, read_header, save_model
from napari_mrcnn3d.structures import Volume

__all__ = ["Check", "facts", "run_checks"]

_NUCLEI = "embryo-nuclei"
_LEAST_F1 = 0.5
"""What the bundled network must reach on a synthetic embryo; wrong weights or kernels find next to nothing."""
_SAME_NUCLEUS = 0.2
"""IoU from which a nucleus counts as found: the network draws nuclei as large as people do, beyond their true edge."""


@dataclass(frozen=True)
class Check:
    """One check and how it went.

    Attributes
    ----------
    name : str
        What was checked.
    seconds : float
    problem : str or None
        None if all is well.
    remark : str
        A figure, or the problem.
    """

    name: str
    seconds: float
    problem: str | None
    remark: str


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of everything worth knowing in a bug report."""
    yield "napari-mrcnn3d", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in ("torch", "numpy", "scipy", "scikit-image", "tifffile", "monai"):
        yield name, version(name)
    device = choose_device()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield "device", f"{device} ({chip}, {torch.get_num_threads()} threads, {free_memory(device) / 1e9:.1f} GB free)"
    for place in _devices():
        yield f"operations on {place.type}", _backends.describe(place)
    if device.type != "cuda":
        yield "operations on cuda", f"not used: {_cuda.problem(torch.device('cuda')) or 'another device is.'}"
    models = available_models()
    if not models:
        yield "models", "none in this installation"
    for name, path in models.items():
        header = read_header(path)
        size = header.config.voxel_size
        yield (
            f"model {name}",
            (
                f"{path.stat().st_size / 1e6:.1f} MB; finds {', '.join(header.config.class_names)}; "
                f"voxel size {' x '.join(f'{s:g}' for s in size) + ' µm' if size else 'free'}; {path}"
            ),
        )


def run_checks() -> Iterator[Check]:
    """Run all checks one after the other; each is yielded when it is done."""
    checks: list[tuple[str, Callable[[], str]]] = [
        (f"{name}, {way.name}", partial(way.run, check)) for way in _ways() for name, check in way.checks.items()
    ]
    checks += [("a training step", _check_training_step), ("writing and reading a model file", _check_model_file)]
    if _NUCLEI in available_models():
        checks.append((f"segmenting a synthetic embryo with {_NUCLEI}", _check_segmentation))
    for name, check in checks:
        start = time.perf_counter()
        try:
            remark, problem = check(), None
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the user wants to know
            problem = remark = f"{type(error).__name__}: {error}"
        yield Check(name, time.perf_counter() - start, problem, remark)


def _devices() -> list[torch.device]:
    """Where this machine computes: its processor, and what else the program would choose."""
    return list(dict.fromkeys([torch.device("cpu"), choose_device()]))


@dataclass(frozen=True)
class _Way:
    """A way to compute the operations: on which device, and with which of its kernels."""

    name: str
    device: torch.device
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def checks(self) -> dict[str, Callable[[_Way], str]]:
        """What this way computes itself: compiled kernels leave some operations to PyTorch."""
        return _COMPILED if self.kernels is not _backends.plain_torch else _COMPILED | _ALWAYS_PYTORCH

    def run(self, check: Callable[[_Way], str]) -> str:
        with self.kernels():
            return check(self)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Put an array where this way computes."""
        return torch.from_numpy(array).to(self.device)


def _ways() -> Iterator[_Way]:
    """All ways of this machine, the one it would choose first."""
    for device in _devices():
        place = "" if device.type == "cpu" else f" on {device}"
        used = _backends.kernels(device)
        if used is not _torch:
            yield _Way(f"compiled{place}", device)
        if used is _cpu:
            yield _Way("compiled for any processor", device, _cpu.baseline)
        yield _Way(f"PyTorch{place}", device, _backends.plain_torch)


class _WrongResult(Exception):
    """A check computed something else than it should."""


def _compare(result: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> str:
    """Largest difference, in words.

    Raises
    ------
    _WrongResult
        If it is larger than the tolerance.
    """
    found = result.detach().cpu().numpy().astype(np.float64)
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
    if not difference <= tolerance or not expected.any():
        raise _WrongResult(f"differs from the reference by {difference:.3g}")
    return f"largest difference {difference:.1g}"


# --- operations


def _random_boxes(rng: np.random.Generator, count: int, extent: float) -> np.ndarray:
    """Boxes of 2 voxels and more that partly leave a cube of this side; float32[count, 6]."""
    start = rng.uniform(-2, extent - 3, (count, 3))
    return np.hstack([start, start + rng.uniform(2, extent / 2, (count, 3))]).astype(np.float32)


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    shared = math.prod(max(0.0, min(a[k + 3], b[k + 3]) - max(a[k], b[k])) for k in range(3))
    volumes = [math.prod(box[k + 3] - box[k] for k in range(3)) for box in (a, b)]
    return shared / (sum(volumes) - shared)


def _value_at(grid: np.ndarray, point: Sequence[float]) -> float:
    """Trilinear interpolation at a point in cells, beyond the outer cell centres their value."""
    inside = [min(max(p, 0.0), n - 1.0) for p, n in zip(point, grid.shape, strict=True)]
    low = [min(int(p), max(n - 2, 0)) for p, n in zip(inside, grid.shape, strict=True)]
    value = 0.0
    for corner in product((0, 1), repeat=3):
        weight = math.prod(1 - abs(p - a - c) for p, a, c in zip(inside, low, corner, strict=True))
        if weight > 0:
            value += weight * float(grid[tuple(a + c for a, c in zip(low, corner, strict=True))])
    return value


def _check_box_iou(way: _Way) -> str:
    rng = np.random.default_rng(0)
    a, b = _random_boxes(rng, 12, 20), _random_boxes(rng, 9, 20)
    expected = np.array([[_iou(p.tolist(), q.tolist()) for q in b] for p in a])
    return _compare(_ops.box_iou_3d(way.tensor(a), way.tensor(b)), expected)


def _check_nms(way: _Way) -> str:
    rng = np.random.default_rng(0)
    boxes, scores = _random_boxes(rng, 60, 7), rng.random(60).astype(np.float32)
    kept: list[int] = []
    for row in np.argsort(-scores).tolist():
        if all(_iou(boxes[row].tolist(), boxes[other].tolist()) <= 0.3 for other in kept):
            kept.append(row)
    found = _ops.nms_3d(way.tensor(boxes), way.tensor(scores), 0.3)
    if found.tolist() != kept:
        raise _WrongResult("keeps other boxes than the reference")
    return f"{len(kept)} of {len(boxes)} boxes kept"


def _check_roi_align(way: _Way) -> str:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 1, 6, 9, 8)).astype(np.float32)
    boxes, size, scale = _random_boxes(rng, 5, 14), (2, 3, 2), (0.5, 0.75, 0.5)
    expected = np.zeros((len(boxes), 1, *size))
    for k, bin_ in product(range(len(boxes)), product(*map(range, size))):
        point = []
        for axis in range(3):
            low, high = (float(boxes[k, axis + side]) * scale[axis] - 0.5 for side in (0, 3))
            point.append(low + (bin_[axis] + 0.5) * (high - low) / size[axis])
        if all(-1 <= p <= n for p, n in zip(point, features.shape[2:], strict=True)):
            expected[(k, 0, *bin_)] = _value_at(features[0, 0], point)
    index = way.tensor(np.zeros(len(boxes), np.int64))
    found = _ops.roi_align_3d(way.tensor(features), way.tensor(boxes), index, output_size=size, spatial_scale=scale)
    return _compare(found, expected)


def _check_crop_and_resize(way: _Way) -> str:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 5, 6, 7, 1)).astype(np.float32)
    boxes, size = rng.uniform(-0.2, 1.2, (5, 6)).astype(np.float32), (3, 2, 4)
    expected = np.zeros((len(boxes), *size, 1))
    for k, cell in product(range(len(boxes)), product(*map(range, size))):
        last = [n - 1 for n in image.shape[1:4]]
        share = [c / (n - 1) for c, n in zip(cell, size, strict=True)]
        point = [(boxes[k, a] * (1 - share[a]) + boxes[k, a + 3] * share[a]) * last[a] for a in range(3)]
        if all(0 <= p <= n for p, n in zip(point, last, strict=True)):
            expected[(k, *cell, 0)] = _value_at(image[0, ..., 0], point)
    index = way.tensor(np.zeros(len(boxes), np.int64))
    return _compare(_ops.crop_and_resize_3d(way.tensor(image), way.tensor(boxes), index, size), expected)


def _check_paste_masks(way: _Way) -> str:
    rng = np.random.default_rng(0)
    masks, boxes, shape = rng.random((4, 3, 4, 4)).astype(np.float32) ** 0.5, _random_boxes(rng, 4, 10), (9, 10, 8)
    scores = np.array([0.9, 0.2, 0.7, 0.5], np.float32)
    expected = np.zeros(shape)
    for k in np.argsort(scores).tolist():  # the best comes last and wins
        for voxel in product(*map(range, shape)):
            share = [(v + 0.5 - boxes[k, a]) / (boxes[k, a + 3] - boxes[k, a]) for a, v in enumerate(voxel)]
            point = [s * n - 0.5 for s, n in zip(share, masks.shape[1:], strict=True)]
            if all(0 <= s < 1 for s in share) and _value_at(masks[k], point) >= 0.5:
                expected[voxel] = k + 1
    labels = way.tensor(np.arange(1, len(masks) + 1))
    found = _ops.paste_masks_3d(way.tensor(masks), way.tensor(boxes), labels, way.tensor(scores), shape=shape)
    if int((found.cpu().numpy() != expected).sum()) > 1:  # a voxel on the very edge may go either way
        raise _WrongResult("paints other voxels than the reference")
    return f"{int((expected > 0).sum())} voxels painted"


_COMPILED: dict[str, Callable[[_Way], str]] = {
    "suppression of duplicates": _check_nms,
    "pooling of regions (RoIAlign)": _check_roi_align,
    "painting of masks": _check_paste_masks,
}
_ALWAYS_PYTORCH: dict[str, Callable[[_Way], str]] = {
    "box overlaps": _check_box_iou,
    "pooling of regions (crop and resize)": _check_crop_and_resize,
}


# --- network


def _tiny_model() -> MaskRCNN3D:
    """Network of the usual kind with hardly any channels, the same every time, untrained."""
    config = ModelConfig(
        stem_channels=8,
        stage_channels=(8, 8, 8, 8),
        stage_blocks=(1, 1, 1, 1),
        fpn_channels=8,
        rpn_channels=8,
        rpn_pre_nms_top_n=50,
        rpn_post_nms_top_n=20,
        box_head_channels=(8,),
        box_head_features=16,
        mask_head_channels=(8,),
        max_candidates=10,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return MaskRCNN3D(config)


def _check_training_step() -> str:
    """One step on one object: every loss and every gradient is a number, and the network learns something."""
    device = choose_device()
    model = _tiny_model().to(device).train()
    labels = torch.zeros((16, 32, 32), dtype=torch.int64, device=device)
    labels[4:12, 8:24, 8:24] = 1
    one = torch.ones(1, dtype=torch.int64, device=device)
    target = Target(torch.tensor([[4.0, 8, 8, 12, 24, 24]], device=device), one, one, labels)
    losses = model.loss((labels > 0).float()[None, None], [target])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not torch.isfinite(total) or not all(torch.isfinite(g).all() for g in gradients):
        raise _WrongResult("losses or gradients are no finite numbers")
    if not any(bool(g.any()) for g in gradients):
        raise _WrongResult("no gradient reaches the network")
    return f"loss {float(total.detach()):.2f}"


def _check_model_file() -> str:
    """A network that went through a file answers as before, to the precision of the file."""
    model = _tiny_model().eval().half().float()
    with tempfile.TemporaryDirectory(prefix="mrcnn3d-") as folder:
        path = save_model(model, Path(folder) / "tiny.safetensors", {"purpose": "self-test"})
        again = load_model(path)
        size = path.stat().st_size
    image = torch.linspace(0, 1, 8 * 16 * 16).reshape(1, 1, 8, 16, 16)
    with torch.inference_mode():
        for before, after in zip(model.pyramid(image), again.pyramid(image), strict=True):
            _compare(after, before.numpy().astype(np.float64), 1e-4)
    return f"{size / 1e3:.0f} kB"


def _check_segmentation() -> str:
    """A synthetic embryo is segmented about as well as it should be."""
    embryo = embryo_image(EmbryoConfig(), 0)
    predictor = Predictor(load_model(_NUCLEI), device="auto")
    candidates = predictor.predict(Volume(embryo.image, embryo.voxel_size, "synthetic embryo"))
    footprints = Footprints.of(candidates)
    labels = paint(footprints, select(footprints, SelectConfig()))
    found = matching(embryo.labels, labels, thresh=_SAME_NUCLEUS)
    remark = f"{found.tp} of {found.n_true} nuclei found, {found.fp} invented"
    if found.f1 < _LEAST_F1:
        raise _WrongResult(f"only {remark}")
    return remark
