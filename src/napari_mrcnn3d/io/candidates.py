"""Candidates as one file: the network's answer, opened again without the network.

The file is safetensors (plain arrays behind a JSON header, nothing that runs when it is opened) with the suffix
``.mrcnn3d``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from napari_mrcnn3d._files import atomic_write, check_memory, input_file, read_failure
from napari_mrcnn3d.structures import Candidates, UserError, VoxelSize

__all__ = ["SUFFIX", "load_candidates", "save_candidates"]

SUFFIX = ".mrcnn3d"
_FORMAT = "napari-mrcnn3d candidates 1"
_DTYPES = {"boxes": np.float32, "scores": np.float32, "classes": np.int64, "masks": np.uint8}


def save_candidates(path: str | Path, candidates: Candidates) -> None:
    """Write candidates; they come back exactly the same.

    Parameters
    ----------
    path : path-like
        Replaced as a whole or not touched.
    candidates : Candidates

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(getattr(candidates, name), dtype) for name, dtype in _DTYPES.items()}
    about = {
        "shape": [int(side) for side in candidates.shape],
        "voxel_size": None if candidates.voxel_size is None else [float(side) for side in candidates.voxel_size],
        "class_names": list(candidates.class_names),
    }
    with atomic_write(path) as temporary:
        temporary.touch()  # missing folders and rights show here, with their code; a full disk below, without
        try:
            save_file(arrays, temporary, {"format": _FORMAT, "about": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(f"{error}") from error


def load_candidates(path: str | Path) -> Candidates:
    """Read what :func:`save_candidates` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Candidates

    Raises
    ------
    UserError
        If the file is missing, no candidates file, damaged, or too large for the memory.
    """
    path = Path(path)
    input_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} holds no candidates of this version: give a {SUFFIX} file saved by it.")
            check_memory(path.stat().st_size, path)
            arrays = {name: file.get_tensor(name) for name in _DTYPES}
    except SafetensorError as error:
        raise UserError(f"{path} is no {SUFFIX} file, or is cut off: save the candidates again.") from error
    except OSError as error:
        raise UserError(read_failure(path, error)) from error
    try:
        return _candidates(arrays, json.loads(metadata["about"]))
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} has damaged content ({error}): save the candidates again.") from error


def _candidates(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Candidates:
    """Build candidates from a foreign file; a ValueError says what is not as :class:`Candidates` promises."""
    shape, voxel_size, class_names = about["shape"], about["voxel_size"], about["class_names"]
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"image shape {shape}")
    if not class_names or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class names {class_names}")
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"{name} are {arrays[name].dtype}")
    boxes, scores, classes = arrays["boxes"], arrays["scores"], arrays["classes"]
    candidates = Candidates(
        **arrays,
        shape=(shape[0], shape[1], shape[2]),
        voxel_size=None if voxel_size is None else VoxelSize.of(voxel_size),
        class_names=tuple(class_names),
    )
    if not (np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= [*shape, *shape]).all()):
        raise ValueError("boxes outside the image")
    if not ((scores >= 0) & (scores <= 1)).all() or (np.diff(scores) > 0).any():
        raise ValueError("scores not falling from 1 to 0")
    if not ((classes >= 1) & (classes <= len(class_names))).all():
        raise ValueError("classes without a name")
    return candidates
