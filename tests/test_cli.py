"""The command line as a user meets it: options, exit codes, sentences, and what lies on the disk afterwards."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from napari_mrcnn3d import __version__, selftest
from napari_mrcnn3d._cli_progress import follow
from napari_mrcnn3d.cli import app, main
from napari_mrcnn3d.config import DataConfig, EmbryoConfig, PredictConfig, SelectConfig, ToyConfig, TrainConfig, preset
from napari_mrcnn3d.io.tables import read_table
from napari_mrcnn3d.io.tiff import read_image, read_labels, write_image, write_labels
from napari_mrcnn3d.model.weights import save_model
from napari_mrcnn3d.structures import Progress, Steps, UserError, VoxelSize
from tests._tiny import tiny_model

SHAPE = (12, 40, 48)
SIZE = VoxelSize(2.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was never trained: what it finds is nonsense, but it finds it quickly."""
    return save_model(tiny_model(max_candidates=10), tmp_path_factory.mktemp("model") / "tiny.safetensors", {})


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.tif"
    write_image(path, np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16), SIZE)
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; gives its one sentence."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (sentence,) = [line for line in captured.err.splitlines() if not re.search(r"\d+% \d+/\d+", line)]
        assert sentence.startswith("mrcnn3d: ")
        assert sentence.endswith(".")
        return sentence

    return run


# --- what a command line says


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main([]) == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in ("generate", "train", "predict", "evaluate", "info", "selftest"))


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        (["predict"], [PredictConfig, SelectConfig]),
        (["train"], [DataConfig, TrainConfig]),
        (["generate", "toy"], [ToyConfig]),
        (["generate", "embryo"], [EmbryoConfig]),
    ],
)
def test_every_setting_is_an_option_with_its_own_sentence(
    command: list[str], configs: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main([*command, "--help"]) == 0
    helped = " ".join(capsys.readouterr().out.split())
    for config in configs:
        for name, field in config.model_fields.items():
            if name != "select":  # its own settings stand beside the others
                assert f"--{name.replace('_', '-')}" in helped
                assert field.description in helped


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["segment"], "segment"),
        (["predict", "a.tif"], "--out"),
        (["predict", "-o", "out.tif"], "No image"),
        (["predict", "a.tif", "-o", "out.tif", "--colour", "red"], "--colour"),
        (["predict", "a.tif", "-o", "out.tif", "--min-score", "1.5"], "--min-score 1.5"),
        (["predict", "a.tif", "-o", "out.tif", "--voxel-size", "1", "2"], "--voxel-size"),
        (["predict", "a.tif", "-o", "out.tif", "--voxel-size", "1", "2", "wide"], "--voxel-size wide"),
        (["predict", "a.tif", "-o", "out.png"], "out.png"),
        (["train", "--data", "d", "--out", "m", "--preset", "huge"], "huge"),
        (["train", "--data", "d", "--out", "m", "--steps", "0"], "--steps 0"),
        (["train", "--data", "d", "--out", "m", "--network.rpn-levels", "0", "1"], "anchor_sizes"),
        (["generate", "toy", "--out", "d"], "--count"),
    ],
)
def test_a_wrong_command_line_is_explained(refused: Callable[..., str], arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


# --- predict


def predict(source: object, out: object, model: Path, *more: str) -> int:
    return main(["predict", str(source), "-o", str(out), "--model", str(model), *more])


def test_predict_writes_labels_with_the_calibration_and_a_table(
    stack: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tif"
    assert predict(stack, out, model_file, "--min-score", "0", "--max-overlap", "1") == 0
    labels, table = read_labels(out), read_table(out.with_suffix(".csv"))
    assert labels.shape == SHAPE
    assert labels.voxel_size == pytest.approx(SIZE)
    ids, voxels = np.unique(np.asarray(labels.data)[np.asarray(labels.data) > 0], return_counts=True)
    assert len(ids) > 0
    assert capsys.readouterr().out == f"{out}: {len(ids)} objects\n"
    np.testing.assert_array_equal(table["label"], ids)
    np.testing.assert_array_equal(table["volume_voxels"], voxels)
    np.testing.assert_allclose(table["volume_um3"], voxels * SIZE.volume)
    wanted = {"label", "class", "score", *"z1 y1 x1 z2 y2 x2".split(), "centroid_z", "centroid_z_um", "volume_um3"}  # noqa: SIM905
    assert wanted <= set(table)


def test_a_given_voxel_size_wins_over_that_of_the_file(stack: Path, model_file: Path, tmp_path: Path) -> None:
    assert predict(stack, tmp_path / "out.tif", model_file, "--voxel-size", "3", "1", "1") == 0
    assert read_labels(tmp_path / "out.tif").voxel_size == pytest.approx((3, 1, 1))


def test_a_higher_score_limit_never_gives_more_objects(stack: Path, model_file: Path, tmp_path: Path) -> None:
    counts = []
    for limit in ("0", "0.5", "1"):
        assert predict(stack, tmp_path / "out.tif", model_file, "--min-score", limit) == 0
        counts.append(len(read_table(tmp_path / "out.csv")["label"]))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


@pytest.mark.parametrize("given", ["folder", "pattern", "names"])
def test_several_images_become_a_folder(given: str, stack: Path, model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "day1"
    folder.mkdir()
    for name in ("b.TIF", "a.tiff", "notes.txt"):
        (folder / name).write_bytes(stack.read_bytes())
    inputs = {
        "folder": [str(folder)],
        "pattern": [str(folder / "*.[tT][iI]*")],
        "names": [str(folder / "a.tiff"), str(folder / "b.TIF")],
    }[given]
    out = tmp_path / "new" / "out"
    assert main(["predict", *inputs, "-o", str(out), "--model", str(model_file)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.csv", "a.tif", "b.csv", "b.tif"]


def test_one_bad_image_among_several_does_not_stop_the_others(
    stack: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main(["predict", str(bad), str(stack), "-o", str(out), "--model", str(model_file)]) == 2
    assert sorted(p.name for p in out.iterdir()) == ["stack.csv", "stack.tif"]
    said = capsys.readouterr().err
    assert str(bad) in said
    assert "1 of 2 images" in said


@pytest.mark.parametrize("value", [0, 7])
def test_an_image_without_objects_gives_empty_labels(value: int, model_file: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "flat.tif", np.full(SHAPE, value, np.uint8), photometric="minisblack")
    assert predict(tmp_path / "flat.tif", tmp_path / "out.tif", model_file) == 0
    assert not np.asarray(read_labels(tmp_path / "out.tif").data).any()
    assert len(read_table(tmp_path / "out.csv")["label"]) == 0


def good_images() -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    ramp = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    return {
        "one slice": (ramp[None, :1, :, :].astype(np.uint16), {"metadata": {"axes": "QZYX"}, "ome": True}),
        "tiny": (ramp[:2, :2, :3].astype(np.uint8), {}),
        "float64": (ramp / 7, {}),
        "negative int16": ((ramp - 9000).astype(np.int16), {}),
        "uint32": (ramp.astype(np.uint32) * 70_000, {}),
        "bool": (ramp % 5 == 0, {}),
        "big-endian": (ramp.astype(">u2"), {"byteorder": ">"}),
        "BigTIFF": (ramp.astype(np.uint16), {"bigtiff": True}),
        "tiled and compressed": (ramp.astype(np.uint16), {"tile": (16, 16), "compression": "zlib"}),
    }


@pytest.mark.parametrize("name", good_images())
def test_unusual_images_simply_work(name: str, model_file: Path, tmp_path: Path) -> None:
    data, options = good_images()[name]
    tifffile.imwrite(tmp_path / "in.tif", data, photometric="minisblack", **options)
    assert predict(tmp_path / "in.tif", tmp_path / "out.tif", model_file) == 0
    assert read_labels(tmp_path / "out.tif").shape == data.shape[-3:]


def bad_images() -> dict[str, bytes | tuple[np.ndarray, dict[str, Any]]]:
    ramp = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    nan, infinite = ramp.copy(), ramp.copy()
    nan[3, 4, 5], infinite[0, 0, 0] = np.nan, np.inf
    grey = {"photometric": "minisblack"}
    return {
        "not a TIFF": b"PNG or whatever, but no TIFF at all",
        "empty": b"",
        "2D": (ramp[0], grey),
        "RGB": (np.zeros((*SHAPE, 3), np.uint8), {"photometric": "rgb"}),
        "time series": (np.stack([ramp, ramp]), {"imagej": True, "metadata": {"axes": "TZYX"}}),
        "channels": (np.stack([ramp, ramp], axis=1), {"imagej": True, "metadata": {"axes": "ZCYX"}}),
        "NaN": (nan, grey),
        "infinite": (infinite, grey),
        "complex": (ramp.astype(np.complex64), grey),
    }


@pytest.mark.parametrize("name", [*bad_images(), "truncated", "missing", "huge header"])
def test_a_bad_image_is_refused_in_one_sentence(
    name: str, refused: Callable[..., str], stack: Path, model_file: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.tif", tmp_path / "out.tif"
    content = bad_images().get(name)
    if name == "truncated":
        content = stack.read_bytes()[: stack.stat().st_size // 2]
    elif name == "huge header":
        content = huge_header(tmp_path)
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        tifffile.imwrite(source, content[0], **content[1])
    before = set(tmp_path.iterdir())
    sentence = refused("predict", source, "-o", out, "--model", model_file)
    assert str(source) in sentence or source.name in sentence
    assert set(tmp_path.iterdir()) == before


def huge_header(folder: Path) -> bytes:
    """A file of a few bytes that says it holds 4 million pixels squared in 4096 slices."""
    path = folder / "huge.tif"
    tifffile.imwrite(path, np.zeros((2, 16, 16), np.uint16), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in tif.pages:
            page.tags["ImageWidth"].overwrite(2**22)
            page.tags["ImageLength"].overwrite(2**22)
            page.tags["RowsPerStrip"].overwrite(2**22)
    return path.read_bytes()


# --- output and model


def test_a_file_that_is_no_model_is_refused(refused: Callable[..., str], stack: Path, tmp_path: Path) -> None:
    assert "stack.tif is not a model file" in refused("predict", stack, "-o", tmp_path / "out.tif", "--model", stack)
    assert "no model" in refused("predict", stack, "-o", tmp_path / "out.tif", "--model", "best-model-ever")
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize("out", ["missing/out.tif", "stack.tif/out.tif", "stack.tif"])
def test_an_impossible_output_is_refused_before_the_work(
    out: str, refused: Callable[..., str], stack: Path, model_file: Path, tmp_path: Path
) -> None:
    before = stack.read_bytes()
    refused("predict", stack, "-o", tmp_path / out, "--model", model_file)
    assert stack.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stack.tif"]


def test_two_images_that_would_become_one_file_are_refused(
    refused: Callable[..., str], stack: Path, model_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "stack.tif"
    other.parent.mkdir()
    other.write_bytes(stack.read_bytes())
    assert "both" in refused("predict", stack, other, "-o", tmp_path / "out", "--model", model_file)


def test_a_pattern_or_folder_without_images_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "pattern" in refused("predict", tmp_path / "*.tif", "-o", tmp_path)
    assert str(tmp_path) in refused("predict", tmp_path, "-o", tmp_path)


def test_a_full_disk_leaves_nothing_behind(stack: Path, model_file: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    out = tmp_path / "out" / "out.tif"
    out.parent.mkdir()
    command = [sys.executable, "-m", "napari_mrcnn3d.cli", "predict", stack, "-o", out, "--model", model_file]
    done = subprocess.run(
        [*map(str, command), "--min-score", "0"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)),
    )
    assert done.returncode == 2
    assert str(out) in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


def test_labels_without_their_table_are_taken_back(
    refused: Callable[..., str], stack: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("The table cannot be written: the disk is full.")

    monkeypatch.setattr("napari_mrcnn3d.io.tables.write_table", fail)
    refused("predict", stack, "-o", tmp_path / "out.tif", "--model", model_file)
    assert [p.name for p in tmp_path.iterdir()] == ["stack.tif"]


# --- train, generate, evaluate


def test_train_lays_the_options_over_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def train_steps(folder: Path, out: Path, **settings: Any) -> Steps[Path]:
        seen.update(settings, folder=folder)
        yield Progress(1, 1, "Training", {"loss": 1.0})
        return out

    monkeypatch.setattr("napari_mrcnn3d.training.trainer.train_steps", train_steps)
    options = (
        "--preset seed --resume --steps 7 --validation Emb10 Emb11 --network.voxel-size 2 1 1 --patch-size 16 32 32"
    )
    assert main(["train", "--data", str(tmp_path), "--out", "m.safetensors", *options.split()]) == 0
    model, data, train = preset("seed")
    assert seen["folder"] == tmp_path
    assert seen["resume"] is True
    assert seen["model"] == model.model_copy(update={"voxel_size": (2.0, 1.0, 1.0)})
    assert seen["data"] == data.model_copy(update={"validation": ("Emb10", "Emb11"), "patch_size": (16, 32, 32)})
    assert seen["train"] == train.model_copy(update={"steps": 7})
    assert capsys.readouterr().out.strip() == "m.safetensors"


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")])
def test_a_memory_that_is_too_small_is_no_crash(
    problem: Exception, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train_steps(*_: object, **__: object) -> Steps[Path]:
        yield Progress(1, 2, "Training")
        raise problem

    monkeypatch.setattr("napari_mrcnn3d.training.trainer.train_steps", train_steps)
    assert "--patch-size" in refused("train", "--data", tmp_path, "--out", tmp_path / "m.safetensors")


def test_a_programming_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(selftest, "facts", facts)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_train_refuses_images_and_labels_of_different_shape(refused: Callable[..., str], tmp_path: Path) -> None:
    for name, shape in (("images", SHAPE), ("labels", (12, 40, 47))):
        (tmp_path / name).mkdir()
        write_labels(tmp_path / name / "a.tif", np.ones(shape, np.uint16), SIZE)
    sentence = refused("train", "--data", tmp_path, "--out", tmp_path / "m.safetensors")
    assert "48" in sentence
    assert "47" in sentence
    assert not (tmp_path / "m.safetensors").exists()


def test_generate_makes_images_that_evaluate_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "embryos"
    options = ["--shape", "12", "40", "40", "--max-nuclei", "6", "--workers", "1"]
    assert main(["generate", "embryo", "--out", str(made), "--count", "2", *options]) == 0
    image = read_image(next((made / "images").iterdir()))
    assert image.shape == (12, 40, 40)
    assert image.voxel_size == pytest.approx(EmbryoConfig().voxel_size)
    assert main(["evaluate", str(made / "labels"), str(made / "labels"), "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["pooled"]["f1"] == report["pooled"]["seg"] == report["pooled"]["mucov"] == 1
    assert [volume["name"] for volume in report["volumes"]] == ["embryo0001", "embryo0002"]


def test_evaluate_refuses_what_cannot_be_compared(refused: Callable[..., str], tmp_path: Path) -> None:
    small, large, folder = tmp_path / "small.tif", tmp_path / "large.tif", tmp_path / "truth"
    write_labels(small, np.ones((3, 4, 5), np.uint16), None)
    write_labels(large, np.ones((3, 4, 6), np.uint16), None)
    folder.mkdir()
    write_labels(folder / "unseen.tif", np.ones((3, 4, 5), np.uint16), None)
    assert "small" in refused("evaluate", small, large)
    assert "two files or two folders" in refused("evaluate", small, folder)
    assert "unseen.tif" in refused("evaluate", tmp_path, folder)
    assert "nowhere.tif" in refused("evaluate", tmp_path / "nowhere.tif", small)


# --- stopping, progress, self-test


def interrupt_after_first_line(command: list[object]) -> tuple[int, str]:
    """Run a command, press Ctrl-C once it tells of progress; gives exit code and what it said since."""
    process = subprocess.Popen(
        [sys.executable, "-m", "napari_mrcnn3d.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    return process.wait(30), said


def test_ctrl_c_in_generate_keeps_whole_images_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    command = ["generate", "toy", "--out", out, "--count", 10_000, "--image-size", 32, "--workers", 1]
    code, said = interrupt_after_first_line(command)
    assert code == 130
    assert said.splitlines()[-1].startswith("mrcnn3d: Stopped.")
    assert "Traceback" not in said
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_ctrl_c_in_predict_leaves_nothing_behind(model_file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.tif", tmp_path / "out" / "out.tif"
    out.parent.mkdir()
    write_image(source, np.random.default_rng(0).integers(0, 255, (64, 256, 256)).astype(np.uint8), SIZE)
    code, said = interrupt_after_first_line(
        ["predict", source, "-o", out, "--model", model_file, "--tile", 16, 32, 32, "--device", "cpu"]
    )
    assert code == 130
    assert "Traceback" not in said
    assert list(out.parent.iterdir()) == []


def test_a_job_is_closed_when_its_progress_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def steps() -> Iterator[Progress]:
        try:
            yield Progress(0, 2, "Working")
        finally:
            closed.append(True)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("napari_mrcnn3d._cli_progress._Meter.show", broken)
    with pytest.raises(KeyboardInterrupt):
        follow(steps())  # type: ignore[arg-type]
    assert closed == [True]


def test_progress_tells_stage_figures_and_time_left_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def steps() -> Steps[str]:
        yield Progress(1, 4, "Training", {"loss": 0.5})
        yield Progress(4, 4, "Training", {"loss": 0.123456, "val_f1": 0.9, "seconds_left": 3723.4})
        yield Progress(3, 0, "Comparing")
        return "done"

    assert follow(steps(), name="a.tif") == "done"
    lines = capsys.readouterr().err.splitlines()
    assert "\r" not in "".join(lines)
    assert any(
        line.startswith("a.tif: Training: 100% 4/4") and "loss 0.123, val_f1 0.9, 1:02:03 left" in line
        for line in lines
    )
    assert any(line.startswith("a.tif: Comparing: 3") for line in lines)


def test_info_names_versions_device_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert all(
        word in said for word in (__version__, "torch", "device", "operations on cpu", "operations on cuda", "model")
    )


def test_selftest_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 7
    assert all(line.startswith("ok") for line in lines)


def test_selftest_fails_if_an_operation_computes_something_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = selftest._ops.nms_3d
    monkeypatch.setattr(selftest._ops, "nms_3d", lambda *arguments: right(*arguments).flip(0))
    monkeypatch.setattr(selftest, "available_models", dict)
    assert main(["selftest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if "suppression of duplicates" in line]
    assert [line for line in lines if not line.startswith("ok")] == wrong
    assert any("PyTorch" in line for line in wrong)


def test_every_command_is_documented() -> None:
    assert all(app[name].help for name in ("generate", "train", "predict", "evaluate", "info", "selftest"))
