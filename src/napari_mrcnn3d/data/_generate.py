"""Many images written by several processes: complete or not at all, cancelled at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from napari_mrcnn3d._files import readable_bytes
from napari_mrcnn3d.structures import Progress, Steps, UserError

__all__ = ["generate_files"]

Task = Callable[[int, Path], None]


def generate_files(
    task: Task, folder: Path, *, count: int, workers: int, nbytes: int, stage: str = "Generating"
) -> Steps[Path]:
    """Let ``task`` write the files of image 0, 1, ..., count - 1 below a folder.

    Every image is written into a hidden folder of its own and moved into place when all its files are there. Closing
    the generator ends the processes at once, removes what was half-written and keeps the images that were complete.

    Parameters
    ----------
    task : callable
        ``task(index, place)`` writes into ``place``, which does not exist yet; its sub-folders become those of
        ``folder``. With several workers it must be importable by a new process (a module's function or a partial of
        one), and a script that starts this must guard its own start by ``if __name__ == "__main__"``.
    folder : Path
        Created if missing. Must not hold images yet.
    count, workers : int
        Images, and processes; with 0 or 1 workers this process does the work.
    nbytes : int
        Memory that one image takes while it is made.
    stage : str
        What is being done, for people.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UserError
        If the folder cannot be used, the memory does not suffice or a process dies.
    """
    folder = Path(folder)
    processes = max(1, min(workers, count))
    _check(folder, count, nbytes * processes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging_folder = TemporaryDirectory(prefix=".mrcnn3d-", dir=folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from error
    with staging_folder as staging, closing(_finished(task, Path(staging), count, processes)) as finished:
        yield Progress(0, count, stage)
        for done, index in enumerate(finished, start=1):
            _publish(Path(staging) / str(index), folder)
            yield Progress(done, count, stage)
    return folder


def _check(folder: Path, count: int, nbytes: int) -> None:
    """Refuse what cannot end well."""
    if count < 1:
        raise UserError(f"{count} images cannot be generated: ask for one or more.")
    images = folder / "images"
    if images.is_dir() and any(images.iterdir()):
        raise UserError(f"{images} already holds files: give a new folder, so that two data sets are not mixed.")
    available = psutil.virtual_memory().available
    if nbytes > available:
        raise UserError(
            f"Generating needs {readable_bytes(nbytes)} of memory and {readable_bytes(available)} are free: "
            "choose smaller images or fewer workers."
        )


def _publish(source: Path, folder: Path) -> None:
    """Move the files of one image into place."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)


def _finished(task: Task, staging: Path, count: int, workers: int) -> Generator[int, None, None]:
    """Numbers of the images that are complete, as they become so."""
    if workers == 1:
        for index in range(count):
            task(index, staging / str(index))
            yield index
        return
    running: dict[Connection, BaseProcess] = {}
    try:
        for first in range(workers):
            receiver, process = _start(task, staging, range(first, count, workers))
            running[receiver] = process
        while running:
            ready = wait(list(running))
            for receiver in [r for r in running if r in ready]:
                yield from _received(receiver, running)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _start(task: Task, staging: Path, indices: Sequence[int]) -> tuple[Connection, BaseProcess]:
    """A process that works on these images, and the connection on which it reports.

    Started afresh (spawn): a fork of a process that holds Qt, CUDA or threads may hang.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, staging, indices, sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _work(task: Task, staging: Path, indices: Sequence[int], sender: Connection) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent decides
    try:
        for index in indices:
            task(index, staging / str(index))
            sender.send(index)
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        sender.send(error)


def _received(receiver: Connection, running: dict[Connection, BaseProcess]) -> Generator[int, None, None]:
    """What a worker reports: a number, an error, or that it is done."""
    try:
        message = receiver.recv()
    except EOFError:
        process = running.pop(receiver)
        process.join()
        if process.exitcode:
            raise UserError(
                f"A worker process ended unexpectedly (code {process.exitcode}), most likely for lack of memory: "
                "choose smaller images or fewer workers."
            ) from None
        return
    if isinstance(message, Exception):
        raise message
    yield message
