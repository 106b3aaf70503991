"""Model files: written, read, and refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save_file

from napari_mrcnn3d.model import weights
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.weights import available_models, find_model, load_model, read_header, save_model
from napari_mrcnn3d.structures import UserError
from tests._tiny import tiny_config, tiny_model

ABOUT = {"data": "toy", "figures": {"f1": 0.9}}


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return save_model(tiny_model(), tmp_path / "deep" / "tiny.safetensors", ABOUT)


def write(path: Path, header: Any, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A safetensors file with any header under our key."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"a": np.zeros(1, np.float16)}, path, metadata={"napari-mrcnn3d": text})
    return path


def header_with(**changes: Any) -> dict[str, Any]:
    config = tiny_config().model_dump(mode="json") | changes
    return {"format": 1, "config": config, "provenance": {}}


def test_a_model_comes_back_as_it_was(model_file: Path) -> None:
    model, found = tiny_model(), load_model(model_file)
    assert found.config == model.config
    assert not found.training
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.half().float()), name
    assert all(p.requires_grad and p.device.type == "cpu" for p in found.parameters())
    image = torch.rand(1, 1, 8, 16, 16)
    for a, b in zip(found.pyramid(image), model.pyramid(image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def test_the_header_says_all_and_the_file_is_half_as_large(model_file: Path) -> None:
    header = read_header(model_file)
    assert header.config == tiny_config()
    assert header.provenance == ABOUT
    numbers = sum(p.numel() for p in tiny_model().parameters())
    assert 2 * numbers < model_file.stat().st_size < 2 * numbers + 20_000


def test_saving_leaves_one_file_and_replaces_an_older_one(model_file: Path) -> None:
    save_model(tiny_model(seed=1), model_file, {"data": "newer"})
    assert list(model_file.parent.iterdir()) == [model_file]
    assert read_header(model_file).provenance == {"data": "newer"}


@pytest.mark.parametrize("place", ["file/in/a/file.safetensors", f"{'long' * 100}.safetensors", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_model(tiny_model(), tmp_path / place, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_model_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "available_models", lambda: {"embryo-nuclei": Path("x"), "toy": Path("y")})
    with pytest.raises(UserError, match=r"'nuclei'.*embryo-nuclei, toy"):
        find_model("nuclei")
    assert find_model("toy") == Path("y")


def test_bundled_models_are_found_by_name() -> None:
    for name, path in available_models().items():
        assert find_model(name) == path
        assert read_header(name).config.class_names


@pytest.mark.parametrize("content", [b"", b"II*\0" + bytes(100), pickle.dumps({"a": 1}), os.urandom(999)])
def test_any_other_file_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.safetensors is not a model file"):
        load_model(path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_renamed_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Bomb()}, "model.safetensors")
    with pytest.raises(UserError, match="is not a model file"):
        load_model("model.safetensors")
    assert not Path("exploded").exists()


def test_weights_of_another_program_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another program"):
        read_header(tmp_path / "b.safetensors")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(model_file: Path, keep: float) -> None:
    content = model_file.read_bytes()
    model_file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="is not a model file"):
        load_model(model_file)


def test_a_newer_format_asks_for_a_newer_program(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"newer version \(format 2\)"):
        read_header(write(tmp_path / "m.safetensors", {"format": 2}))


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[]",
        "[" * 100_000,
        {},
        {"format": "1", "config": {}, "provenance": {}},
        {"format": 1, "config": {}},
        header_with(stage_channels=[]),
        header_with(class_names=[]),
        header_with(anchor_sizes=[[], []]),
        header_with(stem_stride=[0, 1, 1]),
        header_with(voxel_size=[0, 1, 1]),
        header_with(norm="batch"),
        header_with(unheard_of=1),
    ],
    ids=lambda header: json.dumps(header)[-40:],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(UserError, match="damaged header"):
        load_model(write(tmp_path / "m.safetensors", header))


def test_weights_that_do_not_fit_the_header_are_refused(tmp_path: Path) -> None:
    state = {k: v.numpy() for k, v in tiny_model().state_dict().items()}
    for changes, tensors in (
        ({"fpn_channels": 16}, state),
        ({}, {k: v for k, v in state.items() if "mask_fcn" not in k}),
        ({}, state | {"surplus": np.zeros(1, np.float32)}),
    ):
        with pytest.raises(UserError, match="does not hold the weights"):
            load_model(write(tmp_path / "m.safetensors", header_with(**changes), tensors))


LARGEST: dict[str, Any] = {
    "stem_channels": 8192,
    "stem_kernel": [63, 63, 63],
    "stage_channels": [8192] * 3,
    "stage_blocks": [100] * 3,
    "fpn_channels": 8192,
    "rpn_channels": 8192,
    "box_head_features": 8192,
    "box_pool_size": [64, 64, 64],
    "mask_pool_size": [64, 64, 64],
    "mask_head_channels": [8192] * 16,
}
"""All that a header may ask for: a network of 10**15 weights."""


def test_a_header_that_asks_for_a_gigantic_network_takes_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", header_with(**LARGEST))
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match="does not hold the weights"):
        load_model(path)
    assert psutil.Process().memory_info().rss - before < 200e6


@pytest.mark.parametrize("field", ["stem_channels", "fpn_channels", "stage_blocks", "stage_channels", "stem_kernel"])
def test_a_header_cannot_ask_for_more(tmp_path: Path, field: str) -> None:
    asked = {key: 10**12 if isinstance(value, int) else [10**12] * 3 for key, value in LARGEST.items() if key == field}
    with pytest.raises(UserError, match="damaged header"):
        load_model(write(tmp_path / "m.safetensors", header_with(**asked)))


def test_reading_a_header_needs_no_torch(model_file: Path) -> None:
    code = (
        "import sys; from napari_mrcnn3d.model.weights import read_header, available_models\n"
        f"available_models(); print(read_header({str(model_file)!r}).config.fpn_channels, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["8", "False"]


def test_a_loaded_network_can_go_on_learning(model_file: Path) -> None:
    model: MaskRCNN3D = load_model(model_file).train()
    model.pyramid(torch.rand(1, 1, 8, 16, 16))[0].sum().backward()
    assert model.backbone.stem[0].weight.grad is not None
