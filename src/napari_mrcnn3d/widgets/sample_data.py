"""Images to try the plugin on (File > Open Sample), made on the spot."""

from __future__ import annotations

from typing import Any

from napari_mrcnn3d.config import EmbryoConfig, ToyConfig
from napari_mrcnn3d.data.embryo import embryo_image
from napari_mrcnn3d.data.toy import toy_image

__all__ = ["embryo", "toy"]

LayerData = tuple[Any, dict[str, Any], str]


def embryo() -> list[LayerData]:
    """Make nuclei in a synthetic embryo, calibrated in µm.

    Returns
    -------
    list of (data, attributes, layer type)
        As napari's sample data contributions give them.
    """
    made = embryo_image(EmbryoConfig(), 0)
    return [(made.image, {"name": "embryo", "scale": made.voxel_size, "units": ("micrometer",) * 3}, "image")]


def toy() -> list[LayerData]:
    """Make ellipsoids, cuboids and pyramids in heavy noise; they have no voxel size.

    Returns
    -------
    list of (data, attributes, layer type)
    """
    half = ToyConfig(image_size=64, base_radius=7.5)  # what the model toy-shapes has learnt from
    return [(toy_image(half, 0).image, {"name": "toy shapes"}, "image")]
