"""Instance tables as CSV: one row per object, units in the column names."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from napari_mrcnn3d._files import atomic_write, input_file, read_failure
from napari_mrcnn3d.structures import UserError

__all__ = ["read_table", "write_table"]

_DIGITS = 10
"""Significant digits of fractional numbers: more than any measurement has, few enough to hide binary rounding."""


def write_table(path: str | Path, table: Mapping[str, np.ndarray]) -> None:
    """Write a table as CSV (UTF-8, comma, decimal point); what is not a number (NaN) becomes an empty cell.

    Parameters
    ----------
    path : path-like
        Replaced as a whole or not touched.
    table : mapping of str to array
        Columns of equal length, as :func:`~napari_mrcnn3d.editing.measure.instance_table` gives them.

    Raises
    ------
    UserError
        If the file cannot be written.
    ValueError
        If the columns differ in length.
    """
    if len({len(column) for column in table.values()}) > 1:
        raise ValueError("columns differ in length")
    columns = [_cells(np.asarray(column)) for column in table.values()]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(table)
        rows.writerows(zip(*columns, strict=True))


def read_table(path: str | Path) -> dict[str, np.ndarray]:
    """Read a CSV table.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict of str to array
        ``class`` as text; every other column as bool, int64, float64 (empty cells are NaN) or text: the first of
        these that all its cells are.

    Raises
    ------
    UserError
        If the file is missing or no table.
    """
    path = Path(path)
    input_file(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
    except OSError as error:
        raise UserError(read_failure(path, error)) from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no table: give a CSV file (UTF-8, separated by commas).") from error
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(
                f"{path} has {len(row)} cells in line {number} and {len(header)} in its header: "
                "give a CSV file separated by commas."
            )
    columns = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    return {name: np.array(cells, str) if name == "class" else _column(cells) for name, cells in columns.items()}


def _cells(column: np.ndarray) -> Iterable[str]:
    if column.dtype.kind == "f":
        return ["" if np.isnan(value) else f"{value:.{_DIGITS}g}" for value in column]
    return [str(value) for value in column]


def _column(cells: Sequence[str]) -> np.ndarray:
    """Convert a column to the narrowest type that all its cells have."""
    if cells and set(cells) <= {"True", "False"}:
        return np.array([cell == "True" for cell in cells])
    try:
        return np.array([int(cell) for cell in cells], np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(cell or "nan") for cell in cells], np.float64)
    except ValueError:
        return np.array(cells, dtype=str)
