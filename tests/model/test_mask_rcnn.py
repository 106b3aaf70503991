"""The whole network: any input, any objects, every weight learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from napari_mrcnn3d.config import preset
from napari_mrcnn3d.model.mask_rcnn import MaskRCNN3D
from napari_mrcnn3d.model.roi_heads import Detections, Target
from tests._tiny import Shape, ellipsoids, picture, target_of, tiny_config, tiny_model

SHAPE = (16, 32, 32)
TWO = [((7, 9, 9), (4, 6, 6)), ((9, 22, 22), (5, 6, 6))]


def batch(objects: list[list], shape: Shape = SHAPE, classes: list[int] | None = None) -> tuple[Tensor, list[Target]]:
    """Images and targets, one for each list of ellipsoids."""
    labels = [ellipsoids(shape, found) for found in objects]
    images = torch.stack([torch.from_numpy(picture(part).astype("float32") / 500) for part in labels])
    return images[:, None], [target_of(part, classes) for part in labels]


def detect(model: MaskRCNN3D, image: Tensor) -> tuple[Detections, list[float]]:
    steps, shares = model.detect_steps(image), []
    with torch.inference_mode():
        while True:
            try:
                shares.append(next(steps))
            except StopIteration as stop:
                return stop.value, shares


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 17), (5, 9, 33), (17, 16, 16)])
def test_any_shape_is_an_image(shape: Shape) -> None:
    model = tiny_model(score_floor=0.0)
    found, shares = detect(model, torch.rand(shape))
    assert len(found.boxes) > 0
    assert (found.boxes[:, 3:] <= torch.tensor(shape)).all()
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    losses = model.loss(torch.rand(1, 1, *shape), [target_of(ellipsoids(shape, []))])
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 33), (16, 32, 32)])
def test_every_level_covers_the_whole_image(shape: Shape) -> None:
    config = tiny_config()
    with torch.device("meta"):
        levels = MaskRCNN3D(config).pyramid(torch.zeros(2, 1, *shape))
    for level, stride in zip(levels, config.level_strides, strict=True):
        assert level.shape[:2] == (2, 8)
        assert all(cells * s >= n for cells, s, n in zip(level.shape[2:], stride, shape, strict=True))


@pytest.mark.parametrize("changes", [{}, {"block": "bottleneck", "norm": "affine", "box_head_kernel": 0}])
def test_every_weight_learns(changes: dict[str, object]) -> None:
    everywhere = {"rpn_batch_size": 5000, "rpn_hard_negatives": False, "roi_levels": (0, 1, 2)}
    model = tiny_model(**everywhere, **changes).train()
    images, targets = batch([TWO])
    torch.stack(list(model.loss(images, targets).values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


TINY_OBJECTS = [((3.5, 3.5, 3.5), (0.4, 0.4, 0.4)), ((9.5, 20.5, 21.5), (0.4, 0.4, 0.4))]
EVERYTHING = [((8, 16, 16), (99, 99, 99))]


@pytest.mark.parametrize("changes", [{}, {"rpn_assignment": "iou", "roi_sampling": "crop_and_resize"}])
@pytest.mark.parametrize(
    "objects", [[[]], [TINY_OBJECTS], [EVERYTHING], [TWO, []]], ids=["none", "voxels", "everything", "batch"]
)
def test_losses_are_finite_whatever_the_objects(objects: list[list], changes: dict[str, object]) -> None:
    model = tiny_model(**changes).train()
    images, targets = batch(objects)
    losses = model.loss(images, targets)
    assert len(losses) == 5
    assert all(torch.isfinite(v) for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_classes_and_masks_per_class() -> None:
    names = ("nucleus", "cell", "pollen")
    model = tiny_model(class_names=names, score_floor=0.0, max_candidates=5000)
    images, targets = batch([TWO], classes=[1, 3])
    assert all(torch.isfinite(v) for v in model.loss(images, targets).values())
    assert model.roi_heads.mask_head(torch.zeros(2, 8, 4, 4, 4)).shape == (2, 3, 8, 8, 8)
    found, _ = detect(model, images[0, 0])
    assert set(found.classes.tolist()) == {1, 2, 3}


def test_the_same_image_gives_the_same_answer() -> None:
    model = tiny_model(score_floor=0.0)
    image = torch.rand(SHAPE)
    first, second = detect(model, image)[0], detect(model, image)[0]
    assert torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.masks, second.masks)


def test_bfloat16_gives_boxes_in_float32() -> None:
    model = tiny_model(score_floor=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = detect(model, torch.rand(SHAPE))
        losses = model.loss(*batch([TWO]))
    assert found.boxes.dtype == found.masks.dtype == torch.float32
    assert {v.dtype for v in losses.values()} == {torch.float32}


def test_the_small_preset_is_small() -> None:
    config, _, _ = preset("small")
    with torch.device("meta"):
        model = MaskRCNN3D(config)
        levels = model.pyramid(torch.zeros(1, 1, 48, 96, 96))
    assert [tuple(level.shape[2:]) for level in levels] == [(48, 48, 48), (24, 24, 24), (12, 12, 12), (6, 6, 6)]
    assert 2 * sum(p.numel() for p in model.parameters()) < 16e6  # bytes of its model file


def test_the_predecessors_preset_is_the_predecessors_network() -> None:
    config, _, _ = preset("seed")
    with torch.device("meta"):
        model = MaskRCNN3D(config)
        levels = model.pyramid(torch.zeros(1, 1, 128, 128, 128))
    assert [tuple(level.shape[1:]) for level in levels] == [(256, n, n, n) for n in (32, 16, 8, 4)]
    assert model.roi_heads.box_head(torch.zeros(3, 256, 7, 7, 7, device="meta"))[1].shape == (3, 2, 6)
    assert model.roi_heads.mask_head(torch.zeros(3, 256, 14, 14, 14, device="meta")).shape == (3, 1, 28, 28, 28)
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())


@pytest.mark.slow
def test_the_predecessors_preset_runs() -> None:
    torch.manual_seed(0)
    model = MaskRCNN3D(preset("seed")[0].model_copy(update={"score_floor": 0.0})).eval()
    found, _ = detect(model, torch.rand(32, 32, 32))
    assert found.masks.shape[1:] == (28, 28, 28)
    with torch.inference_mode():
        losses = model.loss(*batch([[((16, 16, 16), (9, 8, 7))]], (32, 32, 32)))
    assert all(torch.isfinite(v) for v in losses.values())
