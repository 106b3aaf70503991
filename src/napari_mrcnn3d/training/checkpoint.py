"""The state of a training run on disk: what a killed run needs to go on."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from napari_mrcnn3d._files import atomic_write
from napari_mrcnn3d.structures import UserError

__all__ = ["checkpoint_path", "load_checkpoint", "save_checkpoint"]


def checkpoint_path(model_file: Path) -> Path:
    """Where the run that makes this model file keeps its state."""
    return model_file.with_name(model_file.name + ".checkpoint")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and texts, beside and renamed.

    Raises
    ------
    UserError
        If the file cannot be written; an earlier checkpoint stays.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's own writer does not say what went wrong
            raise UserError(f"The checkpoint cannot be written to {path} ({error}): is the disk full?") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state; code in the file is never run.

    Raises
    ------
    UserError
        If there is none, or the file is damaged or no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path} to resume from: start without resuming.")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not torch's format")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"holds a {type(state).__name__}")
    except (RuntimeError, OSError, EOFError, TypeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"The checkpoint {path} is damaged: delete it and start anew.") from error
    return state
