"""Every setting of the package, its default and the sentence that explains it.

The command line, the widgets and the Python interface are derived from these classes: no default stands anywhere else.
Lengths along axes are in the order z, y, x.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

__all__ = [
    "DataConfig",
    "EmbryoConfig",
    "ModelConfig",
    "PredictConfig",
    "SelectConfig",
    "ToyConfig",
    "TrainConfig",
    "preset",
]

Triple = tuple[int, int, int]
FloatTriple = tuple[float, float, float]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Extent = tuple[PositiveInt, PositiveInt, PositiveInt]
Lengths = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Weights = tuple[PositiveFloat, PositiveFloat]

# Upper bounds keep the header of a foreign model file from asking for a network that cannot be built.
Channels = Annotated[int, Field(ge=1, le=8192)]
Blocks = Annotated[int, Field(ge=1, le=100)]
Cells = Annotated[int, Field(ge=1, le=64)]
Grid = tuple[Cells, Cells, Cells]
MAX_STAGES = 16


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Config):
    """The network. Stored in the header of every model file."""

    # what it was made for
    class_names: tuple[str, ...] = Field(
        ("object",), min_length=1, description="Names of the classes, background left out."
    )
    voxel_size: Lengths | None = Field(None, description="Voxel size of the training images in µm, z y x.")
    object_size: PositiveFloat | None = Field(
        None, description="Median diameter of the training objects in µm; in voxels where the voxel size is unknown."
    )
    intensity_percentiles: tuple[float, float] = Field(
        (1.0, 99.8), description="Percentiles of the image that become 0 and 1; 0 and 100 use the full range."
    )
    resample_tolerance: PositiveFloat = Field(
        1.2, description="Images whose voxel size differs from the model's by more than this factor are resampled."
    )

    # trunk
    block: Literal["basic", "bottleneck"] = Field("basic", description="Residual block of the backbone.")
    norm: Literal["group", "affine"] = Field(
        "group", description="group: group normalisation; affine: a learnt scale and shift only (the predecessor's)."
    )
    stem_channels: Channels = Field(24, description="Channels after the first convolution.")
    stem_kernel: Grid = Field((3, 5, 5), description="Kernel of the first convolution.")
    stem_stride: Grid = Field((1, 2, 2), description="Stride of the first convolution, per axis.")
    stem_pool: bool = Field(False, description="Max-pool by 2 after the first convolution (the predecessor's).")
    stage_channels: tuple[Channels, ...] = Field(
        (32, 64, 96, 128), min_length=1, max_length=MAX_STAGES, description="Output channels of each stage."
    )
    stage_blocks: tuple[Blocks, ...] = Field((1, 2, 2, 2), description="Residual blocks in each stage.")
    stage_strides: tuple[Grid, ...] = Field(
        ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)), description="Stride of each stage, per axis."
    )
    fpn_channels: Channels = Field(64, description="Channels of every pyramid level.")

    # anchors and proposals
    rpn_levels: tuple[int, ...] = Field((1, 2, 3), description="Pyramid levels with anchors; 0 is the finest.")
    rpn_extra_level: bool = Field(False, description="One more, sub-sampled level for anchors (the predecessor's P6).")
    rpn_channels: Channels = Field(64, description="Channels of the proposal head.")
    anchor_sizes: tuple[tuple[Lengths, ...], ...] = Field(
        (((6, 12, 12), (9, 18, 18)), ((12, 24, 24), (17, 34, 34)), ((24, 48, 48),)),
        description="For every level with anchors, the anchors' sides in voxels (z, y, x).",
    )
    anchor_offset: Share = Field(0.5, description="Where in its cell an anchor is centred; the predecessor used 0.")
    rpn_assignment: Literal["atss", "iou"] = Field("atss", description="How anchors are matched to objects.")
    rpn_fg_iou: Share = Field(0.5, description="IoU from which an anchor is positive (assignment by IoU).")
    rpn_bg_iou: Share = Field(0.3, description="IoU below which an anchor is negative (assignment by IoU).")
    rpn_atss_candidates: PositiveInt = Field(
        9, description="Nearest cells per level whose anchors compete for an object."
    )
    rpn_batch_size: PositiveInt = Field(256, description="Anchors sampled per image for the loss.")
    rpn_positive_fraction: Share = Field(0.5, description="Largest share of positives among them.")
    rpn_hard_negatives: bool = Field(True, description="Prefer background anchors that look like objects in the loss.")
    rpn_pre_nms_top_n: PositiveInt = Field(1500, description="Proposals per level before suppression.")
    rpn_post_nms_top_n_train: PositiveInt = Field(256, description="Proposals kept for training the heads.")
    rpn_post_nms_top_n: PositiveInt = Field(1000, description="Proposals kept in prediction, per tile.")
    rpn_nms_iou: Share = Field(0.5, description="Proposals overlapping more than this IoU are merged to the best.")
    rpn_box_weights: Weights = Field((1.0, 1.0), description="Weights of box centre and size targets.")
    rpn_smooth_l1_beta: PositiveFloat = Field(1 / 9, description="Where the proposal box loss turns linear.")

    # regions of interest
    roi_levels: tuple[int, ...] = Field((0, 1, 2), description="Pyramid levels that regions are pooled from.")
    roi_canonical_size: PositiveFloat = Field(
        24.0, description="Geometric mean side in voxels of a region pooled from the canonical level."
    )
    roi_canonical_level: int = Field(0, ge=0, description="The pyramid level for regions of the canonical size.")
    roi_sampling: Literal["roi_align", "crop_and_resize"] = Field(
        "roi_align", description="How features are sampled; crop_and_resize is the predecessor's corner-aligned way."
    )
    sampling_ratio: Cells = Field(1, description="Samples per bin and axis.")
    box_pool_size: Grid = Field((5, 7, 7), description="Grid pooled for class and box.")
    box_head_channels: tuple[Channels, ...] = Field(
        (64, 64), max_length=MAX_STAGES, description="Convolutions of the box head before its layers."
    )
    box_head_kernel: Literal[3, 0] = Field(3, description="3: small kernels; 0: one kernel as large as the grid.")
    box_head_features: Channels = Field(256, description="Width of the box head's hidden layers.")
    mask_pool_size: Grid = Field((10, 14, 14), description="Grid pooled for masks; the mask is twice as fine.")
    mask_head_channels: tuple[Channels, ...] = Field(
        (48, 48, 48), max_length=MAX_STAGES, description="Convolutions of the mask head."
    )
    roi_fg_iou: Share = Field(0.45, description="IoU from which a region is an object in training.")
    roi_batch_size: PositiveInt = Field(64, description="Regions sampled per image in training.")
    roi_positive_fraction: Share = Field(0.33, description="Largest share of objects among them.")
    roi_hard_negatives: bool = Field(True, description="Prefer background regions that look like objects in the loss.")
    mask_batch_size: PositiveInt = Field(16, description="Regions per image whose masks are trained.")
    box_weights: Weights = Field((10.0, 5.0), description="Weights of box centre and size targets.")

    # answer
    score_floor: Share = Field(0.05, description="Candidates below this score are not kept at all.")
    nms_iou: Share = Field(0.5, description="Candidates of one class overlapping more than this IoU are merged.")
    max_candidates: PositiveInt = Field(500, description="Most candidates kept per tile.")

    @property
    def num_classes(self) -> int:
        """Number of classes with background."""
        return len(self.class_names) + 1

    @property
    def mask_size(self) -> Triple:
        """Grid of a predicted mask."""
        z, y, x = self.mask_pool_size
        return 2 * z, 2 * y, 2 * x

    @property
    def level_strides(self) -> tuple[Triple, ...]:
        """Stride of every pyramid level against the input, finest first."""
        stride = [s * (2 if self.stem_pool else 1) for s in self.stem_stride]
        strides = []
        for step in self.stage_strides:
            stride = [a * b for a, b in zip(stride, step, strict=True)]
            strides.append((stride[0], stride[1], stride[2]))
        return tuple(strides)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = len(self.stage_channels)
        if not (len(self.stage_blocks) == len(self.stage_strides) == n):
            raise ValueError("stage_channels, stage_blocks and stage_strides must have one entry per stage")
        if len(self.anchor_sizes) != len(self.rpn_levels) + self.rpn_extra_level:
            raise ValueError("anchor_sizes needs one group per level with anchors")
        if not all(self.anchor_sizes):
            raise ValueError("every level in rpn_levels needs at least one anchor")
        if not self.rpn_levels or not {*self.rpn_levels, *self.roi_levels} <= set(range(n)):
            raise ValueError(f"rpn_levels and roi_levels must be levels of 0..{n - 1}")
        if not self.roi_levels or self.roi_levels != tuple(range(self.roi_levels[0], self.roi_levels[-1] + 1)):
            raise ValueError("roi_levels must be neighbours, finest first")
        if any(side % 2 == 0 for side in self.stem_kernel):
            raise ValueError("stem_kernel must be odd along every axis")
        low, high = self.intensity_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError("intensity_percentiles must rise within 0 and 100")
        return self


class SelectConfig(_Config):
    """What is kept of the candidates. Changing it costs milliseconds, the network does not run again."""

    min_score: Share = Field(0.7, description="Objects the network is less sure of than this are left out (0 to 1).")
    max_overlap: Share = Field(
        0.3, description="Largest share of an object that may already belong to surer ones before it is left out."
    )
    min_size: float = Field(0.0, ge=0, description="Objects smaller than this are left out: µm³, or voxels if unknown.")


class PredictConfig(_Config):
    """How an image is segmented."""

    voxel_size: FloatTriple | None = Field(
        None, description="Voxel size in µm, z y x; read from the file if not given."
    )
    object_size: PositiveFloat | None = Field(
        None,
        description="Typical diameter of your objects in µm, if it is not the model's: the image is scaled to match.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    tile: Extent | None = Field(None, description="Tile in voxels, z y x; chosen from the memory if not given.")
    overlap: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="Overlap of neighbouring tiles in voxels; a model-sized default."
    )
    select: SelectConfig = SelectConfig()


class DataConfig(_Config):
    """Where training pairs come from and how they are cut and varied."""

    patch_size: Extent | None = Field(
        None, description="Patch in voxels, z y x; chosen from the images and objects if not given."
    )
    validation: tuple[str, ...] = Field(
        (), description="Groups kept for validation (for example Emb10 Emb11); drawn by validation_share if empty."
    )
    validation_share: Share = Field(0.2, description="Share of the groups kept for validation if none is named.")
    group_pattern: str = Field(
        r"^(.+?)[_-]t?\d+$", description="Regular expression on file names whose first bracket names the group."
    )
    object_centred: Share = Field(0.8, description="Share of patches centred near an object.")
    min_visible: Share = Field(0.15, description="Objects cut by the patch to less than this share are not targets.")
    augment: bool = Field(True, description="Vary patches: flips, turns, stretching, contrast, blur, noise.")
    workers: int = Field(
        0, ge=0, description="Processes that prepare patches; 0 prepares them in the training process."
    )


class TrainConfig(_Config):
    """How the network is trained."""

    fit_model: bool = Field(True, description="Fit anchors, strides and mask size to the training objects first.")
    steps: PositiveInt = Field(2000, description="Training steps.")
    minutes: PositiveFloat | None = Field(None, description="Stop after this time instead; the schedule follows it.")
    batch_size: PositiveInt = Field(1, description="Patches per step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimiser.")
    learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate.")
    momentum: Share = Field(0.9, description="Momentum of SGD.")
    weight_decay: float = Field(0.02, ge=0, description="Weight decay.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: Share = Field(0.05, description="Share of the run in which the learning rate rises.")
    clip_norm: float = Field(5.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    ema: float = Field(0.995, ge=0, lt=1, description="Decay of the averaged weights that are kept; 0 keeps the last.")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="Arithmetic of the convolutions.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    seed: int = Field(0, ge=0, description="Start of all random numbers.")
    about: str = Field("", description="A sentence on the data and their licence, kept in the model file.")
    validate_minutes: PositiveFloat = Field(10.0, description="Minutes between two validations.")
    validate_volumes: PositiveInt = Field(8, description="Most volumes used in a validation during training.")
    checkpoint_minutes: PositiveFloat = Field(3.0, description="Minutes between two checkpoints.")


class ToyConfig(_Config):
    """The predecessor's toy images: ellipsoids, cuboids and pyramids in heavy noise."""

    image_size: int = Field(128, ge=16, description="Side of the cubic image in voxels.")
    min_objects: int = Field(3, ge=0, description="Fewest objects asked for.")
    max_objects: int = Field(20, ge=0, description="Most objects asked for.")
    base_radius: PositiveFloat = Field(15.0, description="Typical half side in voxels, varied by 0.5 to 2 per axis.")
    signal: tuple[float, float] = Field((0.02, 0.10), description="Range of the brightness objects add.")
    seed: int = Field(0, ge=0, description="Start of all random numbers; image n depends on it and n alone.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        _check_range("objects", self.min_objects, self.max_objects)
        _check_range("signal", *self.signal)
        return self


class EmbryoConfig(_Config):
    """Synthetic embryos: bright nuclei in an ellipsoidal embryo, seen by a microscope."""

    shape: Triple = Field((48, 128, 128), description="Image in voxels, z y x.")
    voxel_size: FloatTriple = Field((2.0, 0.8, 0.8), description="Voxel size in µm, z y x.")
    min_nuclei: PositiveInt = Field(6, description="Fewest nuclei.")
    max_nuclei: PositiveInt = Field(30, description="Most nuclei.")
    nucleus_diameter: tuple[float, float] = Field((9.0, 14.0), description="Range of nuclear diameters in µm.")
    blur: FloatTriple = Field((2.4, 0.6, 0.6), description="Standard deviation of the microscope's blur in µm, z y x.")
    attenuation: float = Field(0.008, ge=0, description="Loss of light per µm of depth (0.01 loses 63 % in 100 µm).")
    photons: PositiveFloat = Field(30.0, description="Photons a bright voxel gives: fewer are noisier.")
    read_noise: float = Field(0.3, ge=0, description="Camera noise in photons (standard deviation).")
    background: float = Field(0.8, ge=0, description="Light outside nuclei in photons.")
    seed: int = Field(0, ge=0, description="Start of all random numbers; image n depends on it and n alone.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        _check_range("nuclei", self.min_nuclei, self.max_nuclei)
        _check_range("nucleus_diameter", *self.nucleus_diameter)
        return self


def _check_range(name: str, least: float, most: float) -> None:
    if least > most:
        raise ValueError(f"the range of {name} runs from {least} down to {most}: give the smaller number first")


def preset(name: str) -> tuple[ModelConfig, DataConfig, TrainConfig]:
    """Settings of a named preset.

    Parameters
    ----------
    name : {"small", "seed"}
        ``small`` trains on two processor cores; ``seed`` is the predecessor's network and protocol (3D ResNet-50,
        one cubic anchor per cell, frozen normalisation, SGD without schedule), kept as the baseline to beat.

    Raises
    ------
    ValueError
        If there is no such preset.
    """
    if name == "small":
        return ModelConfig(), DataConfig(), TrainConfig()
    if name == "seed":
        return _seed_model(), DataConfig(augment=False, patch_size=(64, 64, 64), min_visible=0.0), _seed_training()
    raise ValueError(f"There is no preset {name!r}: use small or seed.")


def _seed_model() -> ModelConfig:
    """David & Faure's shipped configuration (branch main), with the anchor sides of a 128-voxel cube."""
    return ModelConfig(
        intensity_percentiles=(0.0, 100.0),
        block="bottleneck",
        norm="affine",
        stem_channels=64,
        stem_kernel=(7, 7, 7),
        stem_stride=(2, 2, 2),
        stem_pool=True,
        stage_channels=(256, 512, 1024, 2048),
        stage_blocks=(3, 4, 6, 3),
        fpn_channels=256,
        rpn_levels=(0, 1, 2, 3),
        rpn_extra_level=True,
        rpn_channels=512,
        anchor_sizes=tuple(((side, side, side),) for side in (32.0, 64.0, 128.0, 256.0, 512.0)),
        anchor_offset=0.0,
        rpn_assignment="iou",
        rpn_fg_iou=0.7,
        rpn_bg_iou=0.3,
        rpn_batch_size=1500,
        rpn_hard_negatives=False,
        rpn_pre_nms_top_n=2000,
        rpn_post_nms_top_n_train=500,
        rpn_post_nms_top_n=500,
        rpn_nms_iou=0.7,
        rpn_box_weights=(10.0, 5.0),
        rpn_smooth_l1_beta=1.0,
        roi_levels=(0, 1, 2, 3),
        roi_canonical_size=224.0,
        roi_canonical_level=2,
        roi_sampling="crop_and_resize",
        box_pool_size=(7, 7, 7),
        box_head_channels=(),
        box_head_kernel=0,
        box_head_features=512,
        mask_pool_size=(14, 14, 14),
        mask_head_channels=(256, 256, 256, 256),
        roi_fg_iou=0.5,
        roi_batch_size=40,
        roi_positive_fraction=0.2,
        roi_hard_negatives=False,
        mask_batch_size=8,
        nms_iou=0.3,
        max_candidates=40,
    )


def _seed_training() -> TrainConfig:
    return TrainConfig(
        optimizer="sgd",
        learning_rate=1e-3,
        weight_decay=1e-4,
        schedule="constant",
        warmup=0.0,
        clip_norm=0.0,
        ema=0.0,
        precision="fp32",
        fit_model=False,
    )
