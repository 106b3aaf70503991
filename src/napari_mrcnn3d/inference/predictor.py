"""From an image to candidates."""

from __future__ import annotations

import logging

import numpy as np
import torch

from napari_mrcnn3d._ops import nms_3d
from napari_mrcnn3d.config import PredictConfig, Triple
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
            ``voxel_size``, ``tile`` and ``overlap`` are used. The voxel size given here wins over the volume's.

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
            If the volume holds NaN or infinite values, or has no voxels.
        DeviceMemoryError
            If not even the smallest tile fits into memory.
        """
        config = config or PredictConfig()
        shape = volume.shape
        if min(shape) < 1:
            raise UserError(f"{volume.name} has the shape {shape}: there is nothing to segment.")
        voxel_size = VoxelSize.of(config.voxel_size) if config.voxel_size else volume.voxel_size
        yield Progress(0, 1000, STAGE)
        limits = intensity_range(volume.data, self.model.config.intensity_percentiles)
        tile = config.tile or default_tile(shape, self._tile_voxels(voxel_size))
        while True:
            try:
                found = yield from self._all_tiles(volume, voxel_size, limits, self._tiles(shape, tile, config, voxel_size))
                return self._join(found, shape, voxel_size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: there the error still holds the tensors that filled the memory.
            tile = self._smaller(tile, volume.name)

    def _tile_voxels(self, voxel_size: VoxelSize | None) -> int:
        """Image voxels per tile: those that become the wanted number of network voxels."""
        factors = resample_factors(self.model.config, voxel_size)
        return max(1, int(TILE_VOXELS.get(self.device.type, TILE_VOXELS["cpu"]) / np.prod(factors)))

    def _tiles(
        self, shape: Triple, tile: Triple, config: PredictConfig, voxel_size: VoxelSize | None
    ) -> list[Tile]:
        overlap = config.overlap
        if overlap is None:
            sides = np.array([size for group in self.model.config.anchor_sizes for size in group]).max(0)
            overlap = tuple(np.ceil(sides / resample_factors(self.model.config, voxel_size)).astype(int).tolist())
        return make_tiles(shape, tile, overlap)

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
        self, volume: Volume, voxel_size: VoxelSize | None, limits: tuple[float, float], tiles: list[Tile]
    ) -> Steps[list[Candidates]]:
        factors = resample_factors(self.model.config, voxel_size)
        found = []
        for index, tile in enumerate(tiles):
            image = np.asarray(volume.data[tile.slices])
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise UserError(f"{volume.name} holds NaN or infinite values: replace them before segmenting.")
            if image.max() > image.min():
                image = resample(normalize(image, limits), factors)
                detections = yield from self._detect_steps(image, index, len(tiles))
                found.append(_place(detections, tile, image.shape, volume.shape))
            yield Progress(round(1000 * (index + 1) / len(tiles)), 1000, STAGE)
        return found

    def _detect_steps(self, image: np.ndarray, index: int, count: int) -> Steps[Detections]:
        """Tile ``index`` of ``count`` through the network, whose modes are set only while it runs, not between yields."""
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
        joined = Candidates(
            *(np.concatenate([getattr(c, name) for c in everything]) for name in ("boxes", "scores", "classes", "masks")),
            shape,
            voxel_size,
            config.class_names,
        )
        kept = nms_3d(
            torch.from_numpy(joined.boxes),
            torch.from_numpy(joined.scores),
            config.nms_iou,
            groups=torch.from_numpy(joined.classes),
        )
        return joined.take(kept.numpy())


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
