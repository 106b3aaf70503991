"""Model files: weights with, in their header, all that is needed to use them.

One ``.safetensors`` file: opening someone's model never runs their code. Reading a header needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_mrcnn3d._files import atomic_write
from napari_mrcnn3d.config import ModelConfig
from napari_mrcnn3d.structures import UserError

if TYPE_CHECKING:
    from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D

__all__ = ["ModelHeader", "available_models", "find_model", "load_model", "read_header", "save_model"]

FORMAT = 1
_KEY = "napari-mrcnn3d"


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says of itself.

    Attributes
    ----------
    config : ModelConfig
        Network, classes, training voxel size, intensity rule.
    provenance : dict
        Where the weights come from: data, licence, training time, version, figures.
    """

    config: ModelConfig
    provenance: dict[str, Any] = field(default_factory=dict)


def available_models() -> dict[str, Path]:
    """Names and files of the models that come with the package."""
    folder = Path(__file__).resolve().parents[1] / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_model(name: str | Path) -> Path:
    """File of a model given by the name of a bundled one or by its path.

    Raises
    ------
    UserError
        If it is neither.
    """
    bundled = available_models()
    if str(name) in bundled:
        return bundled[str(name)]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(bundled) or "none"
        raise UserError(f"There is no model {str(name)!r}: give a model file or a bundled name ({known}).")
    return path


def read_header(name: str | Path) -> ModelHeader:
    """Header of a model file, weights unread.

    Raises
    ------
    UserError
        If it is no model file of this program, or of a newer one.
    """
    from safetensors import SafetensorError, safe_open

    path = find_model(name)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a model file: choose one that mrcnn3d has written (.safetensors).") from error
    if _KEY not in metadata:
        raise UserError(f"{path} holds weights of another program: choose a model file that mrcnn3d has written.")
    try:
        header = json.loads(metadata[_KEY])
        if header["format"] > FORMAT:
            raise UserError(
                f"{path} was written by a newer version (format {header['format']}): update napari-mrcnn3d."
            )
        return ModelHeader(ModelConfig.model_validate(header["config"]), dict(header["provenance"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header: get the model file again.") from error


def load_model(name: str | Path) -> MaskRCNN3D:
    """Network with the weights of a model file, in evaluation mode on the processor.

    Parameters
    ----------
    name : str or Path
        A bundled model's name or a file.

    Raises
    ------
    UserError
        If it is no usable model file.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D

    path = find_model(name)
    header = read_header(path)
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes a foreign header asks for
            model = MaskRCNN3D(header.config)
        state = {key: value.float() for key, value in load_file(path).items()}
        model.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights its header describes: get the model file again.") from error
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model.eval()


def save_model(model: MaskRCNN3D, path: str | Path, provenance: dict[str, Any]) -> Path:
    """Write a model file, beside and renamed. Weights are stored as float16.

    Parameters
    ----------
    model : MaskRCNN3D
    path : str or Path
    provenance : dict
        JSON-able.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    import torch
    from safetensors.torch import save

    path = Path(path)
    header = {"format": FORMAT, "config": model.config.model_dump(mode="json"), "provenance": provenance}
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(state, metadata={_KEY: json.dumps(header)}))
    return path
