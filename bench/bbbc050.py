"""Nuclei of two unseen mouse embryos (BBBC050): a model beside Otsu + watershed, pooled and per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
from _floor import FloorSettings, drop_small, otsu_watershed
from _machine import SHARED_DATA, markdown_table, write_results

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.io.tiff import read_image, read_labels
from napari_mrcnn3d.metrics.report import LabelPair, evaluate
from napari_mrcnn3d.model.weights import load_model, read_header
from napari_mrcnn3d.structures import UserError, Volume, VoxelSize

VALIDATION = ("Emb10", "Emb11")
VOXEL_SIZE = VoxelSize(1.75, 0.8, 0.8)
STAGES = ((2, "1-2 nuclei"), (8, "3-8 nuclei"), (20, "9-20 nuclei"), (10**9, "21+ nuclei"))

# Best pooled F1@0.5 (0.773) of `--tune`: every third volume of the nine training embryos, the validation unseen.
FLOOR = FloorSettings(smooth=2.4, seed_smooth=1.0, seed_radius=5.0, min_volume=800.0)
_GRID = {
    "smooth": (1.2, 1.8, 2.4, 3.0, 3.6),
    "seed_smooth": (0.5, 1.0),
    "seed_radius": (3.0, 4.0, 5.0, 6.0),
    "min_volume": (100.0, 200.0, 400.0, 600.0, 800.0),
}

REFERENCE: dict[str, Any] = {
    "method": "StarDist 3D, 50 min on two cores (from the issue, not measured in this run)",
    "training": "the other nine embryos",
    "f1": 0.862,
    "seg": 0.630,
    "mucov": 0.722,
    "seconds": 1.4,
}

Segment = Callable[[Volume], np.ndarray]


def main(
    *,
    data: Path = SHARED_DATA / "bbbc050",
    model: str = "embryo-nuclei",
    device: str = "auto",
    floor_only: bool = False,
    tune: bool = False,
) -> None:
    """Segment the 22 validation volumes and write bench/results/bbbc050.json and .md.

    Parameters
    ----------
    data
        Folder with images/ and labels/.
    model
        Name of a bundled model, or a model file.
    device
        auto, cpu, cuda, cuda:1 or mps.
    floor_only
        Run Otsu + watershed alone.
    tune
        Instead, look for the best settings of Otsu + watershed on the training embryos.
    """
    names = sorted(path.stem for path in (data / "images").glob("*.tif"))
    if not names:
        raise SystemExit(f"{data} holds no images/*.tif: give the folder with --data.")
    validation = [name for name in names if name.startswith(VALIDATION)]
    if tune:
        print(tune_floor(data, [name for name in names if name not in validation][::3]))
        return
    methods: dict[str, Segment] = {"Otsu + watershed": lambda v: otsu_watershed(np.asarray(v.data), VOXEL_SIZE, FLOOR)}
    content: dict[str, Any] = {"validation": VALIDATION, "floor_settings": asdict(FLOOR), "reference": REFERENCE}
    if not floor_only:
        content["model"] = {"name": model, "provenance": read_header(model).provenance}
        methods = {f"napari-mrcnn3d, {Path(model).stem}": network(model, device), **methods}
    reports = {name: measure(segment, data, validation) for name, segment in methods.items()}
    write_results("bbbc050-floor" if floor_only else "bbbc050", {**content, "methods": reports}, tables(reports))


def network(model: str, device: str) -> Segment:
    """Segmentation by a model file with the default settings of prediction and selection."""
    predictor = Predictor(load_model(model), device)

    def segment(volume: Volume) -> np.ndarray:
        footprints = Footprints.of(predictor.predict(volume))
        return paint(footprints, select(footprints, SelectConfig()))

    return segment


def measure(segment: Segment, data: Path, names: Sequence[str]) -> dict[str, Any]:
    """Report of a method on these volumes, with seconds per volume: from the image in memory to its labels."""
    seconds: list[float] = []

    def pairs() -> Iterator[LabelPair]:
        for name in names:
            image = read_image(data / "images" / f"{name}.tif")
            volume = Volume(image.data, image.voxel_size or VOXEL_SIZE, name)
            start = time.perf_counter()
            labels = segment(volume)
            seconds.append(time.perf_counter() - start)
            yield LabelPair(name, read_labels(data / "labels" / f"{name}.tif").data, labels)

    report = evaluate(pairs(), group_of=lambda _, nuclei: stage(nuclei))
    report["groups"] = {name: report["groups"][name] for _, name in STAGES if name in report["groups"]}
    for volume, spent in zip(report["volumes"], seconds, strict=True):
        volume["seconds"] = spent
    for name, figures in report["groups"].items():
        figures["seconds"] = float(np.mean([v["seconds"] for v in report["volumes"] if v["group"] == name]))
    report["pooled"]["seconds"] = report["volume_mean"]["seconds"] = float(np.mean(seconds))
    return report


def stage(nuclei: int) -> str:
    """Stage of an embryo by the nuclei in its ground truth."""
    return next(name for most, name in STAGES if nuclei <= most)


def tables(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown: all volumes, then each stage, then the mean over volumes."""
    header = ("", "volumes", "nuclei", "F1@0.5", "AP_dsb@0.5", "AP_dsb@0.75", "SEG", "MUCov", "s/volume")
    first = next(iter(reports.values()))
    pooled = [row(name, report["pooled"]) for name, report in reports.items()]
    pooled.append(row(REFERENCE["method"], REFERENCE))
    text = "# BBBC050, embryos 10 and 11\n\nAll objects pooled.\n\n" + markdown_table(header, pooled)
    for group in first["groups"]:
        rows = [row(name, report["groups"][group]) for name, report in reports.items()]
        text += f"\n{group}, pooled.\n\n" + markdown_table(header, rows)
    means = [row(name, report["volume_mean"]) for name, report in reports.items()]
    return text + "\nMean over volumes.\n\n" + markdown_table(header, means)


def row(name: str, figures: dict[str, Any]) -> list[Any]:
    """One line of a table; what is not known stays empty."""
    ap = figures.get("ap_dsb", {})
    cells = [figures.get("volumes"), figures.get("true_objects"), figures.get("f1"), ap.get("0.50"), ap.get("0.75")]
    return [name, *cells, figures.get("seg"), figures.get("mucov"), figures.get("seconds")]


def tune_floor(data: Path, names: Sequence[str]) -> str:
    """Best settings of the floor on these volumes, as a markdown table of the ten best."""
    images = [np.asarray(read_image(data / "images" / f"{name}.tif").data) for name in names]
    truths = [np.asarray(read_labels(data / "labels" / f"{name}.tif").data) for name in names]
    rows = []
    for smooth, seed_smooth, radius in product(_GRID["smooth"], _GRID["seed_smooth"], _GRID["seed_radius"]):
        whole = [otsu_watershed(im, VOXEL_SIZE, FloorSettings(smooth, seed_smooth, radius, 0.0)) for im in images]
        for least in _GRID["min_volume"]:
            labels = [drop_small(w, least / VOXEL_SIZE.volume) for w in whole]
            pairs = map(LabelPair, names, truths, labels)
            figures = evaluate(pairs)["pooled"]
            rows.append([smooth, seed_smooth, radius, least, figures["f1"], figures["seg"], figures["mucov"]])
    rows.sort(key=lambda r: -r[4])
    header = ("smooth µm", "seed smooth µm", "seed radius µm", "least µm³", "F1@0.5", "SEG", "MUCov")
    return f"{len(names)} training volumes\n\n" + markdown_table(header, rows[:10])


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except UserError as error:
        raise SystemExit(f"bbbc050: {error}") from error
