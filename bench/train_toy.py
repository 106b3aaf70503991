"""Train `small` and the predecessor's network (`seed`) on toy images, side by side, a core and the same time each."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import cyclopts

from napari_mrcnn3d.config import ToyConfig, preset

IMAGES = ToyConfig(image_size=64, base_radius=7.5)
"""Half the predecessor's image and sizes, as in bench/toy.py, from another seed."""
HALF_ANCHORS = tuple(((side, side, side),) for side in (16.0, 32.0, 64.0, 128.0, 256.0))
ABOUT = "Synthetic toy shapes of this program's own generator, 64³ voxels, half sizes (bench/train_toy.py)."


def main(*, folder: Path = Path("runs/toy"), minutes: float = 30.0, count: int = 600, only: str | None = None) -> None:
    """Make the images if they are missing, then train both networks; interrupted runs are resumed.

    Parameters
    ----------
    folder
        Gets the images and the model files small.safetensors and seed.safetensors.
    minutes
        Training time of each network.
    count
        Training images.
    only
        Train just this preset, in this process (what the command does with itself).
    """
    if only is not None:
        _train(folder, only, minutes)
        return
    if not (folder / "data" / "datasets").is_dir():
        _generate(folder / "data", count)
    processes = [_start(folder, name, minutes, core) for core, name in enumerate(("small", "seed"))]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(1)


def _generate(data: Path, count: int) -> None:
    from napari_mrcnn3d._cli_progress import follow
    from napari_mrcnn3d.data.toy import generate_toy_steps

    follow(generate_toy_steps(IMAGES, data, count, workers=os.cpu_count() or 1))


def _start(folder: Path, name: str, minutes: float, core: int) -> subprocess.Popen[bytes]:
    """A process that trains one network with one thread, on a core of its own where the system can say so."""
    command = [sys.executable, __file__, "--folder", str(folder), "--minutes", str(minutes), "--only", name]
    pin = (lambda: os.sched_setaffinity(0, {core})) if hasattr(os, "sched_setaffinity") else None
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, preexec_fn=pin, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _train(folder: Path, name: str, minutes: float) -> None:
    from napari_mrcnn3d._cli_progress import follow
    from napari_mrcnn3d.training.checkpoint import checkpoint_path
    from napari_mrcnn3d.training.trainer import train_steps

    model, data, train = preset(name)
    if name == "seed":
        model = model.model_copy(update={"anchor_sizes": HALF_ANCHORS})
    changes = {"minutes": minutes, "about": ABOUT, "validate_minutes": 2 * minutes}
    out = folder / f"{name}.safetensors"
    steps = train_steps(
        folder / "data" / "datasets" / "train.csv",
        out,
        model=model,
        data=data.model_copy(update={"validation_share": 0.02}),
        train=train.model_copy(update=changes),
        resume=checkpoint_path(out).exists(),
    )
    with closing(steps):
        follow(steps, name)


if __name__ == "__main__":
    cyclopts.run(main)
