"""Progress of a long job on standard error."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any, TypeVar

from tqdm import tqdm

from napari_mrcnn3d.structures import Progress, Steps

__all__ = ["follow"]

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} "
_TIMES, _OWN_TIME = "[{elapsed}<{remaining}{postfix}]", "[{elapsed}{postfix}]"


def follow(steps: Steps[T], name: str = "") -> T:
    """Run a job to its end, its progress on standard error; whatever happens, the job is closed.

    Parameters
    ----------
    steps : generator of Progress
    name : str
        What is worked on, where there are several.
    """
    with closing(steps), closing(_Meter(name)) as meter:
        while True:
            try:
                progress = next(steps)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            meter.show(progress)


class _Meter:
    """A progress bar, or a line every ten seconds where standard error is no terminal.

    Parameters
    ----------
    name : str
        What is being worked on, before the stage.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stage: tuple[str, int] | None = None
        self._bar: tqdm[Any] | None = None

    def show(self, progress: Progress) -> None:
        """Tell of one step."""
        bar = self._bar
        if bar is None or self._stage != (progress.stage, progress.total):
            bar = self._begin(progress)
        bar.bar_format = self._format(progress)
        bar.set_postfix_str(_figures(progress.metrics), refresh=False)
        bar.update(progress.done - bar.n)

    def close(self) -> None:
        """End the bar; its last state stays."""
        if self._bar is not None:
            self._bar.close()

    def _begin(self, progress: Progress) -> tqdm[Any]:
        """Start the bar of a new stage."""
        self.close()
        terminal = sys.stderr.isatty()
        self._stage = (progress.stage, progress.total)
        self._bar = tqdm(
            desc=f"{self._name}: {progress.stage}" if self._name else progress.stage,
            total=progress.total or None,
            initial=progress.done,
            file=sys.stderr if terminal else _Lines(),
            dynamic_ncols=terminal,
            mininterval=0.1 if terminal else _SECONDS_BETWEEN_LINES,
            maxinterval=_SECONDS_BETWEEN_LINES,
            miniters=0,
            bar_format=self._format(progress),
        )
        return self._bar

    def _format(self, progress: Progress) -> str:
        """Layout of the bar: a job that says how long it will take knows better than its pace."""
        if not progress.total:
            return "{desc}: {n_fmt} " + _OWN_TIME
        times = _OWN_TIME if "seconds_left" in progress.metrics else _TIMES
        return (_BAR if sys.stderr.isatty() else _LINE) + times


class _Lines:
    """Standard error for logs: what would overwrite the line before goes on a line of its own."""

    def write(self, text: str) -> None:
        """Write what is left of the text without the control characters of a terminal."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing is held back."""


def _figures(metrics: dict[str, float]) -> str:
    """Figures of a step in a few characters, the time left last."""
    shown = [f"{name} {value:.3g}" for name, value in metrics.items() if name != "seconds_left"]
    if "seconds_left" in metrics:
        minutes, seconds = divmod(round(metrics["seconds_left"]), 60)
        shown.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return ", ".join(shown)
