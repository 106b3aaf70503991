"""Synthetic embryos: the truth is right, and the light does what the settings say."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, center_of_mass, label

from napari_mrcnn3d.config import DataConfig, EmbryoConfig
from napari_mrcnn3d.data.embryo import embryo_image, generate_embryo_steps
from napari_mrcnn3d.data.volumes import find_pairs
from napari_mrcnn3d.structures import VoxelSize, drain

SMALL = EmbryoConfig(shape=(16, 48, 48), voxel_size=(3.0, 1.0, 1.0), min_nuclei=3, max_nuclei=5, seed=2)
CLEAN = SMALL.model_copy(update={"attenuation": 0.0, "read_noise": 0.0, "photons": 2000.0, "background": 0.1})


def changed(**values: object) -> EmbryoConfig:
    return CLEAN.model_copy(update=values)


def signal(config: EmbryoConfig, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image without the camera's offset, and labels."""
    made = embryo_image(config, index)
    return made.image.astype(float) - 100, made.labels


def test_an_embryo_holds_the_nuclei_asked_for() -> None:
    for index in range(6):
        made = embryo_image(SMALL, index)
        n = int(made.labels.max())
        assert 3 <= n <= 5
        assert np.unique(made.labels).tolist() == list(range(n + 1))
        assert (made.image.dtype, made.labels.dtype) == (np.uint16, np.uint16)
        assert made.image.shape == made.labels.shape == SMALL.shape
        assert made.voxel_size == VoxelSize(3.0, 1.0, 1.0)


def test_an_embryo_depends_on_its_number_and_the_seed_alone() -> None:
    first = embryo_image(SMALL, 1)
    embryo_image(SMALL, 7)
    assert np.array_equal(first.image, embryo_image(SMALL, 1).image)
    assert not np.array_equal(first.image, embryo_image(SMALL, 2).image)
    assert not np.array_equal(first.image, embryo_image(SMALL.model_copy(update={"seed": 5}), 1).image)


def test_nuclei_are_single_pieces_that_do_not_touch() -> None:
    made = embryo_image(EmbryoConfig(shape=(32, 64, 64), voxel_size=(1.0, 0.8, 0.8), max_nuclei=25), 0)
    for k in range(1, int(made.labels.max()) + 1):
        mask = made.labels == k
        assert label(mask)[1] == 1
        assert set(np.unique(made.labels[binary_dilation(mask)])) <= {0, k}


@pytest.mark.parametrize("voxel_size", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (0.8, 0.5, 1.1)])
def test_sizes_are_in_micrometres_whatever_the_voxel(voxel_size: tuple[float, float, float]) -> None:
    shape = tuple(round(60 / v) for v in voxel_size)
    config = EmbryoConfig(shape=shape, voxel_size=voxel_size, min_nuclei=8, max_nuclei=8, nucleus_diameter=(10, 10))
    volumes = [
        volume * np.prod(voxel_size)
        for index in range(3)
        for volume in np.bincount(embryo_image(config, index).labels.ravel())[1:]
    ]
    assert np.median(volumes) == pytest.approx(np.pi / 6 * 1000, rel=0.3)  # a ball of 10 µm, deformed


def test_nuclei_lie_inside_the_embryo() -> None:
    half = np.multiply(SMALL.shape, SMALL.voxel_size) / 2
    for index in range(6):
        labels = embryo_image(SMALL, index).labels
        for centre in center_of_mass(labels > 0, labels, range(1, int(labels.max()) + 1)):
            offset = (np.add(centre, 0.5) * SMALL.voxel_size - half) / half
            assert np.linalg.norm(offset) < 1.1  # the embryo is centred to a few per cent


def test_nuclei_are_brighter_than_their_surroundings() -> None:
    image, labels = signal(CLEAN)
    background = np.median(image[labels == 0])
    for k in range(1, int(labels.max()) + 1):
        assert np.median(image[labels == k]) > background + 100


def test_light_is_lost_with_depth() -> None:
    clear, labels = signal(CLEAN)
    dimmed, _ = signal(changed(attenuation=0.02))
    planes = range(2, 14)
    ratio = [dimmed[z][labels[z] > 0].sum() / clear[z][labels[z] > 0].sum() for z in planes if labels[z].any()]
    depth = [3.0 * z for z in planes if labels[z].any()]
    slope = np.polyfit(depth, np.log(ratio), 1)[0]
    assert slope == pytest.approx(-0.02, abs=0.004)


def test_blur_is_wider_along_z() -> None:
    config = changed(shape=(48, 48, 48), voxel_size=(1.0, 1.0, 1.0), min_nuclei=1, max_nuclei=1, blur=(4.0, 0.5, 0.5))
    image, labels = signal(config)
    sharp, _ = signal(config.model_copy(update={"blur": (0.5, 0.5, 0.5)}))
    inside = np.argwhere(labels > 0)
    middle = np.round(inside.mean(0)).astype(int)
    above = np.array([inside[:, 0].min() - 4, *middle[1:]])
    beside = np.array([*middle[:2], inside[:, 2].min() - 4])
    assert image[tuple(above)] > 3 * max(sharp[tuple(above)], 1)
    assert image[tuple(above)] > 2 * image[tuple(beside)]


def test_fewer_photons_are_noisier() -> None:
    few, labels = signal(changed(photons=20.0, background=0.0))
    many, _ = signal(changed(photons=2000.0, background=0.0))
    inside = labels > 0
    assert np.corrcoef(few[inside], many[inside])[0, 1] < 0.95
    # on average the light is in proportion
    assert many[inside].mean() / few[inside].mean() == pytest.approx(100, rel=0.05)


def test_a_dark_image_shows_the_camera_alone() -> None:
    config = changed(photons=1e-6, background=0.0, read_noise=2.0)
    image, _ = signal(config)
    assert image.mean() == pytest.approx(0, abs=0.5)
    assert image.std() == pytest.approx(16, rel=0.05)  # 2 photons at 8 grey values each


def test_a_crowded_embryo_ends_with_fewer_nuclei() -> None:
    config = SMALL.model_copy(update={"min_nuclei": 500, "max_nuclei": 500})
    assert 5 < embryo_image(config, 0).labels.max() < 200


def test_a_flat_or_tiny_field_works() -> None:
    for shape in ((1, 40, 40), (4, 3, 3)):
        assert embryo_image(SMALL.model_copy(update={"shape": shape}), 0).image.shape == shape


def test_grey_values_resemble_a_real_embryo(shared_data: Path) -> None:
    pairs, _ = find_pairs(shared_data / "bbbc050", DataConfig().group_pattern)
    real = next(p for p in pairs if p.name == "Emb10_t401").load()
    made = embryo_image(EmbryoConfig(), 0)
    for image, labels in ((real.image, real.labels), (made.image, made.labels)):
        background, nuclei = image[labels == 0], image[labels > 0]
        assert 90 < np.median(background) < 125
        assert 2 < (np.median(nuclei) - np.median(background)) / background.std() < 15
        # noisy photons make the bright tail long
        low, median, high = np.percentile(nuclei, [5, 50, 95])
        assert high - median > median - low


def test_one_volume_takes_less_than_a_second() -> None:
    before = time.process_time()
    embryo_image(EmbryoConfig(), 3)
    assert time.process_time() - before < 1


def test_a_data_set_opens_with_its_voxel_size(tmp_path: Path) -> None:
    folders = [drain(generate_embryo_steps(SMALL, tmp_path / str(w), 3, workers=w)) for w in (1, 2)]
    pairs, names = find_pairs(folders[0], DataConfig().group_pattern)
    assert [p.name for p in pairs] == ["embryo0001", "embryo0002", "embryo0003"]
    assert len({p.group for p in pairs}) == 3
    assert names == ("object",)
    volume, made = pairs[2].load(), embryo_image(SMALL, 2)
    assert np.array_equal(volume.image, made.image)
    assert np.array_equal(volume.labels, made.labels)
    assert volume.voxel_size == pytest.approx(SMALL.voxel_size)
    for sub in ("images", "labels"):
        for path in (folders[0] / sub).iterdir():
            assert path.read_bytes() == (folders[1] / sub / path.name).read_bytes()
