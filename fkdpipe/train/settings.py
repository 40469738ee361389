"""Settings of a training run, read from TOML and validated by `config`.

The batch size is in crops, over all processes, per optimiser step. Epochs count crops too: one pass
over the images with m crops each counts as m epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from fkdpipe.common import config
from fkdpipe.common.config import Probability, Seed, Share
from fkdpipe.common.errors import UsageError
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.labels import Target, parse_target

DEFAULT_METHOD = {"name": "fkd"}


@config.settings
class OptimizerSettings:
    """A timm optimiser and its settings."""

    name: str = "sgd"
    """Any timm optimiser: sgd, adamw, lamb, ..."""
    lr: PositiveFloat = 0.1
    """Learning rate."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; see decay_all."""
    momentum: NonNegativeFloat = 0.9
    """Momentum, for optimisers that have one."""
    betas: tuple[float, ...] | None = None
    """Betas of Adam-like optimisers; default: timm's."""
    eps: PositiveFloat | None = None
    """Epsilon of the optimiser; default: timm's."""
    auxiliary_lr: PositiveFloat | None = None
    """Learning rate of the method's auxiliary modules; default: lr."""
    decay_all: bool = True
    """Apply weight decay to biases and norms too."""
    layer_decay: PositiveFloat | None = None
    """Layer-wise learning rate decay, with timm's layer groups."""
    clip_norm: PositiveFloat | None = None
    """Maximum norm of the gradient."""


@config.settings
class MixingSettings:
    """Mixup and CutMix."""

    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's Beta distribution; 0 disables mixup."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix's Beta distribution; 0 disables CutMix."""
    probability: Probability = 1.0
    """Probability of mixing a block of images."""
    switch: Probability = 0.5
    """Probability of CutMix instead of mixup if both are enabled."""
    block: Annotated[int, Field(ge=2)] = 8
    """Number of images that are mixed with each other; a block stays in one process."""

    @property
    def on(self) -> bool:
        return bool(self.mixup or self.cutmix) and self.probability > 0


@config.settings
class ScheduleSettings:
    """Learning rate schedule, updated once per pass of m epochs (FKD's serrated schedule)."""

    name: Literal["cosine", "step", "linear", "constant"] = "cosine"
    """Schedule after the warm-up."""
    warmup_epochs: NonNegativeInt = 0
    """Number of warm-up epochs."""
    warmup_lr: NonNegativeFloat = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Final learning rate of cosine and linear."""
    milestones: tuple[NonNegativeInt, ...] = ()
    """Epochs at which step multiplies the learning rate by gamma."""
    gamma: PositiveFloat = 0.1
    """Learning rate factor of step at each milestone."""
    single_first: NonNegativeInt = 0
    """Epochs with one crop per image at the start of the run."""
    single_last: NonNegativeInt = 0
    """Epochs with one crop per image at the end of the run."""


@config.settings
class TrainSettings:
    """A training run."""

    student: str
    """A timm NAME with random weights, NAME=FILE, or a run folder."""
    target: str | None = None
    """Training target, for example marginal-smoothing:5. Default: ground-truth; required if the
    labels of a store are the only teacher."""
    epochs: PositiveInt = 100
    """Number of epochs; one pass over the images with m crops each counts as m."""
    batch_size: PositiveInt = 256
    """Crops per optimiser step, over all processes."""
    crops_per_image: PositiveInt = 1
    """m, the crops of each image in a batch."""
    method: dict[str, Any] = field(default_factory=DEFAULT_METHOD.copy)
    """Name and settings of the distillation method."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side of the student's input in pixels; default: the network's."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation when crops are resized; default: the network's."""
    student_options: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of timm.create_model for the student."""
    crop: CropDistribution = field(default_factory=CropDistribution)
    """Crop distribution for training without a store; a store has its own."""
    source: str | None = None
    """Source of the labels, if the store has several."""
    label_temperature: PositiveFloat | None = None
    """Temperature of the labels; default: as stored."""
    teacher: str | None = None
    """NAME or NAME=FILE of a live teacher, for methods that need one."""
    teacher_class_map: Path | None = None
    """File that maps the teacher's outputs to the folder's classes."""
    teacher_size: PositiveInt | None = None
    """Side of the teacher's input in pixels; default: the network's."""
    seed: Seed = 0
    """Seed for weights, order and fresh crops."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on GPUs that support it, else float32."""
    replay: Literal["auto", "cpu", "dali"] = "auto"
    """Backend that turns recorded crops into pixels."""
    threads: PositiveInt | None = None
    """Threads of the replay; default: the number of CPU cores."""
    window: PositiveInt = 8
    """Number of units whose images are shuffled together."""
    fraction: Share = 1.0
    """Fraction of the images of every class to train on, chosen by the seed."""
    pretrained: bool = False
    """Start from the library's pretrained weights."""
    new_head: bool = False
    """Replace the classifier of NAME=FILE or a run folder by a new one, for other classes."""
    train_only: Literal["all", "classifier"] = "all"
    """classifier trains a linear probe; the frozen rest stays in eval mode."""
    accumulate: PositiveInt = 1
    """Gradient accumulation steps per optimiser step."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, for example 0.9999; the average is evaluated and
    exported."""
    compile: str | None = None
    """Backend of torch.compile: inductor or aot_eager."""
    sync_batchnorm: bool = False
    """Synchronise batch norm statistics over all processes (GPUs only)."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints, in addition to one after every pass."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = False
    """Also write metrics to TensorBoard."""
    mixing: MixingSettings = field(default_factory=MixingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str | None) -> str | None:
        parse_target(target or "ground-truth")
        return target

    @field_validator("crops_per_image")
    @classmethod
    def _divides_the_batch(cls, crops_per_image: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", 0)
        if batch_size % crops_per_image:
            raise UsageError(
                f"batch_size counts crops: {batch_size} is not a multiple of {crops_per_image} "
                "crops per image"
            )
        return crops_per_image

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: dict[str, Any]) -> dict[str, Any]:
        if method != DEFAULT_METHOD:  # the methods import torch, which takes seconds
            from fkdpipe.train import methods

            methods.parse(method)
        return method

    @field_validator("schedule")
    @classmethod
    def _single_crops_fit(cls, schedule: ScheduleSettings, info: ValidationInfo) -> Any:
        edges = schedule.single_first + schedule.single_last
        if edges > info.data.get("epochs", edges):
            raise UsageError(
                f"{edges} epochs of single crops do not fit {info.data['epochs']} epochs"
            )
        return schedule

    @property
    def parsed_target(self) -> Target:
        return parse_target(self.target or "ground-truth")


def describe(table: Mapping[str, Any]) -> list[config.Setting]:
    """All settings of a run; those of the method (`method.*`) follow `method`."""
    from fkdpipe.train import methods

    described = config.describe(TrainSettings)
    after = 1 + [setting.name for setting in described].index("method")
    return [*described[: after - 1], *methods.describe(table.get("method", {})), *described[after:]]
