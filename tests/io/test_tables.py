"""Tables are read back as they were written, and are what a spreadsheet expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from napari_mrcnn3d.editing.measure import instance_table
from napari_mrcnn3d.io.tables import read_table, write_table
from napari_mrcnn3d.structures import UserError, VoxelSize


@pytest.fixture
def table() -> dict[str, np.ndarray]:
    return {
        "label": np.array([1, 70_000]),
        "class": np.array(["nucleus", 'odd, "é"']),
        "score": np.array([0.25, np.nan]),
        "volume_um3": np.array([1.1200000000000003, 1e-7]),
        "touches_border": np.array([True, False]),
    }


def test_the_file_is_plain(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    write_table(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_bytes().decode() == (
        "label,class,score,volume_um3,touches_border\n"
        "1,nucleus,0.25,1.12,True\n"
        '70000,"odd, ""é""",,1e-07,False\n'
    )  # fmt: skip


def test_a_table_comes_back(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    write_table(tmp_path / "a.csv", table)
    back = read_table(tmp_path / "a.csv")
    assert list(back) == list(table)
    for name, column in table.items():
        assert back[name].dtype.kind == column.dtype.kind
        if column.dtype.kind == "f":
            np.testing.assert_allclose(back[name], column, rtol=1e-9)
        else:
            np.testing.assert_array_equal(back[name], column)


@pytest.mark.parametrize("size", [None, VoxelSize(1.75, 0.8, 0.8)])
def test_measured_tables_come_back(tmp_path: Path, size: VoxelSize | None) -> None:
    labels = np.random.default_rng(0).integers(0, 9, (4, 5, 6))
    for volume in (labels, np.zeros_like(labels)):
        table = instance_table(volume, None, size)
        write_table(tmp_path / "a.csv", table)
        back = read_table(tmp_path / "a.csv")
        assert list(back) == list(table)
        for name, column in table.items():
            if column.dtype.kind == "f":
                np.testing.assert_allclose(back[name], column, rtol=1e-9)
            else:
                np.testing.assert_array_equal(back[name], column)


def test_a_table_saved_by_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefflabel,class,score\r\n3,7,0.5\r\n".encode())
    table = read_table(tmp_path / "a.csv")
    assert {name: column.tolist() for name, column in table.items()} == {"label": [3], "class": ["7"], "score": [0.5]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00\x01", "is no table: give a CSV"),
        (b"label,score\n1,0.5\n2\n", "1 cells in line 3 and 2 in its header: give"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.csv .*{words}"):
        read_table(tmp_path / "a.csv")


def test_columns_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in length"):
        write_table(tmp_path / "a.csv", {"label": np.arange(2), "score": np.arange(3)})
    with pytest.raises(UserError, match="folder does not exist"):
        write_table(tmp_path / "nowhere" / "a.csv", {"label": np.arange(2)})
    assert not list(tmp_path.iterdir())
