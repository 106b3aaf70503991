"""Which files a command reads and writes, settled before any work is done."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from napari_mrcnn3d.structures import UserError

__all__ = ["matched", "outputs"]

TIFF = {".tif", ".tiff"}


def outputs(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Every input file with the label file that it becomes.

    Raises
    ------
    UserError
        If there is no input, or two would become the same file, or one would overwrite itself.
    """
    files = [file for text in inputs for file in _expanded(text)]
    if not files:
        raise UserError("No image was given: name TIFF files, a folder of them, or a pattern such as day1/*.tif.")
    single = len(inputs) == 1 and files == [Path(inputs[0])] and not out.is_dir()
    jobs = [(file, out if single else out / f"{file.stem}.tif") for file in files]
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target.resolve() == source.resolve():
            raise UserError(f"{source} would be overwritten by its own labels: choose another --out.")
        if target in seen:
            raise UserError(
                f"{seen[target]} and {source} would both become {target}: segment them one after the other."
            )
        seen[target] = source
    if single and out.suffix.lower() not in TIFF:
        raise UserError(f"{out} is no name for a label image: let it end in .tif.")
    _check_folder(out.parent if single else out, make=not single)
    return jobs


def _expanded(text: str) -> list[Path]:
    """Files meant by a file name, a folder or a pattern."""
    path = Path(text)
    if path.is_dir():
        return _stacks(path)
    if path.exists() or not glob.has_magic(text):
        return [path]
    found = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"No file matches {text}: check the pattern.")
    return found


def _stacks(folder: Path) -> list[Path]:
    """TIFF files of a folder.

    Raises
    ------
    UserError
        If there is none.
    """
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in TIFF and not p.name.startswith(".")]
    if not files:
        raise UserError(f"The folder {folder} holds no TIFF file (.tif, .tiff): choose another one.")
    return files


def _check_folder(folder: Path, *, make: bool) -> None:
    """Make sure, before the network runs, that files can be written to a folder.

    Raises
    ------
    UserError
        If they cannot.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Nothing can be written to {folder} ({error.strerror}): choose another --out.") from error


def matched(prediction: Path, truth: Path) -> list[tuple[Path, Path]]:
    """Files to compare; those of two folders by name.

    Raises
    ------
    UserError
        If one is a folder and the other is not, or a true file has no prediction.
    """
    if prediction.is_dir() != truth.is_dir() and prediction.exists() and truth.exists():
        raise UserError(f"{prediction} and {truth} cannot be compared: give two files or two folders.")
    if not truth.is_dir():
        return [(prediction, truth)]
    predicted = {path.stem: path for path in _stacks(prediction)}
    wanted = _stacks(truth)
    missing = [path.name for path in wanted if path.stem not in predicted]
    if missing:
        raise UserError(
            f"{prediction} has no prediction for {', '.join(missing[:3])}: {len(missing)} in all; add them."
        )
    return [(predicted[path.stem], path) for path in wanted]
