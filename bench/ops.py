"""The 3D operations on the processor: against what one would otherwise use, and against what the memory allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import cyclopts
import torch
from _machine import markdown_table, write_results
from _rivals import at_once, broadcast_iou, by_roi, nms_bitmask, nms_careful_loop, nms_loop, paste_loop
from torch import Tensor
from torch.testing import assert_close

from napari_mrcnn3d._ops import box_iou_3d, crop_and_resize_3d, nms_3d, paste_masks_3d, roi_align_3d
from napari_mrcnn3d._ops._backends import describe, plain_torch

OURS, PLAIN, OUTPUT, USUAL = "ours", "ours, plain PyTorch", "output alone", "usual way"
BITMASK, CAREFUL, LOOP = "blocked bitmask", "careful loop", "loop"
ONE_BY_ONE, AT_ONCE = "grid_sample by RoI", "grid_sample at once"
NMS_CASES = (  # boxes, how they lie, threshold, max_keep
    *((count, "clustered", threshold, None) for count, threshold in product((2000, 6000, 20000), (0.3, 0.7))),
    *((count, "spread", threshold, None) for count, threshold in ((6000, 0.3), (20000, 0.7))),
    *((20000, "clustered", threshold, 1000) for threshold in (0.3, 0.7)),
)
ROI_CASES = ((128, 7), (1000, 7), (128, 14))  # RoIs, bins along each axis
PASTE_CASES = ((200, (20, 60), 256), (2000, (10, 30), 512))  # masks, sides of their boxes, side of the volume
CHANNELS, EXTENT = 256, 32  # of the features
POINTS, GRAPH = 360_000, 32  # grid_sample's limits: points in all, and RoIs in a graph of single calls
MOST_RUNS = 50
QUICK = 0.3  # seconds; what takes longer is not run once more to warm up
GOALS = (  # line and contender divided, line of ours that divides, ratio: at least, or at most where it is below 2
    *((f"20000 clustered, {t}", rival, f"20000 clustered, {t}", 100) for t in (0.3, 0.7) for rival in (CAREFUL, LOOP)),
    *(
        (f"1000 x 7³, S = 1, {way}", rival, f"1000 x 7³, S = 1, {way}", least)
        for (way, least), rival in product((("forward", 5), ("backward", 15)), (ONE_BY_ONE, AT_ONCE))
    ),
    *((f"1000 x 7³, S = 2, {way}", OURS, f"1000 x 7³, S = 1, {way}", 1.2) for way in ("forward", "backward")),
)
TEXT = """# 3D operations on the processor

Kernels: {kernels}; {threads} threads. Copying {copy:.1f}, filling {fill:.1f} GB/s. All times are milliseconds, median
[fastest, slowest], with the allocation of the result. All contenders of a line gave the same result before.

* Loop: the best box against all that are left, which are gathered anew each time, as it is usually written; the
  careful one works in place on columns and copies only after a hit. Blocked bitmask: 256 boxes against all later ones.
* grid_sample: S³ samples a bin, averaged; by RoI with a call each, or all at once, divided over the threads. ≈: of
  fewer RoIs, multiplied. Backward: the gradient to the features, through autograd.
* Output alone: a tensor of the result's size allocated and filled, mostly page faults. Floor: the result written and
  the input read once, at the faster of the two speeds. Box IoU, crop and resize have no compiled kernel.
"""


class Contender(NamedTuple):
    """What is timed; its time is multiplied where it does only a part of the work."""

    run: Callable[[], Tensor]
    factor: float = 1.0


class Line(NamedTuple):
    """One line of a table: what is timed, the chief rival last; bytes moved at least; further columns."""

    name: str
    contenders: dict[str, Contender]
    moved: int = 0
    more: tuple[tuple[str, float], ...] = ()


def main(*, share: float = 1.0, repeats: int = 3, seconds: float = 0.5) -> None:
    """Measure all operations; a run of full size is kept as bench/results/ops.json and .md.

    Parameters
    ----------
    share
        Of the boxes, RoIs and masks: a small one tries the program, prints and keeps nothing.
    repeats
        Rounds that everything takes part in.
    seconds
        For further rounds of each contender, so that short ones run more often.
    """
    torch.manual_seed(0)
    start, speed = time.perf_counter(), bandwidth()
    parts = {"Non-maximum suppression": nms_lines, "RoIs, 256 channels": roi_lines, "Masks and overlap": other_lines}
    rows = {
        title: [row for group in lines(share) for row in measure(group, repeats, seconds, max(speed.values()))]
        for title, lines in parts.items()
    }
    found = {"kernels": describe(torch.device("cpu")), "threads": torch.get_num_threads(), **speed}
    goals = judge({row["line"]: row["times"] for part in rows.values() for row in part})
    text = TEXT.format(**found) + "".join(f"\n## {title}\n\n{table(part)}" for title, part in rows.items())
    text += "\n## Goals\n\n" + markdown_table(list(goals[0]), [list(goal.values()) for goal in goals])
    text += f"\n{(time.perf_counter() - start) / 60:.1f} minutes.\n"
    if share == 1:
        write_results("ops", {**found, "tables": rows, "goals": goals}, text)
    else:
        print(text)


def bandwidth() -> dict[str, float]:
    """GB/s of a large copy (read and written) and of filling, with all threads; the best of 7."""
    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    seconds = [(clock(lambda: target.copy_(source)), clock(lambda: target.fill_(0))) for _ in range(7)]
    copy, fill = map(min, zip(*seconds, strict=True))
    return {"copy": 2e-9 * source.nbytes / copy, "fill": 1e-9 * source.nbytes / fill}


def clock(run: Callable[[], object]) -> float:
    """Seconds of one run; the result is freed afterwards."""
    start = time.perf_counter()
    result = run()
    end = time.perf_counter()
    del result
    return end - start


def measure(group: list[Line], repeats: int, budget: float, speed: float) -> list[dict[str, Any]]:
    """Time the contenders of some lines in turn, until each had its repeats and its seconds; a dict for each line."""
    times: list[dict[str, list[float]]] = [{name: [] for name in line.contenders} for line in group]
    pairs = list(zip(group, times, strict=True))
    names = dict.fromkeys(name for line in group for name in line.contenders)
    waiting = [(line.contenders[name].run, lists[name]) for name in names for line, lists in pairs if name in lists]
    while waiting:
        for run, taken in waiting:
            if not taken or min(taken) < QUICK:
                run()  # memory that lay idle may have gone back to the system, or to the host of a virtual machine
            taken.append(clock(run))
        waiting = [(r, t) for r, t in waiting if len(t) < repeats or (sum(t) < budget and len(t) < MOST_RUNS)]
    rows = []
    for line, lists in pairs:
        spreads = {name: spread(taken, line.contenders[name].factor) for name, taken in lists.items()}
        print(line.name, {name: round(values["median"], 2) for name, values in spreads.items()}, flush=True)
        ours, rival = spreads[OURS]["median"], list(spreads)[-1]
        more = {f"{rival} / ours": spreads[rival]["median"] / ours, **dict(line.more)}
        if line.moved:
            floor = line.moved / speed / 1e6
            more |= {"floor": floor, "ours / floor": ours / floor}
        rows.append({"line": line.name, "times": spreads, "more": more})
    return rows


def spread(seconds: list[float], factor: float) -> dict[str, float]:
    """Median and range in milliseconds."""
    values = {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: 1000 * factor * value for name, value in values.items()} | {"runs": len(seconds), "factor": factor}


def judge(times: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios that were promised, and whether they hold."""
    goals = []
    for line, contender, base, goal in GOALS:
        ratio = times[line][contender]["median"] / times[base][OURS]["median"]
        sign, holds = (">=", ratio >= goal) if goal >= 2 else ("<=", ratio <= goal)
        what = {"divided": f"{line}: {contender}", "by": f"{base}: {OURS}", "ratio": ratio}
        goals.append(what | {"goal": f"{sign} {goal}", "holds": "yes" if holds else "no"})
    return goals


def table(rows: list[dict[str, Any]]) -> str:
    """What :func:`measure` gave as a markdown table; a column for each contender and each further figure."""
    names, more = (list(dict.fromkeys(name for row in rows for name in row[kind])) for kind in ("times", "more"))
    cells = [[r["line"], *(cell(r["times"].get(n)) for n in names), *(r["more"].get(n) for n in more)] for r in rows]
    return markdown_table(["", *names, *more], cells)


def cell(times: dict[str, float] | None) -> str | None:
    """Milliseconds, three digits at least."""
    if times is None:
        return None
    middle, low, high = (f"{times[k]:.{max(0, 2 - int(math.log10(times[k])))}f}" for k in ("median", "min", "max"))
    return f"{'≈ ' if times['factor'] > 1 else ''}{middle} [{low}, {high}]"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Integers exactly, others up to the rounding of positions in float32."""
    tolerance = 2e-4 * float(expected.abs().max()) if expected.is_floating_point() else 0
    assert_close(actual, expected, rtol=0, atol=tolerance)


def both(ours: Callable[[], Tensor], *shape: int) -> dict[str, Contender]:
    """Our operation, the same without compiled kernels, and an output of this shape alone."""
    alone = {OUTPUT: Contender(lambda: torch.empty(shape).fill_(0))} if shape else {}
    return {OURS: Contender(ours), PLAIN: Contender(plain_torch()(ours)), **alone}


# --- The lines of the tables


def nms_lines(share: float) -> Iterator[list[Line]]:
    """One line at a time: each has a contender that takes seconds."""
    rivals = {BITMASK: nms_bitmask, CAREFUL: nms_careful_loop, LOOP: nms_loop}
    for count, layout, threshold, limit in NMS_CASES:
        boxes = random_boxes(round(count * share), layout)
        arguments = (boxes, torch.rand(len(boxes)), threshold)
        contenders = both(partial(nms_3d, *arguments, max_keep=limit))
        contenders |= {n: Contender(partial(rival, *arguments, limit or len(boxes))) for n, rival in rivals.items()}
        kept = contenders[OURS].run()
        for contender in contenders.values():
            assert_same(contender.run(), kept)
        name = f"{count} {layout}, {threshold}" + (f", max_keep {limit}" if limit else "")
        yield [Line(name, contenders, more=(("kept", len(kept)),))]


def random_boxes(count: int, layout: str) -> Tensor:
    """Boxes [N, 6]: clustered in 256³ voxels, twenty on each object as a network proposes them, or spread over 512³."""
    if layout == "clustered":
        objects = torch.rand(math.ceil(count / 20), 3) * 256
        sides = 24 * (0.7 + 0.6 * torch.rand(count, 3))
        centres = objects[torch.randint(len(objects), (count,))] + torch.randn(count, 3) * 4.8
    else:
        sides, centres = 20 * (0.6 + 0.8 * torch.rand(count, 3)), torch.rand(count, 3) * 512
    return torch.cat([centres - sides / 2, centres + sides / 2], 1)


def roi_lines(share: float) -> Iterator[list[Line]]:
    """RoIs 4 to 16 cells wide; one and two samples are measured in turn, as they are compared."""
    features = torch.randn(1, CHANNELS, EXTENT, EXTENT, EXTENT).contiguous(memory_format=torch.channels_last_3d)
    for (count, bins), way in product(ROI_CASES, ("forward", "backward")):
        sides = 4 + 12 * torch.rand(round(count * share), 3)
        corner = torch.rand(len(sides), 3) * (EXTENT - sides)
        rois, values = torch.cat([corner, corner + sides], 1), torch.randn(len(sides), CHANNELS, bins, bins, bins)
        leaf = features.detach().requires_grad_(way == "backward")
        name = f"{count} x {bins}³"
        aligned = {samples: partial(roi_align, samples=samples) for samples in (1, 2)}
        yield [roi_line(f"{name}, S = {s}, {way}", ours, leaf, rois, values, s) for s, ours in aligned.items()]
        if (count, bins) == ROI_CASES[0]:
            inside = rois.clamp(0.5, EXTENT - 0.5)
            yield [roi_line(f"{name}, crop and resize, {way}", crop_and_resize, leaf, inside, values, 1)]


def roi_line(
    name: str, ours: Callable[..., Tensor], features: Tensor, rois: Tensor, values: Tensor, samples: int
) -> Line:
    """An operation; if the features want it, their gradient for these values of the result's."""
    backward, bins, threads = features.requires_grad, values.shape[-1], torch.get_num_threads()
    most = max(1, POINTS // (bins * samples) ** 3 // threads) * threads

    def contender(way: Callable[..., Tensor], count: int) -> Contender:
        part = rois[:count]
        factor = len(rois) / len(part)
        if not backward:
            return Contender(partial(way, features, part, bins), factor)
        out = way(features, part, bins)
        grad = torch.empty_like(out).copy_(values[:count])
        return Contender(lambda: torch.autograd.grad(out, features, grad, retain_graph=True)[0], factor)

    contenders = both(contender(ours, len(rois)).run, *(features if backward else values).shape)
    assert_same(contenders[PLAIN].run(), contenders[OURS].run())
    for rival, way, count in ((ONE_BY_ONE, by_roi, min(most, GRAPH) if backward else most), (AT_ONCE, at_once, most)):
        contenders[rival] = contender(partial(way, samples=samples), count)
        assert_same(contenders[rival].run(), contender(ours, count).run())
    return Line(name, contenders, moved=features.nbytes + values.nbytes)


def roi_align(features: Tensor, rois: Tensor, bins: int, samples: int) -> Tensor:
    """Ours; RoIs are in cells."""
    entry = torch.zeros(len(rois), dtype=torch.int64)
    return roi_align_3d(features, rois, entry, (bins,) * 3, (1.0, 1.0, 1.0), samples)


def crop_and_resize(features: Tensor, rois: Tensor, bins: int) -> Tensor:
    """The same with one sample, by the corners of a crop: the centres of the first and the last bin."""
    half = (rois[:, 3:] - rois[:, :3]) / (2 * bins)
    boxes = (torch.cat([rois[:, :3] + half, rois[:, 3:] - half], 1) - 0.5) / (EXTENT - 1)
    entry = torch.zeros(len(rois), dtype=torch.int64)
    return crop_and_resize_3d(features.permute(0, 2, 3, 4, 1), boxes, entry, (bins,) * 3).permute(0, 4, 1, 2, 3)


def other_lines(share: float) -> Iterator[list[Line]]:
    """Masks into a volume, and IoU of all pairs."""
    for count, sides, extent in PASTE_CASES:
        name = f"paste {count} masks, boxes {sides[0]} to {sides[1]}, {extent}³"
        yield [paste_line(name, round(count * share), sides, (extent,) * 3)]
    a, b = random_boxes(round(100_000 * share), "spread"), random_boxes(50, "spread")
    contenders = both(partial(box_iou_3d, a, b), len(a), len(b)) | {USUAL: Contender(partial(broadcast_iou, a, b))}
    assert_same(contenders[OURS].run(), expected := contenders[USUAL].run())
    yield [Line("box IoU, 100,000 x 50", contenders, moved=expected.nbytes + a.nbytes)]


def paste_line(name: str, count: int, sides: tuple[int, int], shape: tuple[int, int, int]) -> Line:
    """Round soft masks 28³ in boxes of random sides; the usual way rounds the boxes to voxels."""
    size = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 3)
    corner = torch.rand(count, 3) * (shape[0] - size)
    squares = torch.linspace(-1, 1, 28) ** 2
    radius = (squares[:, None, None] + squares[:, None] + squares).sqrt()
    masks = torch.sigmoid(10 * (0.7 + 0.3 * torch.rand(count, 1, 1, 1) - radius))
    arguments = (masks, torch.cat([corner, corner + size], 1), torch.arange(1, count + 1), torch.rand(count), shape)
    contenders = both(partial(paste_masks_3d, *arguments), *shape) | {USUAL: Contender(partial(paste_loop, *arguments))}
    volume = contenders[PLAIN].run()
    off = {n: float((contenders[n].run() != volume).sum() / (volume > 0).sum()) for n in (OURS, USUAL)}
    if off[OURS] > 1e-4 or off[USUAL] > 0.2:
        raise RuntimeError(f"the share of labelled voxels that differ from plain PyTorch's is {off}")
    return Line(name, contenders, volume.nbytes + masks.nbytes, (("usual way differs in", off[USUAL]),))


if __name__ == "__main__":
    cyclopts.run(main)
