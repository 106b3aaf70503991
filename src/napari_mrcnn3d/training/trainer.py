"""The training loop: a generator of progress that ends in a model file.

A run is a function of its settings and its seed: everything random in step ``n`` is drawn from the seed and ``n``, so
a killed run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from napari_mrcnn3d import __version__
from napari_mrcnn3d.config import DataConfig, ModelConfig, TrainConfig
from napari_mrcnn3d.data.augment import augment
from napari_mrcnn3d.data.patches import Patch, PatchSampler
from napari_mrcnn3d.data.volumes import UNNAMED, LabelledVolume, Pair, find_pairs, split_groups
from napari_mrcnn3d.device import autocast, choose_device, is_out_of_memory
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Target
from napari_mrcnn3d.model.weights import save_model
from napari_mrcnn3d.structures import DeviceMemoryError, Progress, Steps, UserError
from napari_mrcnn3d.training.anchor_tuning import anchor_coverage, fit_model, fit_patch
from napari_mrcnn3d.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from napari_mrcnn3d.training.optim import averaged, learning_rate, make_optimizer
from napari_mrcnn3d.training.preparation import model_voxel_size, prepare, sides_of
from napari_mrcnn3d.training.validation import validate_steps

__all__ = ["train_steps"]

logger = logging.getLogger(__name__)

MOST_NAMES = 30  # of groups in the header of a model file
SMOOTHING = 0.98  # of the losses shown: about the last fifty steps


def train_steps(
    folder: Path, out: Path, *, model: ModelConfig, data: DataConfig, train: TrainConfig, resume: bool = False
) -> Steps[Path]:
    """Train a network on a folder of images and labels.

    Parameters
    ----------
    folder : Path
        See :func:`~napari_mrcnn3d.data.volumes.find_pairs` for what it may look like.
    out : Path
        Model file to make; the run's state lies beside it as ``<out>.checkpoint`` until the run has ended.
    model, data, train : configs
        When resuming, all settings but ``device`` and ``workers`` come from the checkpoint.
    resume : bool
        Go on from the checkpoint.

    Yields
    ------
    Progress
        In seconds if the run has a time limit, else in steps. Metrics: ``loss`` and its five parts (moving means),
        ``learning_rate``, ``step``, ``seconds_left``, and ``val_f1`` once there was a validation.

    Returns
    -------
    Path
        The model file. If the generator is closed before the end, the state so far is in the checkpoint and, once
        a step was made, a usable model in ``out``.

    Raises
    ------
    UserError
        If the folder, a file in it, the checkpoint or ``out`` cannot be used.
    """
    out = Path(out)
    _refuse_to_overwrite(out, resume=resume)
    state = load_checkpoint(checkpoint_path(out)) if resume else None
    if state is not None:
        model, data, train = _settings_of(state, out, data, train)
    run = _Run(out, data, train)
    pairs, class_names = find_pairs(Path(folder), data.group_pattern)
    training, validation = split_groups(pairs, validation=data.validation, share=data.validation_share, seed=train.seed)
    _check_writable(out)
    volumes = []
    for count, pair in enumerate(training, start=1):
        volumes.append(pair.load())
        yield Progress(count, len(training), "Reading images")
    if not any(len(v.classes) > 1 for v in volumes):
        raise UserError(f"No labelled object is in the training images of {folder}: check the label files.")
    run.set_up(model, volumes, class_names, state)
    run.provenance |= {
        "description": train.about,
        "data": Path(folder).resolve().name,
        "training_groups": _groups(training),
        "validation_groups": _groups(validation),
    }
    logger.info("%s", run.describe())
    chosen = validation[:: max(1, -(-len(validation) // train.validate_volumes))]
    try:
        yield from _loop(run, lambda: [pair.load() for pair in chosen])
    finally:
        if run.step:  # before the first step there is nothing to keep
            run.save()
            run.export()
    checkpoint_path(out).unlink(missing_ok=True)
    return out


def _groups(pairs: Sequence[Pair]) -> list[str] | int:
    """Names of the groups; their number where they are too many to read."""
    groups = sorted({pair.group for pair in pairs})
    return groups if len(groups) <= MOST_NAMES else len(groups)


def _settings_of(
    state: dict[str, Any], out: Path, data: DataConfig, train: TrainConfig
) -> tuple[ModelConfig, DataConfig, TrainConfig]:
    """Settings of a run that is resumed: its own, or it would be another run; only the machine may have changed."""
    try:
        return (
            ModelConfig.model_validate(state["model_config"]),
            DataConfig.model_validate(state["data_config"]).model_copy(update={"workers": data.workers}),
            TrainConfig.model_validate(state["train_config"]).model_copy(update={"device": train.device}),
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{checkpoint_path(out)} is no checkpoint of a training: delete it.") from error


def _refuse_to_overwrite(out: Path, *, resume: bool) -> None:
    if out.is_dir() or (out.exists() and not resume):
        raise UserError(f"{out} exists already: choose another name, or resume its training.")
    if not resume and checkpoint_path(out).exists():
        raise UserError(f"{checkpoint_path(out)} holds an unfinished training of {out.name}: resume it or delete it.")


def _check_writable(out: Path) -> None:
    """Find out at once, not after hours, that the place for the model cannot be written to."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another place for the model.") from error


@dataclass
class _Run:
    """All that changes while a network is trained."""

    out: Path
    data: DataConfig
    train: TrainConfig
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def set_up(
        self,
        config: ModelConfig,
        volumes: Sequence[LabelledVolume],
        names: tuple[str, ...],
        state: dict[str, Any] | None,
    ) -> None:
        """Network, optimiser and patches; from the start or from a checkpoint's state."""
        if state is None:
            size = config.voxel_size or model_voxel_size(volumes)
            unnamed = names == UNNAMED and len(config.class_names) == 1  # then the settings may name the class
            names = config.class_names if unnamed else names
            config = config.model_copy(update={"class_names": names, "voxel_size": size})
            if self.train.fit_model:
                config = fit_model(config, sides_of(volumes, config))
        elif config.class_names != names and not (names == UNNAMED and len(config.class_names) == 1):
            raise UserError(
                f"{checkpoint_path(self.out)} was trained for the classes {', '.join(config.class_names)}, the folder "
                f"holds {', '.join(names)}: resume with the data it was started with."
            )
        self.device = choose_device(self.train.device)
        torch.manual_seed(self.train.seed)
        self.model = MaskRCNN3D(config).to(self.device)
        self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.average = averaged(self.model, self.train.ema) if self.train.ema else None
        self.optimizer = make_optimizer(self.model, self.train)
        if state is not None:
            self._restore(state)
        self.volumes = [prepare(v, config) for v in volumes]
        self.patch = self.data.patch_size or fit_patch(config, [v.labels.shape for v in self.volumes])
        self.coverage = anchor_coverage(config, sides_of(volumes, config), 0.5)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.seconds, self.metrics = state["step"], state["seconds"], dict(state["metrics"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{checkpoint_path(self.out)} is damaged: delete it and start anew.") from error

    def describe(self) -> str:
        """One line on what is trained."""
        config = self.model.config
        objects = sum(v.objects for v in self.volumes)
        weights = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"{len(self.volumes)} images with {objects} objects; patch {self.patch} voxels; "
            f"anchors on levels {config.rpn_levels}: {config.anchor_sizes}, which cover {self.coverage:.0%} of the "
            f"objects at IoU 0.5; {weights:.1f} million weights; {self.device}"
        )

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.train.minutes is not None:
            return self.seconds / (60 * self.train.minutes)
        return self.step / self.train.steps

    @property
    def best_weights(self) -> MaskRCNN3D:
        """The network to use: the averaged one where weights are averaged."""
        return self.model if self.average is None else cast(MaskRCNN3D, self.average.module)

    def patches(self) -> Iterator[list[Patch]]:
        """Batches from the current step on."""
        batch = self.train.batch_size
        sampler = PatchSampler(
            self.volumes,
            self.data,
            size=self.patch,
            seed=self.train.seed,
            length=2**40,
            augment=augment if self.data.augment else None,
        )
        loader: DataLoader[Patch] = DataLoader(
            sampler,  # type: ignore[arg-type]
            batch_size=batch,
            sampler=range(self.step * batch, 2**40),
            num_workers=self.data.workers,
            collate_fn=list,
        )
        return iter(loader)

    def advance(self, patches: list[Patch]) -> None:
        """One step of the optimiser."""
        torch.manual_seed(self.train.seed + 1_000_003 * (self.step + 1))
        rate = learning_rate(self.train, self.share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = torch.from_numpy(np.stack([p.image for p in patches]))[:, None].to(self.device)
        targets = [_target(p).to(self.device) for p in patches]
        with autocast(self.device, self.train.precision):
            losses = self.model.loss(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = self.train.clip_norm or float("inf")
        size = torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        if torch.isfinite(size):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        else:
            logger.warning("Step %d gave no finite gradient and was left out.", self.step)
        self.step += 1
        self._remember({"loss": total} | losses, rate)

    def _remember(self, losses: dict[str, torch.Tensor], rate: float) -> None:
        weight = max(1 - SMOOTHING, 1 / self.step)
        for name, value in losses.items():
            number = float(value.detach())
            if np.isfinite(number):
                self.metrics[name] = (1 - weight) * self.metrics.get(name, number) + weight * number
        self.metrics |= {"learning_rate": rate, "step": float(self.step)}

    def progress(self) -> Progress:
        """Where the run stands."""
        left = self.seconds * (1 - self.share) / self.share if self.share > 0 else 0.0
        metrics = self.metrics | {"seconds_left": max(left, 0.0)}
        if self.train.minutes is not None:
            total = round(60 * self.train.minutes)
            return Progress(min(round(self.seconds), total), total, "Training", metrics)
        return Progress(self.step, self.train.steps, "Training", metrics)

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(
            checkpoint_path(self.out),
            {
                "model_config": self.model.config.model_dump(mode="json"),
                "data_config": self.data.model_dump(mode="json"),
                "train_config": self.train.model_dump(mode="json"),
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "metrics": self.metrics,
            },
        )

    def export(self) -> None:
        """Write the model file."""
        facts = {
            "program": f"napari-mrcnn3d {__version__}",
            "date": date.today().isoformat(),
            "steps": self.step,
            "minutes": round(self.seconds / 60, 1),
            "patch": self.patch,
            "images": len(self.volumes),
            "objects": sum(v.objects for v in self.volumes),
            "train": self.train.model_dump(mode="json"),
            "metrics": {name: round(value, 4) for name, value in self.metrics.items()},
        }
        save_model(self.best_weights, self.out, self.provenance | facts)


def _loop(run: _Run, load_validation: Callable[[], list[LabelledVolume]]) -> Steps[None]:
    """Steps until the end, with checkpoints and validations between; only the steps count as training time."""
    saved = validated = run.seconds
    batches = run.patches()
    while run.share < 1:
        start = time.perf_counter()
        try:
            run.advance(next(batches))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"The memory is too small for {run.train.batch_size} patch(es) of {run.patch} voxels per step: choose "
                "a smaller patch_size or batch_size."
            ) from error
        run.seconds += time.perf_counter() - start
        yield run.progress()
        if run.seconds - saved >= 60 * run.train.checkpoint_minutes:
            run.save()
            saved = run.seconds
        if run.seconds - validated >= 60 * run.train.validate_minutes or run.share >= 1:
            found = yield from validate_steps(run.best_weights, load_validation(), run.train)
            run.metrics |= found
            run.model.train()
            validated = run.seconds
            yield run.progress()


def _target(patch: Patch) -> Target:
    arrays = (patch.boxes, patch.classes, patch.ids, patch.labels)
    boxes, classes, ids, labels = (torch.from_numpy(a) for a in arrays)
    return Target(boxes, classes, ids, labels)
