"""Long jobs beside the window: one way to start them, hear of them and stop them.

A job is a generator of :class:`~napari_mrcnn3d.structures.Progress` that knows nothing of Qt; here it gets a worker
thread. Whatever happens in it, ``ended`` is called exactly once, in the main thread, so that a Run button always comes
back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from napari.qt.threading import create_worker
from qtpy.QtCore import QObject

from napari_mrcnn3d.device import is_out_of_memory
from napari_mrcnn3d.structures import Progress, Steps, UserError

__all__ = ["Failure", "Job", "TimeLeft"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ALIVE: set[Job[Any]] = set()
"""Jobs whose thread has not ended: Qt holds the object behind a slot only weakly, and each must see to its clean-up."""


@dataclass(frozen=True)
class Failure:
    """Why a job ended without a result, in one sentence for people."""

    message: str


def _relay(steps: Steps[T]) -> Generator[Progress, None, T | Failure]:
    """Run a job and turn every error into a result.

    superqt's generator worker takes a RuntimeError (torch's out-of-memory error is one) for its own end and then
    emits nothing at all; any other error would keep the traceback's tensors alive and pop up beside our message.
    """
    try:
        return (yield from steps)
    except UserError as exc:
        return Failure(str(exc))
    except Exception as exc:  # the boundary of the thread: the caller tells the user
        logger.error("A job failed", exc_info=exc)
        return Failure(_sentence(exc))


def _sentence(exc: Exception) -> str:
    """Say what went wrong and what to do, for errors that are not addressed to the user."""
    text = (str(exc).strip().splitlines() or [""])[0]
    if isinstance(exc, (RuntimeError, MemoryError)) and is_out_of_memory(exc):
        return "The memory was not enough: choose a smaller tile under Advanced, or close other images, and run again."
    if isinstance(exc, (ImportError, OSError)) and ("torch" in text or "c10" in text):
        return f"PyTorch could not be loaded ({text}): reinstall it as the README says and restart napari."
    return f"That did not work: {type(exc).__name__}{f' ({text})' if text else ''}. The log has the details."


class TimeLeft:
    """Tells from the pace of the current stage how long it still takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._start = (0.0, 0)

    def seconds(self, progress: Progress) -> float | None:
        """Seconds left in this stage, or None while nothing can be said.

        The job's own estimate ``metrics["seconds_left"]`` goes first.
        """
        if "seconds_left" in progress.metrics:
            return progress.metrics["seconds_left"]
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._start = progress.stage, (now, progress.done)
        since, first = self._start
        steps = progress.done - first
        return (now - since) / steps * (progress.total - progress.done) if steps > 0 and progress.total else None

    def sentence(self, progress: Progress) -> str:
        """Say how long it takes (``"about 2 min left"``); empty while nothing can be said."""
        seconds = self.seconds(progress)
        if seconds is None:
            return ""
        if seconds >= 90:
            return f"about {seconds / 60:.0f} min left"
        return f"about {max(1, round(seconds))} s left"


class Job(Generic[T]):
    """A generator running in a worker thread.

    Parameters
    ----------
    steps : generator of Progress
        It must yield often: a step cannot be interrupted.
    progressed, succeeded, failed, ended : callable
        Called in the main thread: with each Progress; with the result; with a sentence; at the very end, once, however
        the job ended.
    owner : QObject
        When it is destroyed (napari was closed), the job stops and calls nobody.
    """

    def __init__(
        self,
        steps: Steps[T],
        *,
        progressed: Callable[[Progress], None],
        succeeded: Callable[[T], None],
        failed: Callable[[str], None],
        ended: Callable[[], None],
        owner: QObject,
    ) -> None:
        self._steps = steps
        self._slots: dict[str, Callable[..., None]] = {
            "progressed": progressed,
            "succeeded": succeeded,
            "failed": failed,
            "ended": ended,
        }
        self._worker = create_worker(_relay, steps, _start_thread=False, _ignore_errors=True)
        self._worker.yielded.connect(self._on_progress)
        self._worker.returned.connect(self._on_return)
        self._worker.finished.connect(self._on_finish)
        owner.destroyed.connect(self._abandon)
        _ALIVE.add(self)
        self._worker.start()

    @property
    def running(self) -> bool:
        """Whether the owner still waits for it."""
        return bool(self._slots)

    def cancel(self) -> None:
        """Let go of the job at once; the thread itself stops at its next step and cleans up.

        The owner hears ``ended`` before this returns and nothing afterwards, so that it is usable again even while a
        long step is still being worked off.
        """
        if self._worker is not None:
            self._worker.quit()
        self._end()

    def _abandon(self) -> None:
        self._slots = {}
        self.cancel()

    def _on_progress(self, progress: Progress) -> None:
        self._call("progressed", progress)

    def _on_return(self, result: T | Failure) -> None:
        if isinstance(result, Failure):
            self._call("failed", result.message)
        else:
            self._call("succeeded", result)

    def _on_finish(self) -> None:
        """Run the generator's clean-up now, not whenever the worker object happens to be released."""
        self._worker = None
        self._steps.close()
        _ALIVE.discard(self)
        self._end()

    def _end(self) -> None:
        ended = self._slots.get("ended")
        self._slots = {}
        if ended is not None:
            ended()

    def _call(self, slot: str, value: Any) -> None:
        if slot in self._slots:
            self._slots[slot](value)
