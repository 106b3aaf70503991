"""Training runs of a few steps: whole, cut short, killed, resumed and refused."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

from napari_mrcnn3d.config import DataConfig, ModelConfig, PredictConfig, SelectConfig, TrainConfig
from napari_mrcnn3d.inference.paint import paint
from napari_mrcnn3d.inference.predictor import Predictor
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.metrics.matching import matching
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.weights import load_model, read_header
from napari_mrcnn3d.structures import DeviceMemoryError, Progress, Steps, UserError, Volume, drain
from napari_mrcnn3d.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from napari_mrcnn3d.training.trainer import train_steps
from tests._tiny import EIGHT, ellipsoids, picture, tiny_config, write_pairs

DATA = DataConfig(patch_size=(16, 24, 24))
TRAIN = TrainConfig(steps=4, fit_model=False, precision="fp32", device="cpu", ema=0.5, seed=3)
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are taken in the same order each time, and the machine stays usable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models" / "m.safetensors"


def start(
    folder: Path,
    out: Path,
    *,
    model: ModelConfig | None = None,
    resume: bool = False,
    data: DataConfig = DATA,
    **train: Any,
) -> Steps[Path]:
    settings = TRAIN.model_copy(update=train)
    return train_steps(folder, out, model=model or tiny_config(), data=data, train=settings, resume=resume)


def until(steps: Steps[Path], step: int) -> Progress:
    """Run a training up to a step, and give what it said there."""
    for progress in steps:
        if progress.stage == "Training" and progress.metrics["step"] == step:
            return progress
    raise AssertionError(f"the training ended before step {step}")


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    """The model file of an uninterrupted run, and what it reported."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "m.safetensors"
    return out, list(start(pairs, out))


def test_a_run_ends_in_a_model_file_that_says_where_it_comes_from(finished: tuple[Path, list[Progress]]) -> None:
    out, _ = finished
    assert [p.name for p in out.parent.iterdir()] == ["m.safetensors"]
    header = read_header(out)
    assert header.config == tiny_config()
    about = header.provenance
    assert (about["steps"], about["images"], about["objects"], about["data"]) == (4, 1, 8, "data")
    assert {*about["training_groups"], *about["validation_groups"]} == {"cells0", "cells1"}
    assert about["train"]["seed"] == 3
    assert set(about["metrics"]) >= LOSSES


def test_a_run_reports_what_a_person_wants_to_know(finished: tuple[Path, list[Progress]]) -> None:
    _, seen = finished
    assert list(dict.fromkeys(step.stage for step in seen)) == ["Reading images", "Training", "Validating"]
    training = [step for step in seen if step.stage == "Training"]
    assert [step.done for step in training] == [1, 2, 3, 4, 4]
    assert {step.total for step in training} == {4}
    for step in training:
        assert set(step.metrics) >= {"loss", "learning_rate", "step", "seconds_left", *LOSSES}
        assert all(np.isfinite(v) for v in step.metrics.values())
        assert step.metrics["loss"] == pytest.approx(sum(step.metrics[name] for name in LOSSES), rel=1e-4)
    assert training[0].metrics["seconds_left"] > 0
    assert training[-1].metrics["seconds_left"] == 0
    assert "val_f1" in training[-1].metrics


@pytest.mark.parametrize("cut", [1, 3])
def test_a_run_cut_short_and_resumed_learns_the_same(
    finished: tuple[Path, Any], pairs: Path, out: Path, cut: int
) -> None:
    steps = start(pairs, out)
    until(steps, cut)
    steps.close()
    assert load_checkpoint(checkpoint_path(out))["step"] == cut
    assert load_model(out).config == tiny_config()  # usable although unfinished
    assert not same_weights(out, finished[0])
    assert drain(start(pairs, out, resume=True)) == out
    assert same_weights(out, finished[0])
    assert not checkpoint_path(out).exists()


def test_workers_change_nothing_but_the_time(finished: tuple[Path, Any], pairs: Path, out: Path) -> None:
    drain(start(pairs, out, data=DATA.model_copy(update={"workers": 1})))
    assert same_weights(out, finished[0])


def test_another_seed_learns_something_else(finished: tuple[Path, Any], pairs: Path, out: Path) -> None:
    drain(start(pairs, out, seed=4, ema=0.0, optimizer="sgd"))
    assert not same_weights(out, finished[0])


_CHILD = """
import sys, torch
from pathlib import Path
from tests.training.test_trainer import start, tiny_config
torch.set_num_threads(1)
for progress in start(Path(sys.argv[1]), Path(sys.argv[2]), steps=100_000, checkpoint_minutes=1e-9):
    print(progress.stage, flush=True)
"""


def test_a_killed_run_goes_on_where_it_was(pairs: Path, out: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, str(pairs), str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        while not checkpoint_path(out).exists():
            assert child.poll() is None, "the training ended by itself"
            time.sleep(0.02)
        time.sleep(0.3)  # a few steps on, perhaps in the middle of writing
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    step = load_checkpoint(checkpoint_path(out))["step"]
    steps = start(pairs, out, resume=True, steps=100_000)
    assert next(s for s in steps if s.stage == "Training").metrics["step"] == step + 1 > 1
    steps.close()
    assert read_header(out).provenance["steps"] == step + 1


def test_cancelling_takes_less_than_a_second(pairs: Path, out: Path) -> None:
    steps = start(pairs, out, steps=1000)
    until(steps, 1)
    begin = time.perf_counter()
    steps.close()
    assert time.perf_counter() - begin < 1
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.safetensors", "m.safetensors.checkpoint"]


def test_cancelling_while_reading_or_validating(pairs: Path, out: Path) -> None:
    steps = start(pairs, out)
    assert next(steps).stage == "Reading images"
    steps.close()
    assert not any(out.parent.iterdir())
    steps = start(pairs, out, validate_minutes=1e-9)
    assert next(s for s in steps if s.stage == "Validating")
    steps.close()
    assert load_checkpoint(checkpoint_path(out))["step"] == 1


def test_a_run_by_the_clock_ends_by_the_clock(pairs: Path, out: Path) -> None:
    seen = [s for s in start(pairs, out, minutes=1 / 60) if s.stage == "Training"]
    done = [step.done for step in seen]
    assert done == sorted(done)
    assert seen[-1].done >= seen[-1].total == 1
    assert seen[0].metrics["seconds_left"] < 1
    assert seen[-1].metrics["learning_rate"] < seen[0].metrics["learning_rate"]


def test_nothing_is_overwritten(pairs: Path, out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"m\.safetensors exists already"):
        next(start(pairs, out))
    assert out.read_bytes() == b"precious"
    out.rename(checkpoint_path(out))
    with pytest.raises(UserError, match=r"unfinished training of m\.safetensors: resume it or delete it"):
        next(start(pairs, out))
    with pytest.raises(UserError, match="exists already"):
        next(start(pairs, out.parent, resume=True))


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        next(start(pairs, tmp_path / "file" / "m.safetensors"))


def test_data_that_cannot_be_learnt_from_leave_no_folder(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        next(start(tmp_path / "nowhere", out))
    assert not out.parent.exists()


def test_images_without_objects_cannot_be_learnt_from(tmp_path: Path, out: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", np.zeros((8, 16, 16), np.uint16), metadata={"axes": "ZYX"})
    with pytest.raises(UserError, match="No labelled object"):
        drain(start(tmp_path, out))


def test_only_a_checkpoint_that_fits_is_resumed(pairs: Path, out: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        drain(start(pairs, out, resume=True))
    steps = start(pairs, out)
    until(steps, 1)
    steps.close()
    state = load_checkpoint(checkpoint_path(out))
    two_classes = tiny_config(class_names=("a", "b")).model_dump(mode="json")
    for broken, message in (
        ({"model_config": two_classes}, "trained for the classes a, b, the folder holds object"),
        ({"model_config": {"norm": 3}}, "no checkpoint of a training"),
        ({"model": {}}, "damaged"),
        ({"train_config": {"steps": -1}}, "no checkpoint of a training"),
    ):
        save_checkpoint(checkpoint_path(out), state | broken)
        with pytest.raises(UserError, match=message):
            drain(start(pairs, out, resume=True))
    save_checkpoint(checkpoint_path(out), {"step": 1})
    with pytest.raises(UserError, match="no checkpoint of a training"):
        drain(start(pairs, out, resume=True))


def test_the_settings_name_the_class_where_the_folder_does_not(pairs: Path, out: Path) -> None:
    steps = start(pairs, out, steps=3, model=tiny_config(class_names=("nucleus",)))
    until(steps, 1)
    steps.close()
    assert read_header(out).config.class_names == ("nucleus",)
    drain(start(pairs, out, resume=True))
    assert read_header(out).config.class_names == ("nucleus",)


def test_a_resumed_run_keeps_its_own_settings(pairs: Path, out: Path) -> None:
    steps = start(pairs, out, steps=3, about="nuclei")
    until(steps, 1)
    steps.close()
    drain(start(pairs, out, resume=True, steps=50, optimizer="sgd", ema=0.0, model=tiny_config(stem_channels=8)))
    header = read_header(out)
    assert header.provenance["steps"] == 3
    assert header.provenance["description"] == "nuclei"
    assert header.config.stem_channels == tiny_config().stem_channels


def test_a_step_without_a_finite_gradient_is_left_out(
    pairs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, networks = MaskRCNN3D.loss, []

    def sometimes(self: MaskRCNN3D, *args: Any) -> dict[str, torch.Tensor]:
        networks.append(self)
        factor = float("nan") if len(networks) == 2 else 1.0
        return {name: factor * value for name, value in original(self, *args).items()}

    monkeypatch.setattr(MaskRCNN3D, "loss", sometimes)
    steps = start(pairs, out, ema=0.0)
    seen = {}
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            assert np.isfinite(until(steps, step).metrics["loss"])
            seen[step] = {k: v.clone() for k, v in networks[-1].state_dict().items()}
    steps.close()
    assert "Step 1 gave no finite gradient and was left out" in caplog.text
    assert all(torch.equal(seen[1][k], seen[2][k]) for k in seen[1])
    assert not all(torch.equal(seen[2][k], seen[3][k]) for k in seen[1])
    assert all(torch.isfinite(v).all() for v in load_file(out).values())


def test_other_errors_come_through_and_keep_what_was_learnt(
    pairs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    steps = start(pairs, out)
    until(steps, 2)
    monkeypatch.setattr(MaskRCNN3D, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        drain(steps)
    assert load_checkpoint(checkpoint_path(out))["step"] == 2


def test_checkpoints_are_written_on_the_way(pairs: Path, out: Path) -> None:
    steps = start(pairs, out, checkpoint_minutes=1e-9, ema=0.0)
    for step in (1, 2, 3):
        until(steps, step)
        assert checkpoint_path(out).exists() == (step > 1)
    assert load_checkpoint(checkpoint_path(out))["step"] == 2
    assert not out.exists()
    steps.close()
    assert drain(start(pairs, out, resume=True, ema=0.0)) == out


def test_a_full_memory_is_explained_and_leaves_nothing(pairs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskRCNN3D, "loss", full)
    with pytest.raises(DeviceMemoryError, match=r"1 patch\(es\) of \(16, 24, 24\) voxels.*smaller patch_size"):
        drain(start(pairs, out))
    assert not any(out.parent.iterdir())


def test_the_network_is_fitted_to_the_objects(tmp_path: Path, out: Path) -> None:
    labels = ellipsoids((32, 44, 44), EIGHT)
    for name, data in (("images", picture(labels)), ("labels", labels.astype(np.uint8))):
        (tmp_path / name).mkdir()
        size = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
        tifffile.imwrite(tmp_path / name / "a.tif", data, imagej=True, resolution=(2, 2), metadata=size)
    (tmp_path / "classes").mkdir()
    rows = "".join(f"{k},{'round' if k % 2 else 'oblong'}\n" for k in range(1, 9))
    (tmp_path / "classes" / "a.csv").write_text("label,class\n" + rows)
    drain(start(tmp_path, out, steps=1, fit_model=True, optimizer="sgd"))
    config = read_header(out).config
    assert config.class_names == ("oblong", "round")
    assert config.voxel_size == (2.0, 0.5, 0.5)
    assert config.anchor_sizes == (((8.0, 14.0, 14.0),),)
    assert config.object_size == pytest.approx((8 * 2 * 14 * 0.5 * 14 * 0.5) ** (1 / 3), rel=0.01)
    assert read_header(out).provenance["validation_groups"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on an idle core
def test_a_small_network_learns_a_volume_by_heart(tmp_path: Path, out: Path) -> None:
    write_pairs(tmp_path / "data", count=1)
    wider = {"stem_channels": 12, "stage_channels": (16, 24, 32), "fpn_channels": 24, "rpn_channels": 24}
    heads = {
        "box_head_channels": (24,),
        "box_head_features": 64,
        "mask_head_channels": (24,),
        "mask_pool_size": (5, 7, 7),
    }
    samples = {"rpn_batch_size": 128, "roi_batch_size": 32, "mask_batch_size": 8}
    anchors = {"anchor_sizes": (((8, 14, 14),),) * 2, "roi_canonical_size": 11.0}
    config = tiny_config(**wider, **heads, **samples, **anchors)
    data = DataConfig(patch_size=(32, 44, 44), augment=False)
    drain(start(tmp_path / "data", out, model=config, data=data, steps=150, learning_rate=3e-3, ema=0.9))
    labels = ellipsoids((32, 44, 44), EIGHT)
    candidates = Predictor(load_model(out), "cpu").predict(Volume(picture(labels)), PredictConfig())
    found = matching(labels, paint(candidates, select(candidates, SelectConfig())), thresh=0.5)
    assert found.f1 > 0.9
    assert found.mean_matched_score > 0.7
