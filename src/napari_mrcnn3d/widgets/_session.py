"""What runs left in a viewer: the candidates, and the layers that are painted from them again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from napari.layers import Image, Labels, Layer, Vectors
from psygnal import Signal

from napari_mrcnn3d import __version__
from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints, paint
from napari_mrcnn3d.inference.select import select
from napari_mrcnn3d.structures import Instances, VoxelSize
from napari_mrcnn3d.widgets import _layers

if TYPE_CHECKING:
    from napari.components import ViewerModel

__all__ = ["METADATA_KEY", "Result", "Session", "Target", "centroids_of", "feature_table"]

METADATA_KEY = "napari-mrcnn3d"
_OUTLINES_LIMIT = 60_000
"""More lines than this take napari too long; then boxes show their twelve edges in flat views, too."""


@dataclass(frozen=True)
class Target:
    """What was segmented, as it was when the run began.

    Attributes
    ----------
    image : napari.layers.Image
        Kept alive, so that the result lies where the image lies even if it was removed meanwhile.
    frame : int
        Position in a series; 0 for a single stack.
    voxel_size : VoxelSize or None
    provenance : dict
        JSON-able facts about the model and the settings.
    """

    image: Image
    frame: int
    voxel_size: VoxelSize | None
    provenance: dict[str, Any] = field(default_factory=dict)


class Result:
    """A label layer and a box layer over an image, repainted from the candidates as the selection changes.

    The label layer is repainted in place, which is right as long as nobody has edited it: from then on its undo
    history refers to the voxels it holds, so it is left alone and ``edited`` is true.

    Parameters
    ----------
    footprints : Footprints
        The network's answer.
    target : Target
    config : SelectConfig
        The first selection.

    Signals
    -------
    was_edited
        The user has edited the label layer for the first time.
    """

    was_edited = Signal()

    def __init__(self, footprints: Footprints, target: Target, config: SelectConfig) -> None:
        self.footprints = footprints
        self.target = target
        self.config = config
        self.edited = False
        self.instances: Instances = select(footprints, config)
        self._centroids = centroids_of(footprints)
        self._along: int | None = 0
        count = len(footprints)
        self._painted = np.zeros(footprints.candidates.shape, np.uint16 if count < 2**16 else np.int32)
        self.labels = self._label_layer()
        self.boxes = self._box_layer()
        self._update()
        self.labels.events.paint.connect(self._on_edit)
        self.labels.events.data.connect(self._on_edit)

    def select(self, config: SelectConfig) -> None:
        """Repaint both layers; an edited label layer is not touched and neither are its boxes."""
        if self.edited or config == self.config:
            return
        self.config = config
        self.instances = select(self.footprints, config)
        self._update()
        self.labels.refresh(extent=False)

    def draw_boxes(self, along: int | None) -> None:
        """Draw boxes as outlines for a view that slices this axis (0, 1, 2), or whole for a 3D view (None)."""
        if along != self._along:
            self._along = along
            self._update_boxes()

    def renewed(self) -> Result:
        """Make new layers from the same candidates and selection."""
        return Result(self.footprints, self.target, self.config)

    def _on_edit(self) -> None:
        if not self.edited:
            self.edited = True
            self.was_edited.emit()

    def _update(self) -> None:
        paint(self.footprints, self.instances, out=self._painted)
        self.labels.features = self._features()
        self.labels.metadata[METADATA_KEY]["config"] |= {"select": self.config.model_dump()}
        self._update_boxes()

    def _update_boxes(self) -> None:
        """Give the lines and their colours to the box layer; all the lines of a box carry its features."""
        vectors, owner = self._lines()
        self.boxes.data = vectors
        self.boxes.features = self._features().iloc[owner].reset_index(drop=True)
        self.boxes.refresh_colors(update_color_mapping=False)

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        boxes, axes = self.instances.candidates.boxes, self.labels.ndim
        if self._along is not None:
            extent = boxes[:, 3 + self._along] - boxes[:, self._along]
            if 4 * np.ceil(extent).sum() <= _OUTLINES_LIMIT:
                return _layers.box_outlines(boxes, self._along, axes)
        return _layers.box_edges(boxes, axes)

    def _label_layer(self) -> Labels:
        image, frame = self.target.image, self.target.frame
        leading = (1,) * (image.ndim - 3)
        return Labels(
            self._painted.reshape(*leading, *self._painted.shape),
            name=f"{image.name} labels",
            metadata={METADATA_KEY: self._provenance()},
            **_layers.geometry_of(image, frame=frame),
        )

    def _box_layer(self) -> Vectors:
        image, frame = self.target.image, self.target.frame
        return Vectors(
            np.zeros((0, 2, image.ndim), np.float32),
            ndim=image.ndim,
            name=f"{image.name} boxes",
            features=self._features().iloc[:0],
            edge_color="score",
            edge_colormap="viridis",
            edge_contrast_limits=(0, 1),
            edge_width=0.4,
            vector_style="line",
            metadata={METADATA_KEY: self._provenance()},
            **_layers.geometry_of(image, frame=frame),
        )

    def _features(self) -> pd.DataFrame:
        return feature_table(self.instances, self._centroids[self.instances.index])

    def _provenance(self) -> dict[str, Any]:
        return {
            **self.target.provenance,
            "config": dict(self.target.provenance.get("config", {})),
            "version": __version__,
            "source_layer": self.target.image.name,
            "frame": self.target.frame,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def feature_table(instances: Instances, centroids: np.ndarray) -> pd.DataFrame:
    """Collect what is known of every object, for the layer's feature table.

    Parameters
    ----------
    instances : Instances
    centroids : float[N, 3]
        z, y, x in voxels, 0 at the centre of the first one.

    Returns
    -------
    DataFrame
        ``index`` (the label), ``score``, ``class``, ``volume_um3`` (``volume_voxels`` where the voxel size is not
        known), and the centroid ``z``, ``y``, ``x`` in voxels.
    """
    found = instances.candidates
    size = found.voxel_size
    volume = {"volume_um3": instances.voxels * size.volume} if size else {"volume_voxels": instances.voxels}
    return pd.DataFrame(
        {
            "index": np.arange(1, len(instances) + 1),
            "score": found.scores.astype(float).round(4),
            "class": pd.Categorical([found.class_names[k - 1] for k in found.classes.tolist()]),
            **volume,
            **dict(zip("zyx", centroids.T.round(2), strict=True)),
        }
    )


def centroids_of(footprints: Footprints) -> np.ndarray:
    """Compute the centroids of the candidates' own voxels, those that better neighbours take counted in.

    Parameters
    ----------
    footprints : Footprints

    Returns
    -------
    float64[N, 3]
        z, y, x in voxels, 0 at the centre of the first one.
    """
    centroids = np.zeros((len(footprints), 3))
    for row, (region, mask) in enumerate(zip(footprints.regions, footprints.masks, strict=True)):
        for axis, part in enumerate(region):
            weight = mask.sum(axis=tuple({0, 1, 2} - {axis}))
            centroids[row, axis] = part.start + weight @ np.arange(len(weight)) / max(weight.sum(), 1)
    return centroids


class Session:
    """The results that are in one viewer.

    Parameters
    ----------
    viewer : napari.components.ViewerModel
    """

    def __init__(self, viewer: ViewerModel) -> None:
        self._viewer = viewer
        self.results: list[Result] = []
        viewer.layers.events.removed.connect(self._on_removed)
        viewer.dims.events.ndisplay.connect(self._on_view)
        viewer.dims.events.order.connect(self._on_view)

    def add(self, result: Result) -> None:
        """Put a result over its image, and hide older ones of the same image so that only one is seen."""
        for old in self.results:
            if old.target.image == result.target.image and old.target.frame == result.target.frame:
                old.labels.visible = old.boxes.visible = False
        result.draw_boxes(self._sliced_axis())
        self.results.append(result)
        self._viewer.add_layer(result.boxes)
        self._viewer.add_layer(result.labels)

    def of(self, layer: Layer | None) -> Result | None:
        """Find the newest result that a layer belongs to, be it the image, the labels or the boxes."""
        for result in reversed(self.results):
            if layer is not None and layer in (result.labels, result.boxes, result.target.image):
                return result
        return None

    def close(self) -> None:
        """Stop listening to the viewer."""
        self._viewer.layers.events.removed.disconnect(self._on_removed)
        self._viewer.dims.events.ndisplay.disconnect(self._on_view)
        self._viewer.dims.events.order.disconnect(self._on_view)

    def _on_removed(self) -> None:
        """Forget results whose labels the user has removed."""
        self.results = [result for result in self.results if result.labels in self._viewer.layers]

    def _on_view(self) -> None:
        for result in self.results:
            result.draw_boxes(self._sliced_axis())

    def _sliced_axis(self) -> int | None:
        """Tell which of z, y, x (0, 1, 2) the viewer slices; None in 3D."""
        dims = self._viewer.dims
        hidden = [axis - (dims.ndim - 3) for axis in dims.not_displayed if axis >= dims.ndim - 3]
        return hidden[-1] if hidden else None
