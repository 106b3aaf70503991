"""From an image to candidates."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from napari_mrcnn3d._ops import nms_3d
from napari_mrcnn3d.config import FloatTriple, PredictConfig, Triple
from napari_mrcnn3d.device import autocast, choose_device, is_out_of_memory
from napari_mrcnn3d.inference.tiling import Tile, default_tile, make_tiles
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Detections
from napari_mrcnn3d.model.transform import intensity_range, normalize, resample, resample_factors
from napari_mrcnn3d.structures import (
    Candidates,
    DeviceMemoryError,
    Progress,
    Steps,
    UserError,
    Volume,
    VoxelSize,
    drain,
)

__all__ = ["Predictor"]

logger = logging.getLogger(__name__)

# Voxels per tile. On a processor small enough that the parts between two looks at Cancel stay well under a second.
TILE_VOXELS = {"cpu": 1_200_000, "cuda": 16_000_000, "mps": 4_000_000}
SMALLEST_TILE = 32 * 64 * 64
LARGEST_FACTOR = 30  # between the image's scale and the model's
STAGE = "Segmenting"


class Predictor:
    """Segments volumes with one model on one device.

    Parameters
    ----------
    model : MaskRCNN3D
    device : str
        As in :class:`~napari_mrcnn3d.config.PredictConfig`.
    """

    def __init__(self, model: MaskRCNN3D, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()

    def predict(self, volume: Volume, config: PredictConfig | None = None) -> Candidates:
        """Candidates of a volume; :meth:`predict_steps` run to its end."""
        return drain(self.predict_steps(volume, config))

    def predict_steps(self, volume: Volume, config: PredictConfig | None = None) -> Steps[Candidates]:
        """Candidates of a volume, tile by tile.

        Parameters
        ----------
        volume : Volume
            Single channel (z, y, x) of any real type; lazy arrays are read tile by tile.
        config : PredictConfig
            All but ``device`` and ``select`` is used. The voxel size given here wins over the volume's.

        Yields
        ------
        Progress
            ``done`` and ``total`` in thousandths of the whole.

        Returns
        -------
        Candidates
            In voxels of the volume, best first.

        Raises
        ------
        UserError
            If the volume holds NaN or infinite values, no real numbers or no voxels, or its voxel size (or the size
            of its objects) is too far from the model's.
        DeviceMemoryError
            If not even the smallest tile fits into memory.
        """
        config = config or PredictConfig()
        _check(volume)
        shape = volume.shape
        voxel_size = VoxelSize.of(config.voxel_size) if config.voxel_size else volume.voxel_size
        factors = self._factors(voxel_size, config.object_size)
        yield Progress(0, 1000, STAGE)
        limits = intensity_range(volume.data, self.model.config.intensity_percentiles)
        if not np.isfinite(limits).all():
            raise _not_finite(volume)
        z, y, x = np.minimum(config.tile or default_tile(shape, self._tile_voxels(factors)), shape).tolist()
        tile: Triple = z, y, x
        overlap = config.overlap or self._overlap(factors)
        while True:
            try:
                found = yield from self._all_tiles(volume, factors, limits, make_tiles(shape, tile, overlap))
                return self._join(found, shape, voxel_size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: there the error still holds the tensors that filled the memory.
            tile = self._smaller(tile, volume.name)

    def _factors(self, voxel_size: VoxelSize | None, object_size: float | None) -> FloatTriple:
        """Network voxels per image voxel, refused where a length must be wrong: no tile would be small enough."""
        factors = resample_factors(self.model.config, voxel_size, object_size)
        if not all(1 / LARGEST_FACTOR <= f <= LARGEST_FACTOR for f in factors):
            given = f"voxel size {voxel_size and tuple(voxel_size)}" + (
                f", object size {object_size}" if object_size else ""
            )
            known = f"{self.model.config.voxel_size}" + (f", {self.model.config.object_size}" if object_size else "")
            raise UserError(
                f"The {given} (µm) is more than {LARGEST_FACTOR} times larger or smaller than the model's ({known}): "
                "check the numbers and their unit."
            )
        return factors

    def _tile_voxels(self, factors: FloatTriple) -> int:
        """Image voxels per tile: those that become the wanted number of network voxels."""
        return max(1, int(TILE_VOXELS.get(self.device.type, TILE_VOXELS["cpu"]) / np.prod(factors)))

    def _overlap(self, factors: FloatTriple) -> Triple:
        """Image voxels that tiles overlap: a large object, so that one of them sees it whole."""
        sides = np.array([size for group in self.model.config.anchor_sizes for size in group]).max(0)
        z, y, x = np.ceil(sides / factors).astype(int).tolist()
        return z, y, x

    def _smaller(self, tile: Triple, name: str) -> Triple:
        """Half the tile; on the processor once a graphics card is too small even for the smallest."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if np.prod(tile) >= 2 * SMALLEST_TILE:
            smaller = default_tile(tile, int(np.prod(tile)) // 2)
            logger.warning("Out of memory with tiles of %s voxels: trying %s.", tile, smaller)
            return smaller
        if self.device.type != "cpu":
            logger.warning("Out of memory on %s with tiles of %s voxels: using the processor.", self.device, tile)
            self.device = torch.device("cpu")
            self.model = self.model.to(self.device)
            return tile
        raise DeviceMemoryError(
            f"The memory is too small for {name} even in tiles of {tile} voxels: close other programs."
        )

    def _all_tiles(
        self, volume: Volume, factors: FloatTriple, limits: tuple[float, float], tiles: list[Tile]
    ) -> Steps[list[Candidates]]:
        found = []
        for index, tile in enumerate(tiles):
            image = np.asarray(volume.data[tile.slices])
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise _not_finite(volume)
            if image.max() > image.min():
                image = resample(normalize(image, limits), factors)
                detections = yield from self._detect_steps(image, index, len(tiles))
                found.append(_place(detections, tile, image.shape, volume.shape))
            yield Progress(round(1000 * (index + 1) / len(tiles)), 1000, STAGE)
        return found

    def _detect_steps(self, image: np.ndarray, index: int, count: int) -> Steps[Detections]:
        """Detections of tile ``index`` of ``count``; torch's modes are set while it runs, not between yields."""
        steps = self.model.detect_steps(torch.from_numpy(image).to(self.device))
        while True:
            with torch.inference_mode(), autocast(self.device):
                try:
                    part = next(steps)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
            yield Progress(round(1000 * (index + part) / count), 1000, STAGE)

    def _join(self, found: list[Candidates], shape: Triple, voxel_size: VoxelSize | None) -> Candidates:
        """All tiles' candidates, those of one class that overlap across tiles merged to the best."""
        config = self.model.config
        nothing = Candidates.empty(shape, config.mask_size, voxel_size, config.class_names)
        everything = [nothing, *found]
        joined = replace(
            nothing,
            boxes=np.concatenate([c.boxes for c in everything]),
            scores=np.concatenate([c.scores for c in everything]),
            classes=np.concatenate([c.classes for c in everything]),
            masks=np.concatenate([c.masks for c in everything]),
        )
        kept = nms_3d(
            torch.from_numpy(joined.boxes),
            torch.from_numpy(joined.scores),
            config.nms_iou,
            groups=torch.from_numpy(joined.classes),
        )
        return joined.take(kept.numpy())


def _check(volume: Volume) -> None:
    if min(volume.shape) < 1:
        raise UserError(f"{volume.name} has the shape {volume.shape}: there is nothing to segment.")
    if np.dtype(volume.data.dtype).kind not in "biuf":
        raise UserError(f"{volume.name} holds {volume.data.dtype} values: convert it to real numbers first.")


def _not_finite(volume: Volume) -> UserError:
    return UserError(f"{volume.name} holds NaN or infinite values: replace them before segmenting.")


def _place(found: Detections, tile: Tile, resampled: tuple[int, ...], shape: Triple) -> Candidates:
    """Detections of a tile in voxels of the volume, those that other tiles answer for left out."""
    extent = np.subtract(tile.stop, tile.start)
    scale = np.tile(extent / np.array(resampled), 2)
    boxes = (found.boxes.float().cpu().numpy() * scale + np.tile(tile.start, 2)).astype(np.float32)
    candidates = Candidates(
        boxes,
        found.scores.float().cpu().numpy(),
        found.classes.cpu().numpy(),
        (found.masks.float() * 255).round().to(torch.uint8).cpu().numpy(),
        shape,
    )
    return candidates.take(tile.owns(boxes))
