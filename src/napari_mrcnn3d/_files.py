"""What every reader and writer does first and last: is the input there, does it fit, is the output whole."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from napari_mrcnn3d.structures import UserError

__all__ = ["atomic_write", "check_memory", "input_file", "read_failure", "readable_bytes"]

_DISK_FULL = "the disk is full or a limit is reached; free some space or choose another disk"
_WRITE_REMEDIES: dict[int | None, str] = {
    None: _DISK_FULL,  # numpy and safetensors report a write cut short without a code
    errno.ENOENT: "its folder does not exist; create it or choose another place",
    errno.ENOTDIR: "its folder is a file; choose another place",
    errno.EISDIR: "a folder of this name is in the way; choose another name",
    errno.ENOSPC: _DISK_FULL,
    errno.EFBIG: _DISK_FULL,
    errno.EROFS: "the disk can only be read; choose another place",
    errno.EACCES: "writing is not permitted there; choose another place or close the program that holds the file",
    errno.EPERM: "writing is not permitted there; choose another place or close the program that holds the file",
    errno.ENAMETOOLONG: "its name is too long; choose a shorter one",
}
_READ_REMEDIES: dict[int | None, str] = {
    errno.EACCES: "you are not permitted to read it; ask its owner or copy it",
    errno.EPERM: "you are not permitted to read it; ask its owner or copy it",
}


def input_file(path: Path, size: int = 1) -> bytes:
    """Check that a file can be read and is not empty, and give its first bytes.

    Parameters
    ----------
    path : Path
    size : int
        How many bytes to give; fewer if the file is shorter.

    Raises
    ------
    UserError
        If it is missing, a folder, empty or unreadable.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: give one file.")
        with path.open("rb") as file:
            start = file.read(size)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the name.") from error
    except OSError as error:
        raise UserError(read_failure(path, error)) from error
    if not start:
        raise UserError(f"{path} is empty (0 bytes): copy or export it again.")
    return start


def read_failure(path: Path, error: OSError) -> str:
    """Sentence on why a file that exists could not be read."""
    remedy = _READ_REMEDIES.get(error.errno, f"the system says: {error.strerror or error}; copy it anew")
    return f"{path} cannot be read: {remedy}."


def readable_bytes(count: float) -> str:
    """Write a number of bytes for people, for example ``3.2 GB``."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def check_memory(nbytes: int, path: str | Path) -> None:
    """Refuse what does not fit into memory, before any of it is taken.

    Parameters
    ----------
    nbytes : int
        Bytes that reading ``path`` will take.
    path : path-like
        For the message.

    Raises
    ------
    UserError
        If less than that is available.
    """
    available = psutil.virtual_memory().available
    if nbytes > available:
        raise UserError(
            f"{path} needs {readable_bytes(nbytes)} of memory and {readable_bytes(available)} are free: "
            "close other programs, or cut the image into smaller files."
        )


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well.

    Whatever happens in the block, ``path`` holds either what it held before or all of the new content, and nothing
    else is left in the folder. The block must only write: every OSError in it is taken for a failure to write.

    Parameters
    ----------
    path : path-like
        The final file; a symbolic link keeps being one.

    Yields
    ------
    Path
        A name that does not exist yet, in the same folder and with the same suffix.

    Raises
    ------
    UserError
        If the file cannot be written (folder missing, not permitted, disk full).
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    # The suffix stays: some writers choose their format by it. The name is short whatever the user's is.
    temporary = target.with_name(f".mrcnn3d-{secrets.token_hex(6)}{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield temporary
        temporary.replace(target)
    except OSError as error:
        remedy = _WRITE_REMEDIES.get(error.errno, f"the system says: {error.strerror or error}; try another place")
        raise UserError(f"{path} cannot be written: {remedy}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
