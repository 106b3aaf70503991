"""Fresh toy images at half size: the predecessor's four columns for two or more model files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from _machine import markdown_table, write_results

from napari_mrcnn3d.config import SelectConfig, ToyConfig
from napari_mrcnn3d.data.seed_format import CLASS_NAMES
from napari_mrcnn3d.data.toy import ToyImage, toy_image
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.metrics.average_precision import (
    COLUMNS,
    LabelledObjects,
    Ranking,
    SeedColumns,
    average_precision,
    pool_rankings,
    rank_predictions,
    seed_columns,
    summarise_columns,
)
from napari_mrcnn3d.model.weights import load_model, read_header
from napari_mrcnn3d.structures import Candidates, UserError, Volume

IMAGES = ToyConfig(image_size=64, base_radius=7.5, seed=640_075)
"""Half the predecessor's image and sizes; a seed that no training set of the project has."""

SELECTIONS = {
    "0.95, as the predecessor": SelectConfig(min_score=0.95, max_overlap=1.0),
    "0.5": SelectConfig(min_score=0.5),
    "0.7, ours": SelectConfig(),
}


@dataclass
class Tally:
    """What is collected of one model and one selection."""

    columns: list[SeedColumns] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)

    def add(self, image: ToyImage, candidates: Candidates, config: SelectConfig) -> None:
        """Select, paint and compare one image."""
        footprints = Footprints.of(candidates)
        instances = select(footprints, config)
        chosen = instances.candidates
        truth = LabelledObjects(image.labels, image.classes)
        prediction = LabelledObjects(paint(footprints, instances), chosen.classes, chosen.scores)
        self.columns.append(seed_columns(truth, prediction))
        self.rankings += rank_predictions(truth, prediction)

    def summary(self) -> dict[str, Any]:
        """Figures of all images, ready for JSON."""
        return {
            "columns": summarise_columns(self.columns),
            "ap_coco_50": average_precision(pool_rankings(self.rankings)),
            "per_image": [[None if np.isnan(v) else v for v in row] for row in self.columns],
        }


def main(
    *models: Path,
    count: Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=1))] = 100,
    device: str = "auto",
) -> None:
    """Predict fresh toy images and write bench/results/toy.json and .md.

    Parameters
    ----------
    models
        Model files or names of bundled models, all trained on toy images.
    count
        Number of images.
    device
        auto, cpu, cuda, cuda:1 or mps.
    """
    if not models:
        raise UserError("No model was given: name the model files to compare.")
    images = [toy_image(IMAGES, index) for index in range(count)]
    results = [measure(str(model), images, device) for model in models]
    content = {"images": IMAGES.model_dump(), "count": count, "column_names": COLUMNS, "models": results}
    write_results("toy", content, table(results, count))


def measure(model: str, images: Sequence[ToyImage], device: str) -> dict[str, Any]:
    """Figures of one model under every selection, from one prediction of each image."""
    header = read_header(model)
    if header.config.class_names != tuple(CLASS_NAMES):
        raise UserError(f"{model} knows {', '.join(header.config.class_names)}: choose a model of toy shapes.")
    predictor = Predictor(load_model(model), device)
    tallies = {name: Tally() for name in SELECTIONS}
    seconds = []
    for index, image in enumerate(images):
        start = time.perf_counter()
        candidates = predictor.predict(Volume(image.image, None, f"toy image {index}"))
        seconds.append(time.perf_counter() - start)
        for name, config in SELECTIONS.items():
            tallies[name].add(image, candidates, config)
    return {
        "model": Path(model).stem,
        "provenance": header.provenance,
        "seconds_per_image": float(np.median(seconds)),
        "selections": {name: tally.summary() for name, tally in tallies.items()},
    }


def table(results: Sequence[dict[str, Any]], count: int) -> str:
    """Markdown: a row for each model and selection."""
    header = ("model", "trained min", "steps", "score", *COLUMNS, "AP_coco@0.5", "s/image")
    rows = []
    for one in results:
        trained = [one["provenance"].get("minutes"), one["provenance"].get("steps")]
        for name, figures in one["selections"].items():
            columns = [_both_means(figures["columns"][column]) for column in COLUMNS]
            rows.append([one["model"], *trained, name, *columns, figures["ap_coco_50"], one["seconds_per_image"]])
    return (
        f"# Toy shapes, {count} fresh images of {IMAGES.image_size} voxels\n\n"
        "Means over images as the predecessor computes them: over those where the column is defined / over all, "
        "undefined counted as 0.\n\n" + markdown_table(header, rows)
    )


def _both_means(column: dict[str, Any]) -> str:
    means = (column["mean"], column["mean_undefined_as_zero"])
    return " / ".join("-" if mean is None else f"{mean:.3f}" for mean in means)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except UserError as error:
        raise SystemExit(f"toy: {error}") from error
