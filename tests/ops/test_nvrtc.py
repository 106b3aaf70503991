"""Compiling the CUDA kernels' text, keeping what came of it, and launching it through NVIDIA's cuda.core."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from napari_mrcnn3d._ops import _cuda
from tests.ops.emulation.build import KERNELS, built, required

TINY = 'extern "C" __global__ void nothing() {}\n'
CUDA = torch.device("cuda", 0)


@pytest.fixture
def nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a cache folder of the test's own; in CI it must be there."""
    monkeypatch.setenv("NAPARI_MRCNN3D_CACHE", str(tmp_path / "kept"))
    try:
        from napari_mrcnn3d._ops import _nvrtc

        _nvrtc.version()
    except (ImportError, RuntimeError) as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    _nvrtc._report_unkept.cache_clear()
    return _nvrtc


@pytest.fixture
def tiny(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with a text that takes no time."""
    monkeypatch.setattr(nvrtc, "source", lambda: TINY)
    return nvrtc


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the slower tests share."""
    return tmp_path_factory.mktemp("kept")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------------------- compiling


def test_the_text_is_all_there_is(nvrtc: Any) -> None:
    text = nvrtc.source()
    assert "sample_position" in text
    assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_every_kernel_compiles_and_stays_in_registers(nvrtc: Any, target: str) -> None:
    from cuda.core import Program

    log = io.StringIO()
    settings = dataclasses.replace(nvrtc.options(target), ptxas_options=["-v"])
    image = bytes(Program(nvrtc.source(), "c++", options=settings).compile("cubin", logs=log).code)
    assert image.startswith(b"\x7fELF")
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", log.getvalue())]
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log.getvalue())]
    assert len(spilled) == len(used) == 31
    assert max(spilled) <= 32  # a few loop counters, nothing of an inner loop
    assert max(used) <= 80


def test_nvcc_takes_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text('#include "cuda_kernels.cuh"\n', encoding="utf-8")
    flags = ["-cubin", "-arch=sm_90", "-std=c++17", "-fmad=false", "-Werror", "all-warnings", f"-I{KERNELS}"]
    subprocess.run([required("nvcc"), *flags, "kernels.cu", "-o", "kernels.cubin"], cwd=tmp_path, check=True)
    assert (tmp_path / "kernels.cubin").read_bytes().startswith(b"\x7fELF")


def test_it_compiles_for_the_gpu_or_the_nearest_older_one_of_its_generation(nvrtc: Any) -> None:
    assert nvrtc.architecture((9, 0)) == "sm_90"
    assert nvrtc.architecture((12, 9)) == "sm_121"
    with pytest.raises(nvrtc.UnusableError, match=r"NVRTC \d+\.\d+ cannot compile .* capability 99\.0"):
        nvrtc.architecture((99, 0))


# ---------------------------------------------------------------------------------------------- keeping


def test_the_second_start_does_not_compile(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny.binary("sm_90")
    assert image.startswith(b"\x7fELF")
    monkeypatch.setattr(tiny, "_compile", lambda *_: pytest.fail("compiled again"))
    assert tiny.binary("sm_90") == image
    assert len(entries(tmp_path / "kept")) == 1
    monkeypatch.setattr(tiny, "source", lambda: TINY + "// changed\n")
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        tiny.binary("sm_90")


@pytest.mark.parametrize("damage", [lambda entry: b"", lambda entry: entry[:-1], lambda entry: entry[::-1]])
def test_a_damaged_entry_is_compiled_anew(tiny: Any, tmp_path: Path, damage: Any) -> None:
    image = tiny.binary("sm_90")
    (entry,) = entries(tmp_path / "kept")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert tiny.binary("sm_90") == image
    assert entry.read_bytes() == whole


def _compile_in_child(folder: str, start: Any, results: Any) -> None:
    os.environ["NAPARI_MRCNN3D_CACHE"] = folder
    from napari_mrcnn3d._ops import _nvrtc

    start.wait()
    results.put(_nvrtc.binary("sm_90"))


def test_two_processes_fill_the_cache_at_once(nvrtc: Any, kept: Path) -> None:
    context = get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_compile_in_child, args=(str(kept), start, results)) for _ in range(2)]
    for child in children:
        child.start()
    first, second = (results.get(timeout=100) for _ in children)
    for child in children:
        child.join()
    assert first == second
    (entry,) = entries(kept)
    assert entry.read_bytes().endswith(first)


@pytest.mark.parametrize("failure", ["folder", "write", "read"])
def test_an_unusable_cache_is_reported_once_and_done_without(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "not permitted")

    if failure == "folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("NAPARI_MRCNN3D_CACHE", str(tmp_path / "file" / "kept"))
    else:
        method = "__setitem__" if failure == "write" else "get"
        monkeypatch.setattr(tiny.FileStreamProgramCache, method, refuse)
    with caplog.at_level(logging.WARNING):
        assert tiny.binary("sm_90") == tiny.binary("sm_90")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("moment", ["compile", "write"])
def test_an_interrupt_leaves_nothing_half_done(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(*((tiny, "_compile") if moment == "compile" else (os, "fsync")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.binary("sm_90")
    assert not entries(tmp_path / "kept")
    assert tiny.binary("sm_90").startswith(b"\x7fELF")


def test_an_interrupt_while_nvrtc_is_at_work(nvrtc: Any, tmp_path: Path) -> None:
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        nvrtc.binary("sm_90")
    timer.join()
    assert not entries(tmp_path / "kept")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"NAPARI_MRCNN3D_CACHE": "/own"}, "/own"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/napari-mrcnn3d/kernels"),
        ("linux", {"HOME": "/home/someone"}, "/home/someone/.cache/napari-mrcnn3d/kernels"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/napari-mrcnn3d/kernels"),
        ("win32", {"HOME": "/home/someone"}, "/home/someone/AppData/Local/napari-mrcnn3d/kernels"),
    ],
)
def test_the_cache_is_where_the_system_wants_it(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("NAPARI_MRCNN3D_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert nvrtc.cache_folder() == Path(expected)


# ---------------------------------------------------------------------------------------------- on a card


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """PyTorch claims to be built for CUDA 13 and to have one card of the Hopper generation."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    _cuda._problem.cache_clear()
    yield monkeypatch
    _cuda._problem.cache_clear()


def test_without_a_card_the_problem_is_named(pretended: pytest.MonkeyPatch) -> None:
    assert _cuda.problem(torch.device("cpu")) == "These kernels are for CUDA devices, not for cpu."
    pretended.setattr(torch.cuda, "is_available", lambda: False)
    assert _cuda.problem(CUDA) == "PyTorch finds no CUDA device here."
    pretended.setattr(torch.version, "cuda", None)
    assert _cuda.problem(CUDA) == "This PyTorch is built without CUDA."


def test_a_card_that_is_too_old(pretended: pytest.MonkeyPatch) -> None:
    pretended.setattr(torch.cuda, "get_device_capability", lambda device=None: (5, 2))
    assert _cuda.problem(CUDA) == "The GPU is too old: its compute capability is 5.2, 6.0 is needed."


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("11.8", "PyTorch is built for CUDA 11.8; the kernels need a build for CUDA 12 or 13."),
        ("12.8", 'run: pip install "cuda-core>=1" "cuda-bindings==12.*" "nvidia-cuda-nvrtc-cu12".'),
    ],
)
def test_a_mismatch_of_versions(nvrtc: Any, pretended: pytest.MonkeyPatch, version: str, expected: str) -> None:
    pretended.setattr(torch.version, "cuda", version)
    problem = _cuda.problem(CUDA)
    assert problem is not None
    assert problem.endswith(expected)


@pytest.mark.parametrize("package", ["cuda.core", "cuda.bindings"])
def test_a_missing_package_comes_with_the_command_that_brings_it(
    nvrtc: Any, pretended: pytest.MonkeyPatch, package: str
) -> None:
    pretended.delitem(sys.modules, "napari_mrcnn3d._ops._nvrtc")
    pretended.delattr(sys.modules["napari_mrcnn3d._ops"], "_nvrtc")
    pretended.setitem(sys.modules, package, None)
    assert _cuda.problem(CUDA) == (
        f"NVIDIA's Python package {package} is missing or too old; "
        'run: pip install "cuda-core>=1" "cuda-bindings==13.*" "nvidia-cuda-nvrtc==13.*".'
    )


def test_a_missing_compiler_is_named(nvrtc: Any, pretended: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("not found")

    pretended.setattr(nvrtc.nvrtc, "nvrtcVersion", missing)
    with pytest.raises(nvrtc.UnusableError, match="NVRTC is not installed"):
        nvrtc.version()


def run_route(tmp_path_factory: pytest.TempPathFactory, kept: Path, **variables: str) -> str:
    """What the whole way prints, from PyTorch's tensors through cuda.core to the emulated kernels."""
    driver = built(tmp_path_factory.getbasetemp()).parent
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "NAPARI_MRCNN3D_CACHE": str(kept)} | variables
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.emulation.route"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_the_whole_way_on_a_stand_in_for_the_driver(
    nvrtc: Any, kept: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    answer = run_route(tmp_path_factory, kept).splitlines()
    assert answer[0] == "problem: None"
    assert re.fullmatch(rf"CUDA \d+\.\d+ through NVRTC, sm_90, kept in {re.escape(str(kept))}", answer[1])
    assert answer[2:] == ["main: same", "another thread: same", "stream: 0x1234"]


def test_a_driver_that_refuses_the_kernels(nvrtc: Any, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    answer = run_route(tmp_path_factory, kept, STAND_IN_REFUSES="1")
    assert answer.startswith("problem: The CUDA kernels could not be compiled or loaded (")
    assert "the stand-in refuses" in answer
    assert answer.rstrip().endswith('"nvidia-cuda-nvrtc==13.*".')
