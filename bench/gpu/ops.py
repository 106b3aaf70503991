"""The 3D operations on a CUDA card: whether they are right, how fast, and how near to what its memory allows.

One command, also from a source tree that is not installed: ``python bench/gpu/ops.py``. Needs PyTorch, NumPy, psutil
and NVIDIA's cuda-core; pytest for the tests, torchvision and Nsight Compute (ncu) for the comparisons. A part that
fails is written down and the others go on. Keeps bench/results/gpu_ops.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import torch  # noqa: E402
from _machine import markdown_table, write_results  # noqa: E402
from torch import Tensor  # noqa: E402

from napari_mrcnn3d._ops import _cuda, _torch  # noqa: E402
from napari_mrcnn3d._ops._torch import RoIGrid  # noqa: E402

log = logging.getLogger("gpu_ops")

CARD = torch.device("cuda", 0)
CHANNELS, EXTENT, SCALE = 256, 32, 0.25  # features, and their cells per voxel
NMS_CASES = ((2000, 0.3), (2000, 0.7), (6000, 0.3), (6000, 0.7), (20_000, 0.3), (20_000, 0.7), (200_000, 0.3))
ROI_CASES = ((1000, 7, 1), (1000, 7, 2), (128, 7, 2), (128, 14, 1), (1000, 14, 2))  # RoIs, bins, samples
PASTE_CASES = ((200, (20, 60), 256), (200, (60, 100), 256), (2000, (10, 30), 512))  # masks, box sides, volume
DTYPES = (torch.float32, torch.bfloat16)
GOALS = {"nms 20000, 0.3": 1.0, "nms 20000, 0.7": 1.0}  # milliseconds
SHARE_OF_FLOOR = 0.6  # of 1000 x 7³, one sample, float32, both ways
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
WANTED = re.compile("Throughput|Duration|Hit Rate|Achieved Occupancy|Registers Per Thread|Mem Busy|Max Bandwidth")


def main() -> int:
    """Run every part and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profiled", action="store_true", help="only run each kernel once, for ncu")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problem = _cuda.problem(CARD)
    if problem is not None:
        log.error("Nothing to measure: %s", problem)
        return 1
    torch.manual_seed(0)
    if options.profiled:
        run_once()
        return 0
    parts: dict[str, Callable[[], Any]] = {"kernels": kernels, "bandwidth": bandwidth}
    if not options.no_tests:
        parts["tests"] = tests
    parts |= {"launch": launch_overhead, "lines": timed_lines, "torchvision": torchvision_lines, "ncu": profile}
    found = {name: attempt(name, part) for name, part in parts.items()}
    write_results("gpu_ops", found, report(found))
    return int(any(isinstance(value, dict) and "failed" in value for value in found.values()))


def attempt(name: str, part: Callable[[], Any]) -> Any:
    """What a part gives, or why it gave nothing."""
    log.info("==> %s", name)
    try:
        return part()
    except Exception as error:
        log.exception("%s failed", name)
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


# ---------------------------------------------------------------------------------------------- measuring


def clock(run: Callable[[], object], repeats: int = 30, warm: int = 5) -> dict[str, float]:
    """Milliseconds on the card, between events: median, fastest and slowest. The host runs ahead of it."""
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in marks])


def wall(run: Callable[[], object], repeats: int = 30, warm: int = 5) -> dict[str, float]:
    """Milliseconds for a host that waits for the result, as suppression does."""
    seconds = []
    for _ in range(warm + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return spread([1e3 * value for value in seconds[warm:]])


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of some times."""
    return {"median": median(times), "min": min(times), "max": max(times), "runs": len(times)}


def bandwidth() -> dict[str, float]:
    """GB/s of a device-to-device copy of 2 GB, read and written, and of filling."""
    source = torch.zeros(1 << 29, device=CARD)
    target = torch.empty_like(source)
    copy, fill = clock(lambda: target.copy_(source)), clock(lambda: target.zero_())
    return {"copy": 2e-6 * source.nbytes / copy["median"], "fill": 1e-6 * source.nbytes / fill["median"]}


@contextmanager
def deterministic() -> Iterator[None]:
    """Have PyTorch ask for deterministic algorithms inside."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------- the kernels themselves


def kernels() -> dict[str, Any]:
    """How they got here: versions, seconds to compile and to load from the cache, size."""
    from napari_mrcnn3d._ops import _nvrtc

    target = _nvrtc.architecture(torch.cuda.get_device_capability(CARD))
    with TemporaryDirectory() as folder:
        before = os.environ.get("NAPARI_MRCNN3D_CACHE")
        os.environ["NAPARI_MRCNN3D_CACHE"] = folder
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            image = _nvrtc.binary(target)
            seconds.append(time.perf_counter() - start)
        os.environ.pop("NAPARI_MRCNN3D_CACHE")
        if before is not None:
            os.environ["NAPARI_MRCNN3D_CACHE"] = before
    return {
        "card": torch.cuda.get_device_name(CARD),
        "torch": torch.__version__,
        "route": _cuda.describe(CARD).partition(", kept")[0],
        "seconds to compile": seconds[0],
        "seconds from the cache": seconds[1],
        "bytes": len(image),
    }


def tests() -> dict[str, Any]:
    """Result of tests/gpu/test_ops.py: every operation and type, bit-equality, determinism, streams, threads."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib"]
    command += ["-W", "ignore", "-p", "no:cacheprovider", "--tb=short", str(ROOT / "tests" / "gpu" / "test_ops.py")]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    log.info("%s", "\n".join(lines[-40:]))
    result: dict[str, Any] = {"summary": lines[-1] if lines else "", "status": done.returncode}
    if done.returncode:
        result["failed"] = "\n".join(lines[-80:])[-6000:]
    return result


def launch_overhead() -> dict[str, float]:
    """Microseconds of the host's time for one launch."""
    voxel, label = (torch.zeros(1, dtype=torch.int32, device=CARD) for _ in range(2))

    def hundred() -> None:
        for _ in range(100):
            _cuda._launch(CARD, "paste_labels", (1, 1), 32, 0, [voxel, label, 1, 1])

    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        hundred()
        seconds.append(time.perf_counter() - start)
    return {"microseconds": 1e4 * median(seconds)}


# ---------------------------------------------------------------------------------------------- lines


def boxes_3d(count: int, extent: float, sides: tuple[float, float]) -> Tensor:
    """Boxes around uniform centres, clipped to the volume."""
    centre = torch.rand(count, 3) * extent
    half = (torch.rand(count, 3) * (sides[1] - sides[0]) + sides[0]) / 2
    return torch.cat([centre - half, centre + half], 1).clamp_(0, extent)


def clustered(count: int) -> Tensor:
    """Proposals as a network makes them: about ten around each object, jittered."""
    centre = (torch.rand(max(1, count // 10), 3) * 512).repeat_interleave(10, 0)[:count]
    centre = centre + torch.randn(len(centre), 3) * 2
    half = (12 + torch.rand(len(centre), 3) * 16) / 2
    return torch.cat([centre - half, centre + half], 1)[torch.randperm(len(centre))]


def roi_inputs(count: int, bins: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, boxes of 4 to 16 cells, their batch index, values to send back."""
    shape = (1, CHANNELS, EXTENT, EXTENT, EXTENT)
    last = torch.channels_last_3d
    features = torch.randn(shape, device=CARD).to(dtype).to(memory_format=last)
    boxes = boxes_3d(count, EXTENT / SCALE, (4 / SCALE, 16 / SCALE)).to(CARD)
    values = torch.randn(count, CHANNELS, bins, bins, bins, device=CARD).to(dtype).to(memory_format=last)
    return features, boxes, torch.zeros(count, dtype=torch.int64, device=CARD), values


def paste_inputs(count: int, sides: tuple[int, int], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of 28³ cells, their boxes, labels."""
    masks, boxes = torch.rand(count, 28, 28, 28), boxes_3d(count, side, sides)
    return masks.to(CARD), boxes.to(CARD), torch.arange(1, count + 1, dtype=torch.int32, device=CARD)


def cells_read(boxes: Tensor, grid: RoIGrid, channels: int, element_bytes: int) -> int:
    """Bytes of the cells that the RoIs see, each RoI's counted once: what the second-level cache must give."""
    axes = _torch._roi_axes(boxes.cpu(), grid, (EXTENT,) * 3)
    z, y, x = ((axis.weights.sum(1) != 0).sum(1) for axis in axes)
    return int((z * y * x).sum()) * channels * element_bytes


def timed_lines() -> list[dict[str, Any]]:
    """Every operation at every size; a line that fails is marked and the next one goes on."""
    lines = []
    for name, measure in line_makers():
        found = attempt(name, measure)
        lines.append({"line": name} | found)
        torch.cuda.empty_cache()
    return lines


def line_makers() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What each line is called and what measures it."""
    for count, threshold in NMS_CASES:
        yield f"nms {count}, {threshold}", lambda c=count, t=threshold: nms_line(c, t)
    for (count, bins, samples), dtype in ((case, dtype) for case in ROI_CASES for dtype in DTYPES):
        for way in ("forward", "backward, atomic", "backward, deterministic"):
            name = f"{count} x {bins}³, S = {samples}, {str(dtype)[6:]}, {way}"
            yield name, lambda c=count, b=bins, s=samples, d=dtype, w=way: roi_line(c, b, s, d, w)
    for count, sides, side in PASTE_CASES:
        yield f"paste {count} of {sides}, {side}³", lambda c=count, s=sides, v=side: paste_line(c, s, v)


def nms_line(count: int, threshold: float) -> dict[str, Any]:
    """Suppression with its wait for the count; the steps on the card alone; with PyTorch's sort in front."""
    boxes, scores = clustered(count).to(CARD), torch.rand(count, device=CARD)
    times = wall(lambda: _cuda.nms_sorted(boxes, threshold, None, None))
    ranked = wall(lambda: _cuda.nms_sorted(boxes[scores.sort(descending=True).indices], threshold, None, None))
    kept = len(_cuda.nms_sorted(boxes, threshold, None, None))
    return {"times": times, "with sort": ranked["median"], "kept": kept}


def roi_line(count: int, bins: int, samples: int, dtype: torch.dtype, way: str) -> dict[str, Any]:
    """RoIAlign or one of its two transposes; bytes that must move, and of the cells that the RoIs see."""
    features, boxes, index, values = roi_inputs(count, bins, dtype)
    grid = RoIGrid((bins,) * 3, (SCALE,) * 3, samples)
    moved = features.nbytes + values.nbytes
    if way == "forward":
        times = clock(lambda: _cuda.roi_align(features, boxes, index, grid))
        return {"times": times, "moved": moved, "cells": cells_read(boxes, grid, CHANNELS, dtype.itemsize)}
    shape = tuple(features.shape)

    def back() -> Tensor:
        return _cuda.roi_align_transposed(values, boxes, index, grid, shape)

    with deterministic() if way.endswith("deterministic") else nullcontext():
        return {"times": clock(back), "moved": moved}


def paste_line(count: int, sides: tuple[int, int], side: int) -> dict[str, Any]:
    """Masks into a volume that is allocated anew each time."""
    masks, boxes, labels = paste_inputs(count, sides, side)
    times = clock(lambda: _cuda.paste_masks(masks, boxes, labels, (side,) * 3, 0.5))
    return {"times": times, "moved": side**3 * 4 + masks.nbytes}


def torchvision_lines() -> list[dict[str, Any]]:
    """Its 2D operations with as many output values: seven times the RoIs of 7 x 7 bins, maps of as many cells."""
    import torchvision
    from torchvision.ops import nms, roi_align

    lines: list[dict[str, Any]] = [{"line": f"torchvision {torchvision.__version__}"}]
    for count, threshold in ((20_000, 0.3), (20_000, 0.7)):
        boxes, scores = clustered(count)[:, [1, 2, 4, 5]].to(CARD), torch.rand(count, device=CARD)
        lines.append(
            {"line": f"2D nms {count}, {threshold}", "times": wall(lambda b=boxes, s=scores, t=threshold: nms(b, s, t))}
        )
    side = 181
    for dtype, samples in ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)):
        features = torch.randn(1, CHANNELS, side, side, device=CARD).to(dtype).requires_grad_()
        flat = boxes_3d(7000, side / SCALE, (4 / SCALE, 16 / SCALE))[:, [1, 2, 4, 5]]
        rois = torch.cat([torch.zeros(7000, 1), flat], 1).to(CARD, dtype)

        def forward(f: Tensor = features, r: Tensor = rois, s: int = samples) -> Tensor:
            return roi_align(f, r, 7, SCALE, s, aligned=True)

        out = forward()
        grad = torch.randn_like(out)
        name = f"2D roi_align 7000 x 7², S = {samples}, {str(dtype)[6:]}"
        moved = features.nbytes + out.nbytes
        lines.append({"line": f"{name}, forward", "times": clock(forward), "moved": moved})
        back = clock(lambda o=out, f=features, g=grad: torch.autograd.grad(o, f, g, retain_graph=True))
        lines.append({"line": f"{name}, backward", "times": back, "moved": moved})
    return lines


# ---------------------------------------------------------------------------------------------- ncu


def run_once() -> None:
    """Each kernel at the size of the goals, once to warm up and once to be looked at."""
    for dtype in DTYPES:
        for samples in (1, 2):
            features, boxes, index, values = roi_inputs(1000, 7, dtype)
            grid = RoIGrid((7,) * 3, (SCALE,) * 3, samples)
            _cuda.roi_align(features, boxes, index, grid)
            _cuda.roi_align_transposed(values, boxes, index, grid, tuple(features.shape))
            with deterministic():
                _cuda.roi_align_transposed(values, boxes, index, grid, tuple(features.shape))
    _cuda.nms_sorted(clustered(20_000).to(CARD), 0.3, None, None)
    masks, boxes, labels = paste_inputs(200, (60, 100), 256)
    _cuda.paste_masks(masks, boxes, labels, (256,) * 3, 0.5)
    torch.cuda.synchronize()


def profile() -> Any:
    """Throughputs that Nsight Compute reads for each of our kernels; clocks are left alone."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"failed": "ncu is not on the path"}
    command = [ncu, "--csv", "--clock-control", "none", "--kernel-name", "regex:roi_align|nms_|paste_"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, str(Path(__file__)), "--profiled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT)
    start = done.stdout.find('"ID"')
    if start < 0:
        return {"failed": (done.stdout + done.stderr)[-3000:]}
    rows: dict[str, dict[str, Any]] = {}
    for entry in csv.DictReader(done.stdout[start:].splitlines()):
        metric, value = entry.get("Metric Name") or "", entry.get("Metric Value") or ""
        if entry.get("Kernel Name") and WANTED.search(metric):
            key = f"{entry['ID']} {entry['Kernel Name'].partition('(')[0]}"
            rows.setdefault(key, {})[f"{metric} [{entry.get('Metric Unit', '')}]"] = value
    return rows or {"failed": done.stdout[start : start + 3000]}


# ---------------------------------------------------------------------------------------------- report


def report(found: dict[str, Any]) -> str:
    """All of it as markdown; parts that failed are named first."""
    text = "# 3D operations on a CUDA card\n\nMilliseconds, median [fastest, slowest].\n\n"
    for name, value in found.items():
        if isinstance(value, dict) and "failed" in value:
            text += f"**{name} failed**: {value['failed'].strip().splitlines()[-1][:300]}\n\n"
    for name in ("kernels", "bandwidth", "tests", "launch"):
        value = found.get(name, {})
        text += f"* {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in value.items() if k != "failed") + "\n"
    copy = found["bandwidth"].get("copy")
    for name in ("lines", "torchvision"):
        if isinstance(found.get(name), list):
            text += f"\n## {name}\n\n" + table(found[name], copy)
    if isinstance(found.get("lines"), list):
        text += "\n## Goals\n\n" + goals(found["lines"], copy)
    if isinstance(found.get("ncu"), dict) and "failed" not in found["ncu"]:
        text += "\n## ncu\n\n" + ncu_table(found["ncu"])
    return text


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(lines: list[dict[str, Any]], copy: float | None) -> str:
    """Lines with their floor: the bytes that must move, at the speed of a copy."""
    rows = []
    for line in lines:
        times = line.get("times")
        if times is None:
            rows.append([line["line"], line.get("failed", "-")[:100], None, None, None])
            continue
        floor = line["moved"] / copy / 1e6 if copy and "moved" in line else None
        more = [f"{key} {_short(line[key])}" for key in ("kept", "with sort") if key in line]
        if "cells" in line:
            more.append(f"cells {line['cells'] / 1e9:.2f} GB, {line['cells'] / times['median'] / 1e9:.2f} TB/s")
        taken = f"{times['median']:.3f} [{times['min']:.3f}, {times['max']:.3f}]"
        rows.append([line["line"], taken, floor, floor / times["median"] if floor else None, "; ".join(more) or None])
    return markdown_table(["line", "ms", "floor", "floor / ms", "more"], rows)


def goals(lines: list[dict[str, Any]], copy: float | None) -> str:
    """Whether the figures that were asked for are reached."""
    medians = {line["line"]: line for line in lines if "times" in line}
    rows = []
    for name, most in GOALS.items():
        if name in medians:
            taken = medians[name]["times"]["median"]
            rows.append([name, f"at most {most} ms", taken, "yes" if taken <= most else "no"])
    for way in ("forward", "backward, atomic", "backward, deterministic"):
        name = f"1000 x 7³, S = 1, float32, {way}"
        if name in medians and copy:
            share = medians[name]["moved"] / copy / 1e6 / medians[name]["times"]["median"]
            rows.append(
                [name, f"at least {SHARE_OF_FLOOR} of the floor", share, "yes" if share >= SHARE_OF_FLOOR else "no"]
            )
    return markdown_table(["line", "goal", "found", "reached"], rows)


def ncu_table(kernels_found: dict[str, dict[str, Any]]) -> str:
    """A row for each kernel that ncu saw."""
    names = sorted({metric for metrics in kernels_found.values() for metric in metrics})
    rows = [[kernel, *(metrics.get(name) for name in names)] for kernel, metrics in kernels_found.items()]
    return markdown_table(["kernel", *names], rows)


if __name__ == "__main__":
    sys.exit(main())
