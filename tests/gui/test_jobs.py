"""Jobs in worker threads: every way to end leaves the owner usable."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from napari.qt.threading import WorkerBase
from qtpy.QtCore import QObject

from napari_mrcnn3d.structures import Progress, Steps, UserError
from napari_mrcnn3d.widgets._jobs import Job, TimeLeft

pytestmark = pytest.mark.gui


class Owner:
    """Writes down what a job tells it."""

    def __init__(self) -> None:
        self.window = QObject()
        self.heard: list[tuple[str, Any]] = []
        self.threads: set[int] = set()

    def start(self, steps: Steps[Any]) -> Job[Any]:
        return Job(
            steps,
            progressed=lambda progress: self.note("progressed", progress.done),
            succeeded=lambda result: self.note("succeeded", result),
            failed=lambda sentence: self.note("failed", sentence),
            ended=lambda: self.note("ended", None),
            owner=self.window,
        )

    def note(self, what: str, value: Any) -> None:
        self.heard.append((what, value))
        self.threads.add(threading.get_ident())

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


def counting(result: Any = "result", error: BaseException | None = None) -> Steps[Any]:
    for done in range(3):
        yield Progress(done, 3, "Counting")
    if error is not None:
        raise error
    return result


def endless(closed: threading.Event) -> Steps[None]:
    try:
        while True:
            time.sleep(0.01)
            yield Progress(0, 0, "Waiting")
    finally:
        closed.set()


def test_progress_result_and_end_are_heard_in_the_main_thread(qtbot: Any) -> None:
    owner = Owner()
    job = owner.start(counting())
    qtbot.waitUntil(lambda: "ended" in owner.names(), timeout=5000)
    assert owner.heard == [*(("progressed", k) for k in range(3)), ("succeeded", "result"), ("ended", None)]
    assert owner.threads == {threading.get_ident()}
    assert not job.running


def out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: UserError("The file is gone: choose another."), "The file is gone: choose another."),
        (out_of_memory, "smaller tile"),
        (lambda: MemoryError(), "smaller tile"),
        (lambda: RuntimeError("shapes do not fit\nlong tail"), "RuntimeError (shapes do not fit)"),
        (lambda: StopIteration("stray"), "RuntimeError"),
        (lambda: OSError("[WinError 1114] c10.dll"), "PyTorch could not be loaded"),
        (lambda: KeyError("x"), "KeyError"),
    ],
)
def test_every_error_becomes_a_sentence_and_an_end(qtbot: Any, make: Any, sentence: str) -> None:
    owner = Owner()
    owner.start(counting(error=make()))
    qtbot.waitUntil(lambda: "ended" in owner.names(), timeout=10_000)
    assert owner.names()[-2:] == ["failed", "ended"]
    message = dict(owner.heard)["failed"]
    assert sentence in message
    assert "\n" not in message


def test_cancel_frees_the_owner_at_once_and_cleans_up_later(qtbot: Any) -> None:
    owner, closed = Owner(), threading.Event()
    job = owner.start(endless(closed))
    qtbot.waitUntil(lambda: "progressed" in owner.names(), timeout=5000)
    job.cancel()
    assert owner.names()[-1] == "ended"
    heard = len(owner.heard)
    qtbot.waitUntil(closed.is_set, timeout=5000)
    WorkerBase.await_workers(5000)
    assert len(owner.heard) == heard


def test_a_destroyed_owner_stops_the_job_and_hears_nothing(qtbot: Any) -> None:
    owner, closed = Owner(), threading.Event()
    job = owner.start(endless(closed))
    qtbot.waitUntil(lambda: "progressed" in owner.names(), timeout=5000)
    with qtbot.waitSignal(owner.window.destroyed):
        owner.window.deleteLater()
    heard = len(owner.heard)
    assert not job.running
    qtbot.waitUntil(closed.is_set, timeout=5000)
    assert len(owner.heard) == heard


def test_a_long_step_does_not_hold_the_owner(qtbot: Any) -> None:
    owner, release = Owner(), threading.Event()

    def stuck() -> Steps[str]:
        yield Progress(0, 0, "Waiting")
        release.wait(10)
        return "too late"

    job = owner.start(stuck())
    qtbot.waitUntil(lambda: "progressed" in owner.names(), timeout=5000)
    start = time.monotonic()
    job.cancel()
    assert time.monotonic() - start < 1
    assert not job.running
    release.set()
    WorkerBase.await_workers(5000)
    assert "succeeded" not in owner.names()


def test_cancel_after_the_end_says_nothing_more(qtbot: Any) -> None:
    owner = Owner()
    job = owner.start(counting())
    qtbot.waitUntil(lambda: "ended" in owner.names(), timeout=5000)
    job.cancel()
    assert owner.names().count("ended") == 1


def test_twenty_cancelled_jobs_leave_no_worker(qtbot: Any) -> None:
    events = [threading.Event() for _ in range(20)]
    for closed in events:
        owner = Owner()
        job = owner.start(endless(closed))
        qtbot.waitUntil(lambda owner=owner: bool(owner.heard), timeout=5000)
        job.cancel()
    qtbot.waitUntil(lambda: all(closed.is_set() for closed in events), timeout=10_000)


class TestTimeLeft:
    def test_follows_the_pace_of_the_stage(self) -> None:
        now = [0.0]
        left = TimeLeft(lambda: now[0])
        assert left.sentence(Progress(0, 100, "Segmenting")) == ""
        now[0] = 10.0
        assert left.seconds(Progress(25, 100, "Segmenting")) == pytest.approx(30)
        assert left.sentence(Progress(25, 100, "Segmenting")) == "about 30 s left"
        assert left.sentence(Progress(1, 100, "Segmenting")) == "about 16 min left"

    def test_begins_anew_with_a_new_stage(self) -> None:
        now = [0.0]
        left = TimeLeft(lambda: now[0])
        left.seconds(Progress(0, 2, "Loading"))
        now[0] = 60.0
        assert left.seconds(Progress(0, 2, "Segmenting")) is None
        now[0] = 61.0
        assert left.seconds(Progress(1, 2, "Segmenting")) == pytest.approx(1)

    def test_believes_the_job(self) -> None:
        assert TimeLeft().seconds(Progress(1, 2, "Training", {"seconds_left": 7.0})) == 7.0

    def test_says_nothing_where_the_total_is_unknown(self) -> None:
        left = TimeLeft()
        left.seconds(Progress(0, 0, "Loading"))
        assert left.sentence(Progress(5, 0, "Loading")) == ""
