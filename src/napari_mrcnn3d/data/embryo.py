"""Synthetic embryos: nuclei inside an ellipsoid, as a fluorescence microscope would see them.

An image is made in the order that light takes: where fluorescence is (nuclei with chromatin, a faint cytoplasm), its
loss with depth, the microscope's blur, photon counting, the camera. Lengths are in µm, so that any voxel size can be
asked for. The model is our own; sections and grey-value percentiles were compared with the mouse embryos of BBBC050
(Tokuoka et al. 2020, doi 10.1038/s41540-020-00152-8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from napari_mrcnn3d.config import EmbryoConfig
from napari_mrcnn3d.data._generate import generate_files
from napari_mrcnn3d.io.tiff import write_image, write_labels
from napari_mrcnn3d.structures import Steps, VoxelSize

__all__ = ["EmbryoImage", "embryo_image", "generate_embryo_steps"]

_BYTES_PER_VOXEL = 40
"""Memory while an image is made: six float32 volumes and the filters' buffers."""
_REJECTIONS = 300
"""No further nucleus is tried after more misplaced ones than this."""
_GAP = 0.8
"""Least distance between nuclei in µm."""
_VISIBLE = 0.3
"""Least share of a nucleus that must lie in the field of view."""
_OFFSET, _GAIN = 100.0, 8.0
"""Camera: grey value of no light, and of one photon."""
_CHROMATIN_SCALE = 0.9
"""Grain of the chromatin in µm."""
_CHROMATIN_CONTRAST = 0.45
_HAZE, _HAZE_WIDTH = 0.15, 4.0
"""Share of the light that is out of focus, and how much wider than the blur it spreads."""
_CYTOPLASM = 2.0
"""Light inside the embryo over light outside it, nuclei left out."""


@dataclass(frozen=True)
class EmbryoImage:
    """A synthetic stack and the truth.

    Attributes
    ----------
    image : uint16 array, shape (z, y, x)
    labels : uint16 array, shape (z, y, x)
        0 is background, nuclei are 1..n.
    voxel_size : VoxelSize
        In µm.
    """

    image: np.ndarray
    labels: np.ndarray
    voxel_size: VoxelSize


def embryo_image(config: EmbryoConfig, index: int) -> EmbryoImage:
    """Embryo number ``index``, which depends on the configuration and this number alone.

    Parameters
    ----------
    config : EmbryoConfig
    index : int
        From 0.

    Returns
    -------
    EmbryoImage
        With fewer nuclei than ``config.min_nuclei`` if there is no room for them.
    """
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, index]))
    embryo = _embryo(config, rng)
    labels, brightness = _nuclei(config, embryo, rng)
    light = _fluorescence(config, embryo, labels, brightness, rng)
    return EmbryoImage(_recorded(config, light, rng), labels, VoxelSize(*config.voxel_size))


def generate_embryo_steps(config: EmbryoConfig, folder: Path, count: int, *, workers: int = 1) -> Steps[Path]:
    """Write embryos as pairs of TIFF files with their voxel size.

    Parameters
    ----------
    config : EmbryoConfig
    folder : Path
        Gets ``images`` and ``labels`` with files embryo0001.tif, embryo0002.tif, ...
    count : int
    workers : int
        Processes. The files are the same for any number.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UserError
        If the folder cannot be written or already holds images.
    """
    nbytes = _BYTES_PER_VOXEL * int(np.prod(config.shape, dtype=np.int64))
    task = partial(_write, config=config)
    stage = "Generating embryos"
    return (yield from generate_files(task, Path(folder), count=count, workers=workers, nbytes=nbytes, stage=stage))


def _write(index: int, place: Path, *, config: EmbryoConfig) -> None:
    made = embryo_image(config, index)
    for sub in ("images", "labels"):
        (place / sub).mkdir(parents=True)
    name = f"embryo{index + 1:04d}.tif"
    write_image(place / "images" / name, made.image, made.voxel_size)
    write_labels(place / "labels" / name, made.labels, made.voxel_size)


@dataclass(frozen=True)
class _Body:
    """An ellipsoid with a slightly bumpy surface; lengths in µm.

    Attributes
    ----------
    centre, half : float64[3]
        Position (z, y, x), and half axes before turning.
    turn : float64[3, 3]
        From the field's axes to the body's.
    wave : float64[3]
        Direction and frequency of the bumps along the surface.
    """

    centre: np.ndarray
    half: np.ndarray
    turn: np.ndarray
    wave: np.ndarray

    def reach(self, margin: float = 0.0) -> np.ndarray:
        """Half sides of a box that surely holds the body, bumps and margin included."""
        return np.asarray(np.sqrt((self.turn.T**2) @ (self.half**2)) * (1 + _BUMPS) + margin)

    def contains(self, points: list[np.ndarray], margin: float = 0.0) -> np.ndarray:
        """Which points (open grids of z, y, x in µm) lie within the body and a margin around it."""
        offsets = [p - c for p, c in zip(points, self.centre, strict=True)]
        local = [sum(w * d for w, d in zip(row, offsets, strict=True)) for row in self.turn]
        scaled = [u / (h + margin) for u, h in zip(local, self.half, strict=True)]
        bump = 1 + _BUMPS * np.sin(sum(k * u for k, u in zip(self.wave, scaled, strict=True)))
        return np.asarray(sum(u * u for u in scaled) <= bump * bump)


_BUMPS = 0.06
"""Amplitude of the bumps as a share of the radius."""


def _embryo(config: EmbryoConfig, rng: np.random.Generator) -> _Body:
    """A smooth ellipsoid that fills most of the field and may be cut a little by its border."""
    field = np.multiply(config.shape, config.voxel_size)
    centre = field * (0.5 + 0.03 * rng.standard_normal(3))
    return _Body(centre, 0.5 * field * rng.uniform(0.85, 1.0, 3), np.eye(3), np.zeros(3))


def _nuclei(config: EmbryoConfig, embryo: _Body, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the brightness of each label (entry 0 is background)."""
    labels = np.zeros(config.shape, np.uint16)
    wanted = int(rng.integers(config.min_nuclei, config.max_nuclei, endpoint=True))
    cavity = rng.uniform(0.3, 0.7) if rng.random() < 0.4 else 0.0
    brightness = [0.0]
    rejections = 0
    while len(brightness) <= wanted and rejections <= _REJECTIONS:
        mitotic = rng.random() < 0.08
        nucleus = _nucleus(config, embryo, rng, cavity=cavity, mitotic=mitotic)
        if _place(labels, nucleus, np.asarray(config.voxel_size), label=len(brightness)):
            dim = rng.uniform(0.25, 0.5) if rng.random() < 0.12 else 1.0
            brightness.append(dim * (1.7 if mitotic else 1.0) * rng.lognormal(-0.1, 0.25))
        else:
            rejections += 1
    return labels, np.array(brightness, np.float32)


def _nucleus(config: EmbryoConfig, embryo: _Body, rng: np.random.Generator, *, cavity: float, mitotic: bool) -> _Body:
    """A nucleus that lies inside the embryo and outside its cavity, a share of the embryo's radius.

    Most are nearly round. Chromosomes of a dividing cell form a plate; around a cavity nuclei lie flat on the surface.
    """
    radius = 0.5 * rng.uniform(*config.nucleus_diameter)
    outwards = rng.standard_normal(3)
    outwards /= np.linalg.norm(outwards)
    distance = rng.uniform(cavity**3, 1) ** (1 / 3)  # uniform in the volume between the two radii
    centre = embryo.centre + outwards * distance * np.maximum(embryo.half - radius, 0)
    stretch = np.exp(0.12 * rng.standard_normal(3))
    if mitotic:
        stretch *= (0.55, 1.0, 1.25)
    elif cavity:
        stretch *= (0.75, 1.1, 1.2)
    axes = rng.standard_normal((3, 3))
    if not mitotic:
        axes[:, 0] = outwards
    turn = np.linalg.qr(axes)[0].T  # its first row is the direction of the first half axis
    return _Body(centre, radius * stretch, turn, rng.uniform(-3, 3, 3))


def _place(labels: np.ndarray, nucleus: _Body, voxel: np.ndarray, *, label: int) -> bool:
    """Draw a nucleus if it keeps its distance from the others and most of it is seen."""
    reach = nucleus.reach(_GAP)
    low = np.floor((nucleus.centre - reach) / voxel).astype(int)
    high = np.ceil((nucleus.centre + reach) / voxel).astype(int) + 1
    whole = [(np.arange(a, b) + 0.5) * v for a, b, v in zip(low, high, voxel, strict=True)]
    points = list(np.ix_(*whole))
    seen = tuple(slice(max(0, -a), max(0, n - a)) for a, n in zip(low, labels.shape, strict=True))
    inside = nucleus.contains(points)
    visible = inside[seen]
    if not visible.any() or visible.sum() < _VISIBLE * inside.sum():
        return False
    window = labels[tuple(slice(max(0, a), max(0, b)) for a, b in zip(low, high, strict=True))]
    if window[nucleus.contains(points, _GAP)[seen]].any():
        return False
    window[visible] = label
    return True


def _fluorescence(
    config: EmbryoConfig, embryo: _Body, labels: np.ndarray, brightness: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Light that leaves every voxel towards the microscope, in photons of a sharp image; float32."""
    voxel = np.asarray(config.voxel_size)
    grain = gaussian_filter(rng.standard_normal(labels.shape, np.float32), _CHROMATIN_SCALE / voxel)
    grain *= _CHROMATIN_CONTRAST / max(float(grain.std()), 1e-6)
    centres = np.ix_(*[(np.arange(n) + 0.5) * v for n, v in zip(labels.shape, voxel, strict=True)])
    cytoplasm = np.where(embryo.contains(list(centres)), np.float32(_CYTOPLASM), np.float32(1)) / _CYTOPLASM
    light = config.photons * brightness[labels] * np.exp(grain) + config.background * cytoplasm
    depth = centres[0] - centres[0].flat[0]
    return np.asarray(light * np.exp(-config.attenuation * depth), np.float32)


def _recorded(config: EmbryoConfig, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the camera stores: blurred, counted in photons, multiplied, with read noise, gain and offset; uint16.

    The multiplication is that of the EM-CCD cameras of spinning-disk microscopes: n photons come out as a gamma
    distribution of shape n (Basden, Haniff & Mackay 2003, MNRAS 345:985), which gives the bright specks of dark images.
    """
    sigma = np.divide(config.blur, config.voxel_size)
    sharp = gaussian_filter(light, sigma, mode="nearest", truncate=3)
    haze = gaussian_filter(light, _HAZE_WIDTH * sigma, mode="nearest", truncate=2)
    electrons = rng.standard_gamma(rng.poisson((1 - _HAZE) * sharp + _HAZE * haze))
    electrons += config.read_noise * rng.standard_normal(light.shape, np.float32)
    grey: np.ndarray = np.clip(np.rint(_OFFSET + _GAIN * electrons), 0, np.iinfo(np.uint16).max)
    return grey.astype(np.uint16)
