"""Every kind of TIFF that simply works, every kind that is refused with one sentence, and the voxel size both ways."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile

from napari_mrcnn3d import _files
from napari_mrcnn3d.io.tiff import read_image, read_labels, write_image, write_labels
from napari_mrcnn3d.structures import UserError, VoxelSize

SIZE = VoxelSize(1.75, 0.8, 0.7)
IMAGEJ = {"imagej": True, "metadata": {"axes": "ZYX"}}


@pytest.fixture(scope="module")
def stack() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (5, 20, 30)).astype(np.uint16)


def saved(path: Path, array: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, array, **options)
    return path


# what works


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("byteorder", "<>")
def test_every_number_type_in_both_byte_orders(tmp_path: Path, stack: np.ndarray, dtype: str, byteorder: str) -> None:
    expected = stack.astype(dtype) - (90 if dtype[0] in "if" else 0)
    volume = read_image(saved(tmp_path / "a.tif", expected, byteorder=byteorder))
    assert volume.data.dtype == np.dtype(dtype)
    assert volume.data.dtype.isnative
    np.testing.assert_array_equal(volume.data, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": None},
        IMAGEJ,
        {**IMAGEJ, "compression": "zlib"},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"bigtiff": True},
        {"tile": (16, 16)},
        {"tile": (16, 16, 16), "volumetric": True},
        {"rowsperstrip": 3},
        {"compression": "lzw"},
        {"compression": "zlib", "predictor": True},
        {"compression": "zstd", "tile": (16, 16)},
        {"compression": "packbits"},
        {"compression": "lzma"},
    ],
    ids=str,
)
def test_every_layout_and_compression(tmp_path: Path, stack: np.ndarray, options: dict[str, Any]) -> None:
    volume = read_image(saved(tmp_path / "a.tif", stack, **options))
    assert volume.name == "a.tif"
    assert volume.data.dtype == np.uint16
    np.testing.assert_array_equal(volume.data, stack)


@pytest.mark.parametrize("options", [{}, {"bitspersample": 1}], ids=["bool", "1 bit"])
def test_booleans_become_uint8(tmp_path: Path, stack: np.ndarray, options: dict[str, Any]) -> None:
    volume = read_image(saved(tmp_path / "a.tif", stack > 100, **options))
    assert volume.data.dtype == np.uint8
    np.testing.assert_array_equal(volume.data, stack > 100)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": {"axes": "ZYX"}},
        {"imagej": True, "metadata": {"axes": "ZYX", "spacing": 2.0}},
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeZ": 2.0}},
    ],
    ids=str,
)
def test_one_slice_is_a_stack_if_it_says_so(tmp_path: Path, stack: np.ndarray, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.tif", stack[:1], **options)).data, stack[:1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (1, 1, 7), (5, 1, 7), (2, 6, 1)], ids=str)
def test_tiny_stacks_keep_their_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "plain.tif", expected)).data, expected)
    write_image(tmp_path / "ours.tif", expected, None)
    np.testing.assert_array_equal(read_image(tmp_path / "ours.tif").data, expected)


def test_axes_in_another_order_are_turned(tmp_path: Path, stack: np.ndarray) -> None:
    volume = read_image(saved(tmp_path / "a.tif", stack.T, metadata={"axes": "XYZ"}))
    np.testing.assert_array_equal(volume.data, stack)


def test_a_flat_overview_beside_the_stack_is_passed_over(tmp_path: Path, stack: np.ndarray) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(stack[0, :8, :8])
        tif.write(stack)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").data, stack)


def test_an_image_of_nothing_is_no_error(tmp_path: Path) -> None:
    assert not read_image(saved(tmp_path / "a.tif", np.zeros((5, 6, 7), np.float64))).data.any()


# what is refused


def _flat(path: Path, stack: np.ndarray) -> None:
    saved(path, stack[0])


def _complex(path: Path, stack: np.ndarray) -> None:
    saved(path, stack.astype(np.complex64))


def _nan(path: Path, stack: np.ndarray) -> None:
    holes = stack.astype(np.float32)
    holes[1, :2, :3], holes[2, 0, 0] = np.nan, -np.inf
    saved(path, holes)


def _zero_size(path: Path, stack: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="zero-size"):
        saved(path, stack[:0])


def _two_stacks(path: Path, stack: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as tif:
        tif.write(stack)
        tif.write(stack[:, :9])


def _planes_elsewhere(path: Path, stack: np.ndarray) -> None:
    """One of two OME-TIFF files; the other holds the second plane."""
    pixels = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID></TiffData>'
        for z, name in enumerate((path.name, "elsewhere.tif"))
    )
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="30" SizeY="20" SizeZ="2" SizeC="1" '
        f'SizeT="1">{pixels}</Pixels></Image></OME>'
    )
    saved(path, stack[0], description=xml, metadata=None)


REFUSED: dict[str, tuple[Callable[[Path, np.ndarray], object], str]] = {
    "text": (lambda p, s: p.write_text("z,y,x\n"), "is not a TIFF file: give"),
    "PNG": (lambda p, s: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "is not a TIFF file: give"),
    "empty": (lambda p, s: p.touch(), r"is empty \(0 bytes\): copy or export"),
    "folder": (lambda p, s: p.mkdir(), "is a folder: give one file"),
    "missing": (lambda p, s: None, "does not exist: check the name"),
    "no page": (lambda p, s: p.write_bytes(b"II*\0\0\0\0\0"), r"\(8 bytes\) is damaged"),
    "2D": (_flat, r"flat image without z axis \(axes YX, shape 20 x 30\): give"),
    "2D ImageJ": (lambda p, s: saved(p, s[0], imagej=True), r"flat image without z axis \(axes YX, shape 20 x 30\)"),
    "2D OME": (lambda p, s: saved(p, s[0], ome=True), r"flat image without z axis \(axes YX, shape 20 x 30\)"),
    "2D RGB": (
        lambda p, s: saved(p, s[0, :, :3].astype(np.uint8), photometric="rgb"),
        r"3 colours \(axes YXS, shape 20 x 3\): save|3 colours",
    ),
    "RGB": (
        lambda p, s: saved(p, np.stack([s] * 3, -1).astype(np.uint8), photometric="rgb"),
        r"3 colours \(axes \?YXS, shape 5 x 20 x 30 x 3\): save",
    ),
    "planar RGB": (
        lambda p, s: saved(p, s[:3].astype(np.uint8), photometric="rgb", planarconfig="separate"),
        r"3 colours \(axes SYX, shape 3 x 20 x 30\)",
    ),
    "RGBA as last axis": (
        lambda p, s: saved(p, s[0, :, :4].astype(np.uint8), photometric="rgb", extrasamples=["unassalpha"]),
        r"4 colours",
    ),
    "time": (
        lambda p, s: saved(p, s, imagej=True, metadata={"axes": "TYX"}),
        r"5 time points \(axes TYX, shape 5 x 20 x 30\): save one",
    ),
    "time and z": (
        lambda p, s: saved(p, s.reshape(5, 2, 10, 30), ome=True, metadata={"axes": "TZYX"}),
        r"5 time points \(axes TZYX, shape 5 x 2 x 10 x 30\): save one",
    ),
    "channels": (
        lambda p, s: saved(p, s.reshape(5, 2, 10, 30), imagej=True, metadata={"axes": "ZCYX"}),
        r"2 channels \(axes ZCYX, shape 5 x 2 x 10 x 30\): save one",
    ),
    "unnamed 4D": (
        lambda p, s: saved(p, s.reshape(5, 2, 10, 30)),
        r"2 images along a further axis \(axes \?\?YX, shape 5 x 2 x 10 x 30\): save",
    ),
    "no y": (
        lambda p, s: saved(p, s[:, :, :1], metadata={"axes": "ZXR"}),
        r"no y and x axes \(axes ZX, shape 5 x 20\): save",
    ),
    "unknown axis": (
        lambda p, s: saved(p, s, metadata={"axes": "RYX"}),
        r"5 images along a further axis \(axes RYX, shape 5 x 20 x 30\): save",
    ),
    "two stacks": (_two_stacks, r"2 separate images \(the first of shape 5 x 20 x 30\): save"),
    "planes elsewhere": (_planes_elsewhere, "other files that are not beside it: put"),
    "complex": (_complex, r"complex numbers \(complex64\): save"),
    "NaN and inf": (_nan, r"7 voxels \(of 3000\) that are no finite numbers .*: replace"),
    "zero size": (_zero_size, r"no voxels \(axes \?YX, shape 0 x 20 x 30\): export"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_bad_input_is_refused_in_one_sentence(
    tmp_path: Path, stack: np.ndarray, kind: str, read: Callable[[Path], object]
) -> None:
    make, words = REFUSED[kind]
    path = tmp_path / "mine.tif"
    make(path, stack)
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": None},
        {**IMAGEJ, "resolution": (2, 2)},
        {"ome": True},
        {"bigtiff": True},
        {"compression": "zlib", "metadata": None},
        {"compression": "lzw", "tile": (16, 16)},
    ],
    ids=str,
)
def test_a_truncated_file_is_refused_or_still_whole(tmp_path: Path, stack: np.ndarray, options: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stack, **options)
    whole, path = buffer.getvalue(), tmp_path / "cut.tif"
    refused = 0
    for length in [*range(1, len(whole), 397), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_image(path).data, stack)  # only the directory's end was lost
        except UserError as error:
            refused += 1
            assert re.search(r"cut\.tif.*(damaged|not a TIFF)", str(error))  # noqa: PT017 - most lengths end here
    assert refused > 10


def test_a_damaged_block_is_refused(tmp_path: Path, stack: np.ndarray) -> None:
    path = saved(tmp_path / "a.tif", stack, compression="zlib")
    with tifffile.TiffFile(path) as tif:
        start = tif.pages[3].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif \(.* KB\) is damaged, .*: copy") as caught:
        read_image(path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
def test_a_huge_header_on_a_small_file_takes_no_memory(
    tmp_path: Path, stack: np.ndarray, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.tif", stack, metadata=None, compression=compression, rowsperstrip=20)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in tif.pages:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                page.tags[tag].overwrite(1_000_000, dtype="I")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *_, **__: pytest.fail("took memory"))
    with pytest.raises(UserError, match=r"a\.tif .*10\.0 TB"):
        read_image(path)


def test_what_exceeds_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.tif", stack)
    monkeypatch.setattr(_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    with pytest.raises(UserError, match=r"a\.tif needs 6\.0 KB of memory and 5\.0 KB are free: close"):
        read_image(path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "does not fit into the memory: cut"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read: the system says: Input/output error; copy"),
        (RuntimeError("decoder"), "damaged, cut off or packed in an unknown way: copy"),
    ],
    ids=str,
)
def test_what_fails_while_reading_is_explained(
    tmp_path: Path, stack: np.ndarray, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = saved(tmp_path / "a.tif", stack)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", fail)
    with pytest.raises(UserError, match=rf"a\.tif .*{words}") as caught:
        read_image(path)
    assert caught.value.__cause__ is error


def test_an_unknown_number_type_is_refused(tmp_path: Path, stack: np.ndarray) -> None:
    path = saved(tmp_path / "a.tif", stack, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in tif.pages:
            page.tags["BitsPerSample"].overwrite(65)
    with pytest.raises(UserError, match=r"a\.tif stores 65 bits per voxel in an unknown way: save"):
        read_image(path)


def test_an_unreadable_file_is_refused(tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.tif", stack)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"a\.tif cannot be read: you are not permitted"):
        read_image(path)


# voxel size


@pytest.mark.parametrize(
    ("unit", "micrometres"),
    [("micron", 1), ("um", 1), ("\\u00B5m", 1), ("nm", 1e-3), ("mm", 1e3), ("inch", 25400)],
)
def test_imagej_units(tmp_path: Path, stack: np.ndarray, unit: str, micrometres: float) -> None:
    metadata = {"axes": "ZYX", "spacing": 1.5, "unit": unit}
    path = saved(tmp_path / "a.tif", stack, imagej=True, resolution=(4, 2), metadata=metadata)
    assert read_image(path).voxel_size == pytest.approx(np.multiply((1.5, 0.5, 0.25), micrometres))


@pytest.mark.parametrize("unit", [b"\xb5m", "µm".encode()], ids=["Latin-1", "UTF-8"])
def test_imagej_micro_sign(tmp_path: Path, stack: np.ndarray, unit: bytes) -> None:
    description = b"ImageJ=1.54f\nimages=5\nslices=5\nunit=" + unit + b"\nspacing=3.0\n"
    path = saved(tmp_path / "a.tif", stack, description=description, metadata=None, resolution=(2, 2))
    assert read_image(path).voxel_size == pytest.approx((3, 0.5, 0.5))


def test_imagej_leaves_out_a_spacing_of_one(tmp_path: Path, stack: np.ndarray) -> None:
    path = saved(tmp_path / "a.tif", stack, imagej=True, resolution=(4, 4), metadata={"axes": "ZYX", "unit": "um"})
    assert read_image(path).voxel_size == pytest.approx((1, 0.25, 0.25))


@pytest.mark.parametrize(
    ("metadata", "resolution"),
    [
        ({"spacing": 2.0, "unit": "pixel"}, (2, 1)),
        ({"spacing": 2.0}, (2, 1)),
        ({"spacing": 0.0, "unit": "um"}, (2, 1)),
        ({"spacing": -2.0, "unit": "um"}, (2, 1)),
        ({"spacing": "inf", "unit": "um"}, (2, 1)),
        ({"spacing": "wide", "unit": "um"}, (2, 1)),
        ({"spacing": 2.0, "unit": "um"}, (0, 1)),
        ({"spacing": 2.0, "unit": "um"}, (1, 0)),
    ],
    ids=str,
)
def test_an_impossible_imagej_voxel_size_is_none(
    tmp_path: Path, stack: np.ndarray, metadata: dict[str, Any], resolution: tuple[int, int]
) -> None:
    path = saved(tmp_path / "a.tif", stack, imagej=True, resolution=(2, 2), metadata={"axes": "ZYX", **metadata})
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["XResolution"].overwrite(resolution)
    assert read_image(path).voxel_size is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PhysicalSizeZ": 2.0, "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}, (2, 0.5, 0.25)),
        (
            {
                "PhysicalSizeZ": 2000.0,
                "PhysicalSizeY": 0.5,
                "PhysicalSizeX": 0.00025,
                "PhysicalSizeZUnit": "nm",
                "PhysicalSizeYUnit": "µm",
                "PhysicalSizeXUnit": "mm",
            },
            (2, 0.5, 0.25),
        ),
        ({"PhysicalSizeZ": 2.0, "PhysicalSizeY": 0.5}, None),
        ({"PhysicalSizeZ": 0.0, "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}, None),
        ({f"PhysicalSize{a}": 1.0 for a in "ZYX"} | {f"PhysicalSize{a}Unit": "pixel" for a in "ZYX"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_ome_voxel_size(tmp_path: Path, stack: np.ndarray, metadata: dict[str, Any], expected: Any) -> None:
    volume = read_image(saved(tmp_path / "a.tif", stack, ome=True, metadata={"axes": "ZYX", **metadata}))
    assert volume.voxel_size == (None if expected is None else pytest.approx(expected))


def test_plain_tiff_has_no_voxel_size(tmp_path: Path, stack: np.ndarray) -> None:
    assert read_image(saved(tmp_path / "a.tif", stack, resolution=(72, 72), resolutionunit="inch")).voxel_size is None


@pytest.mark.parametrize("size", [SIZE, VoxelSize(0.284, 0.127, 0.127), VoxelSize(1e-3, 250.0, 1e3), None], ids=str)
@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("slices", [5, 1])
def test_images_come_back(tmp_path: Path, stack: np.ndarray, size: VoxelSize | None, dtype: str, slices: int) -> None:
    image = stack[:slices].astype(dtype)
    write_image(tmp_path / "a.tif", image, size)
    volume = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(volume.data, image)
    assert volume.voxel_size == (size and pytest.approx(size, rel=1e-5))


@pytest.mark.parametrize("folder", ["bbbc050/images/Emb01_t001.tif", "bbbc050/labels/Emb10_t451.tif"])
def test_voxel_size_of_real_stacks(shared_data: Path, folder: str) -> None:
    volume = (read_labels if "labels" in folder else read_image)(shared_data / folder)
    assert volume.voxel_size == pytest.approx((1.75, 0.8, 0.8))
    assert volume.shape[0] == 51


def test_real_stacks_without_calibration(shared_data: Path) -> None:
    volume = read_image(shared_data / "no_gt" / "mesospim_mouse_brain_c5.tif")
    assert (volume.shape, volume.data.dtype, volume.voxel_size) == ((124, 86, 94), np.uint16, None)


# labels


def test_seventy_thousand_labels_come_back(tmp_path: Path) -> None:
    labels = np.arange(70_001, dtype=np.int32).repeat(3)[: 70_000 * 3].reshape(70, 100, 30)
    labels[-1, -1, -1] = 70_000
    write_labels(tmp_path / "many.tif", labels, SIZE)
    volume = read_labels(tmp_path / "many.tif")
    np.testing.assert_array_equal(volume.data, labels)
    assert volume.data.dtype == np.int32
    assert volume.voxel_size == pytest.approx(SIZE)
    assert tifffile.TiffFile(tmp_path / "many.tif").series[0].dtype == np.uint32


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "i4", "u4", "i8", "u8"])
def test_labels_up_to_65535_are_for_imagej(tmp_path: Path, dtype: str) -> None:
    labels = np.zeros((5, 6, 7), dtype)
    labels[1, 2, 3] = min(65_535, 1 if dtype == "?" else np.iinfo(dtype).max)
    write_labels(tmp_path / "a.tif", labels, SIZE)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.is_imagej
        assert (tif.series[0].axes, tif.series[0].dtype) == ("ZYX", np.uint16)
        assert tif.imagej_metadata["spacing"] == 1.75
        assert tif.imagej_metadata["max"] == labels.max()
    volume = read_labels(tmp_path / "a.tif")
    assert volume.data.dtype == np.uint16
    np.testing.assert_array_equal(volume.data, labels)
    assert volume.voxel_size == pytest.approx(SIZE)


@pytest.mark.parametrize(
    ("dtype", "largest", "expected"),
    [("f4", 40, "u2"), ("f8", 70_000, "i4"), ("u4", 2**31, "i8"), ("i2", 40, "u2"), ("i8", 2**31 - 1, "i4")],
)
def test_labels_of_any_type_are_read(tmp_path: Path, dtype: str, largest: int, expected: str) -> None:
    labels = np.zeros((5, 6, 7), dtype)
    labels[0, 0, :2] = 7, largest
    volume = read_labels(saved(tmp_path / "a.tif", labels))
    assert volume.data.dtype == expected
    np.testing.assert_array_equal(volume.data, labels)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (-3, "i2", "negative label -3: renumber"),
        (-3, "f4", "negative label -3: renumber"),
        (2.5, "f4", "no whole numbers, for example 2.5: give the label image"),
        (2**63, "u8", "label 9223372036854775808, which is too large: renumber"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, value: float, dtype: str, words: str) -> None:
    labels = np.zeros((5, 6, 7), dtype)
    labels[1, 1, 1] = value
    with pytest.raises(UserError, match=rf"a\.tif has .*{words}"):
        read_labels(saved(tmp_path / "a.tif", labels))


# writing


@pytest.mark.parametrize(
    "array", [np.zeros((4, 5), np.uint8), np.zeros((0, 4, 5), np.uint8), np.zeros((2, 3, 4, 5), np.uint8)], ids=np.shape
)
@pytest.mark.parametrize("write", [write_image, write_labels])
def test_only_stacks_are_written(tmp_path: Path, array: np.ndarray, write: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="only stacks"):
        write(tmp_path / "a.tif", array, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("write", "value"),
    [(write_labels, -1), (write_labels, 2**32), (write_labels, 0.5), (write_image, 1j), (write_image, 1)],
)
def test_what_no_format_holds_is_not_written(tmp_path: Path, write: Callable[..., None], value: complex) -> None:
    with pytest.raises(ValueError, match=r"labels must|cannot be stored"):
        write(tmp_path / "a.tif", np.full((2, 3, 4), value), None)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    write_image(path, stack, SIZE)
    before = path.read_bytes()

    def full(target: Path, *_: object, **__: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tifffile, "imwrite", full)
    for write in (write_image, write_labels):
        with pytest.raises(UserError, match=r"a\.tif cannot be written: the disk is full .*; free some space"):
            write(path, stack, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
