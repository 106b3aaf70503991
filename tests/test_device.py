"""Where to compute, and when the memory is full."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch

from napari_mrcnn3d import device
from napari_mrcnn3d.device import autocast, choose_device, free_memory, is_out_of_memory
from napari_mrcnn3d.structures import UserError

CPU = torch.device("cpu")


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose accelerators a test decides on."""
    machine = SimpleNamespace(cards=0, mps=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: machine.mps)
    return machine


@pytest.mark.parametrize(
    ("cards", "mps", "chosen"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (2, True, "cuda")]
)
def test_auto_takes_the_fastest_there_is(present: SimpleNamespace, cards: int, mps: bool, chosen: str) -> None:
    present.cards, present.mps = cards, mps
    assert choose_device("auto").type == chosen


def test_named_devices_are_taken_if_present(present: SimpleNamespace) -> None:
    present.cards = 2
    assert choose_device("cpu") == CPU
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"'cuda:2' is not available"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "cpu:1"])
def test_absent_devices_are_refused(present: SimpleNamespace, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not available on this machine: use auto or cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1"])
def test_names_of_no_device_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="There is no device"):
        choose_device(name)


def result_type(context: object) -> torch.dtype:
    with context:  # type: ignore[attr-defined]
        return torch.nn.functional.conv3d(torch.zeros(1, 1, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3)).dtype


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_chosen_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "_fast_bf16", lambda _: fast)
    assert result_type(autocast(CPU, "fp32")) == torch.float32
    assert result_type(autocast(CPU, "bf16")) == torch.bfloat16
    assert result_type(autocast(CPU)) == (torch.bfloat16 if fast else torch.float32)


def test_a_processor_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert isinstance(autocast(CPU), torch.autocast)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert isinstance(autocast(CPU), nullcontext)
    assert isinstance(autocast(torch.device("mps")), nullcontext)


def test_free_memory_is_what_the_machine_says() -> None:
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_a_full_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError("disk full")])
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_torch_says_it_in_the_words_we_know() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
