"""Which candidates become objects: the rule behind the three sliders."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from napari_mrcnn3d.config import SelectConfig
from napari_mrcnn3d.inference.paint import Footprints
from napari_mrcnn3d.structures import Candidates, Instances

__all__ = ["select"]


def select(
    source: Candidates | Footprints, config: SelectConfig, *, classes: Collection[int] | None = None
) -> Instances:
    """Keep candidates that are sure, large and free enough, the surest first.

    From the best score down, a candidate is kept if its score and its size reach their limits, if at most
    ``max_overlap`` of its voxels belong to kept ones already, and if what is left of it has at least one voxel and
    reaches the size limit, too. All shares are counted in voxels, exactly.

    Parameters
    ----------
    source : Candidates or Footprints
        Footprints are worth keeping if more than one selection is made: they hold all that takes time.
    config : SelectConfig
        ``min_size`` is in µm³, or in voxels where the candidates have no voxel size.
    classes : collection of int, optional
        Only candidates of these classes (1 is the first name) are looked at; all by default.

    Returns
    -------
    Instances
        Best first; ``voxels`` as :func:`~napari_mrcnn3d.inference.paint.paint` paints them.

    Raises
    ------
    ValueError
        If the candidates are not sorted best first.
    """
    footprints = Footprints.of(source)
    candidates = footprints.candidates
    unit = candidates.voxel_size.volume if candidates.voxel_size else 1.0
    eligible = (candidates.scores >= config.min_score) & (footprints.voxels > 0)
    eligible &= footprints.voxels * unit >= config.min_size
    if classes is not None:
        eligible &= np.isin(candidates.classes, list(classes))
    visible: dict[int, int] = {}  # of the kept ones, in the order of their scores
    for index in np.flatnonzero(eligible).tolist():
        left = _left_over(footprints, index, visible, config.max_overlap)
        if left > 0 and left * unit >= config.min_size:
            visible[index] = left
    kept = np.fromiter(visible.keys(), np.int64, len(visible))
    return Instances(candidates.take(kept), kept, np.fromiter(visible.values(), np.int64, len(visible)))


def _left_over(footprints: Footprints, index: int, kept: dict[int, int], max_overlap: float) -> int:
    """Voxels of a candidate that no kept one has; 0 if they have too large a share of it."""
    own, shared = int(footprints.voxels[index]), footprints.shared[index]
    rivals = [other for other in shared if other in kept]
    if not rivals:
        return own
    if max(shared[other] for other in rivals) / own > max_overlap:
        return 0  # one of them alone has too much: no need to count exactly
    covered = footprints.covered(index, rivals)
    return own - covered if covered / own <= max_overlap else 0
