"""The state on disk: whole or not at all, and never code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from napari_mrcnn3d.structures import UserError
from napari_mrcnn3d.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint

STATE = {"model": {"weight": torch.arange(50_000.0)}, "step": 7, "metrics": {"loss": 0.5}, "average": None}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors.checkpoint"
    save_checkpoint(path, STATE)
    return path


def test_a_state_comes_back(checkpoint: Path) -> None:
    state = load_checkpoint(checkpoint)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert {k: state[k] for k in ("step", "metrics", "average")} == {
        k: STATE[k] for k in ("step", "metrics", "average")
    }


def test_it_lies_beside_its_model_and_alone(checkpoint: Path) -> None:
    assert checkpoint_path(checkpoint.parent / "m.safetensors") == checkpoint
    save_checkpoint(checkpoint, STATE | {"step": 8})
    assert load_checkpoint(checkpoint)["step"] == 8
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        torch.save({"model": _Bomb()}, "c", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(Path("c"))
    assert not Path("exploded").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(UserError, match=r"no checkpoint .*start without resuming"):
        load_checkpoint(path)
    np.savez(tmp_path / "c.npz", a=np.zeros(3))
    torch.save(torch.zeros(3), tmp_path / "tensor")
    contents = [b"", b"hello", os.urandom(500), (tmp_path / "c.npz").read_bytes(), (tmp_path / "tensor").read_bytes()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged: delete it"):
            load_checkpoint(path)


def test_a_torn_or_altered_checkpoint_is_refused_or_read(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for keep in (0.3, 0.9, 0.999):
        checkpoint.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 1500, 60):  # the pickle, whose every byte means something
        altered = bytearray(content)
        altered[position] ^= 1 << rng.integers(8)
        checkpoint.write_bytes(altered)
        try:
            assert isinstance(load_checkpoint(checkpoint), dict)
        except UserError as error:
            assert "is damaged" in str(error)  # noqa: PT017  # either is right, anything else is a crash


def test_a_place_that_cannot_be_written_leaves_the_old_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(checkpoint / "below", STATE)

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is the disk full"):
        save_checkpoint(checkpoint, {})
    assert load_checkpoint(checkpoint)["step"] == 7
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
