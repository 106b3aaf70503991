"""The command line: ``mrcnn3d generate | train | predict | evaluate | info | selftest``.

Every option is a field of a config class, with its default and its sentence; here they only meet the functions that do
the work. Nothing heavy is imported before a command runs, so that the help opens at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

import cyclopts
from cyclopts import App, Parameter
from pydantic import BaseModel, ValidationError, model_validator

from napari_mrcnn3d import __version__
from napari_mrcnn3d._cli_files import matched, outputs
from napari_mrcnn3d._cli_progress import follow
from napari_mrcnn3d.config import (
    DataConfig,
    EmbryoConfig,
    ModelConfig,
    PredictConfig,
    SelectConfig,
    ToyConfig,
    TrainConfig,
    preset,
)
from napari_mrcnn3d.device import is_out_of_memory
from napari_mrcnn3d.structures import UserError, VoxelSize

if TYPE_CHECKING:
    from napari_mrcnn3d.inference.predictor import Predictor
    from napari_mrcnn3d.metrics.report import LabelPair

__all__ = ["app", "main"]

Config = TypeVar("Config", bound=BaseModel)

USAGE_ERROR, INTERRUPTED = 2, 130

app = App(
    name="mrcnn3d",
    help="Find objects in 3D microscopy images. Without a screen, what napari-mrcnn3d does in napari.",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
generate = App(name="generate", help="Make synthetic images with labels, to learn from or to pre-train on.")
app.command(generate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process if not given.

    Returns
    -------
    int
        Exit code: 0, 1 (a self-test failed), 2 (the input cannot be used: one sentence on standard error) or 130
        (stopped by Ctrl-C).
    """
    _listen()
    try:
        answer = app(arguments, exit_on_error=False, print_error=False, verbose=False)
    except (cyclopts.CycloptsError, ValidationError) as error:
        return _fail(_usage_sentence(error))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("Stopped. Nothing half-written was left behind; a training goes on where it was with --resume.")
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("The memory is too small for this: choose a smaller --patch-size or --tile, or --device cpu.")
    return answer if isinstance(answer, int) else 0


# --- commands


class _ModelOptions(ModelConfig):
    """The network's settings as options: they belong together only once they are laid over a preset."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        return self


class _PredictOptions(PredictConfig):
    """The settings of a prediction, those of the selection beside the others."""

    select: Annotated[SelectConfig, Parameter(name="*")] = PredictConfig.model_fields["select"].default


@app.command
def train(
    *,
    data: Path,
    out: Path,
    preset_name: Annotated[Literal["small", "seed"], Parameter(name="--preset")] = "small",
    resume: Annotated[bool, Parameter(negative=())] = False,
    cut: Annotated[DataConfig | None, Parameter(name="*", group="Data")] = None,
    run: Annotated[TrainConfig | None, Parameter(name="*", group="Training")] = None,
    network: Annotated[_ModelOptions | None, Parameter(name="network", group="Network")] = None,
) -> None:
    """Train a network on images and their labels.

    Parameters
    ----------
    data
        Folder with the sub-folders images and labels (TIFF files of equal names), or the predecessor's files.
    out
        The model file to write (.safetensors).
    preset_name
        Settings to begin with; the defaults below are those of small.
    resume
        Go on where an interrupted training with the same --out stopped.
    """
    from napari_mrcnn3d.training.trainer import train_steps

    model_config, data_config, train_config = preset(preset_name)
    steps = train_steps(
        data,
        out,
        model=_overlaid(model_config, network),
        data=_overlaid(data_config, cut),
        train=_overlaid(train_config, run),
        resume=resume,
    )
    print(follow(steps))


@app.command
def predict(
    *inputs: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    model: str = "embryo-nuclei",
    options: Annotated[_PredictOptions | None, Parameter(name="*")] = None,
) -> int:
    """Segment images: a label TIFF each, and beside it a table (.csv) of the objects.

    Parameters
    ----------
    inputs
        TIFF stacks, folders of them, or patterns such as "day1/*.tif".
    out
        The label TIFF to write; the folder to write to if there are several inputs.
    model
        A model that comes with the program (see mrcnn3d info) or a model file.
    """
    from napari_mrcnn3d.inference.predictor import Predictor
    from napari_mrcnn3d.model.weights import load_model

    config = options or _PredictOptions()
    jobs = outputs(inputs, out)
    predictor = Predictor(load_model(model), device=config.device)
    failures = 0
    for source, target in jobs:
        try:
            _segment(source, target, predictor, config)
        except UserError as error:
            if len(jobs) == 1:
                raise
            _say(str(error))
            failures += 1
    if failures:
        return _fail(f"{failures} of {len(jobs)} images could not be segmented, for the reasons above.")
    return 0


@generate.command
def toy(
    *,
    out: Path,
    count: int,
    config: Annotated[ToyConfig | None, Parameter(name="*", group="Images")] = None,
    workers: int | None = None,
) -> None:
    """Make the predecessor's toy images: ellipsoids, cuboids and pyramids in heavy noise.

    Parameters
    ----------
    out
        Folder to write to.
    count
        Number of images.
    workers
        Processes that make images; one per processor core if not given. The images do not depend on it.
    """
    from napari_mrcnn3d.data.toy import generate_toy_steps

    follow(generate_toy_steps(config or ToyConfig(), out, count, workers=workers or os.cpu_count() or 1))


@generate.command
def embryo(
    *,
    out: Path,
    count: int,
    config: Annotated[EmbryoConfig | None, Parameter(name="*", group="Images")] = None,
    workers: int | None = None,
) -> None:
    """Make synthetic embryos: bright nuclei as a microscope sees them.

    Parameters
    ----------
    out
        Folder to write to.
    count
        Number of images.
    workers
        Processes that make images; one per processor core if not given. The images do not depend on it.
    """
    from napari_mrcnn3d.data.embryo import generate_embryo_steps

    follow(generate_embryo_steps(config or EmbryoConfig(), out, count, workers=workers or os.cpu_count() or 1))


@app.command
def evaluate(prediction: Path, truth: Path, *, out: Path | None = None) -> None:
    """Compare label images with the truth and print the figures as JSON.

    Parameters
    ----------
    prediction
        A label TIFF, or a folder of them.
    truth
        The true label TIFF, or a folder with files of the same names.
    out
        Also write the figures to this file.
    """
    from napari_mrcnn3d._files import atomic_write
    from napari_mrcnn3d.metrics.report import evaluate_steps, to_json

    text = to_json(follow(evaluate_steps(_Pairs(matched(prediction, truth)))))
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text, end="")


@app.command
def info() -> None:
    """Say what is installed: versions, device, models, and how the heavy operations are computed."""
    from napari_mrcnn3d.selftest import facts

    for name, value in facts():
        print(f"{name:<24} {value}")


@app.command
def selftest() -> int:
    """Check on this machine that everything computes what it should; exit code 1 if something does not."""
    from napari_mrcnn3d.selftest import run_checks

    failed = 0
    for check in run_checks():
        failed += check.problem is not None
        verdict = "ok" if check.problem is None else "FAILED"
        print(f"{verdict:<7} {check.seconds:6.1f} s  {check.name}" + (f": {check.remark}" if check.remark else ""))
    return 1 if failed else 0


# --- images and pairs


def _segment(source: Path, target: Path, predictor: Predictor, config: PredictConfig) -> None:
    """One image: labels and table, both or neither."""
    from napari_mrcnn3d.editing.measure import instance_table
    from napari_mrcnn3d.inference.paint import Footprints, paint
    from napari_mrcnn3d.inference.select import select
    from napari_mrcnn3d.io.tables import write_table
    from napari_mrcnn3d.io.tiff import read_image, write_labels

    volume = read_image(source)
    if config.voxel_size is not None:
        volume = replace(volume, voxel_size=VoxelSize.of(config.voxel_size))
    footprints = Footprints.of(follow(predictor.predict_steps(volume, config), name=source.name))
    instances = select(footprints, config.select)
    labels = paint(footprints, instances)
    write_labels(target, labels, volume.voxel_size)
    try:
        write_table(target.with_suffix(".csv"), instance_table(labels, instances, volume.voxel_size))
    except (UserError, KeyboardInterrupt):
        target.unlink()
        raise
    print(f"{target}: {len(instances)} object{'' if len(instances) == 1 else 's'}")


@dataclass(frozen=True)
class _Pairs:
    """Label files, read one pair at a time."""

    files: list[tuple[Path, Path]]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[LabelPair]:
        from napari_mrcnn3d.io.tiff import read_labels
        from napari_mrcnn3d.metrics.report import LabelPair

        for prediction, truth in self.files:
            yield LabelPair(prediction.stem, truth=read_labels(truth).data, prediction=read_labels(prediction).data)


# --- options and errors


def _overlaid(base: Config, given: BaseModel | None) -> Config:
    """Settings with those replaced that were given on the command line."""
    changes = {} if given is None else given.model_dump(exclude_unset=True)
    return type(base).model_validate(base.model_dump() | changes)


def _usage_sentence(error: Exception) -> str:
    """One sentence on a command line that could not be understood."""
    cause = error if isinstance(error, ValidationError) else error.__cause__
    if isinstance(cause, ValidationError):
        return _setting_sentence(cause)
    return " ".join(str(error).split()).rstrip(".") + ". See --help."


def _setting_sentence(error: ValidationError) -> str:
    """One sentence on the first setting that is out of range."""
    first = error.errors(include_url=False)[0]
    problem = first["msg"].removeprefix("Value error, ")
    names = [str(part).replace("_", "-") for part in first["loc"] if not isinstance(part, int)]
    if not names:  # several settings together
        return f"The settings do not fit together: {problem}. See --help."
    prefix = "network." if "Model" in error.title else ""
    return f"--{prefix}{names[-1]} {first['input']!s:.60}: {problem}. See --help."


def _listen() -> None:
    """Let what the package logs be read on standard error; what other libraries log is for developers."""
    logging.getLogger().addHandler(logging.NullHandler())
    logger = logging.getLogger("napari_mrcnn3d")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("mrcnn3d: %(message)s"))
        logger.addHandler(handler)


def _say(sentence: str) -> None:
    print(f"mrcnn3d: {sentence}", file=sys.stderr)


def _fail(sentence: str) -> int:
    _say(sentence)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
