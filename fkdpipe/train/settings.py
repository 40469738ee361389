"""What a training run is: the recipe, as settings that `config` checks and reads from TOML.

Batch size counts crops, over all processes, per optimiser step. Epochs count crops too: one pass
over the images with m crops of each counts as m epochs.
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
    """Any optimiser of timm and what it takes."""

    name: str = "sgd"
    """Any optimiser of timm: sgd, adamw, lamb, ..."""
    lr: PositiveFloat = 0.1
    """Learning rate."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decay of the weights; see decay_all."""
    momentum: NonNegativeFloat = 0.9
    """Of optimisers that have one."""
    betas: tuple[float, ...] | None = None
    """By default the optimiser's own."""
    eps: PositiveFloat | None = None
    """By default the optimiser's own."""
    auxiliary_lr: PositiveFloat | None = None
    """Learning rate of a method's auxiliary modules; by default the student's."""
    decay_all: bool = True
    """Weight decay on biases and norms too."""
    layer_decay: PositiveFloat | None = None
    """Factor of the rate from each layer to the one before it, as timm groups them."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient."""


@config.settings
class MixingSettings:
    """Mixup and CutMix of the batch."""

    mixup: NonNegativeFloat = 0.0
    """Alpha of Mixup's Beta distribution; 0 for none."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix's Beta distribution; 0 for none."""
    probability: Probability = 1.0
    """Of mixing a block of images at all."""
    switch: Probability = 0.5
    """Probability of CutMix where both are asked for."""
    block: Annotated[int, Field(ge=2)] = 8
    """Images that are mixed with each other; no process splits a block."""

    @property
    def on(self) -> bool:
        return bool(self.mixup or self.cutmix) and self.probability > 0


@config.settings
class ScheduleSettings:
    """The learning rate, set once per pass of m epochs (FKD's serrated schedule)."""

    name: Literal["cosine", "step", "linear", "constant"] = "cosine"
    """Course of the rate after the warm-up."""
    warmup_epochs: NonNegativeInt = 0
    """Epochs of warm-up."""
    warmup_lr: NonNegativeFloat = 1e-6
    """Rate where the warm-up begins."""
    min_lr: NonNegativeFloat = 0.0
    """Rate where cosine and linear end."""
    milestones: tuple[NonNegativeInt, ...] = ()
    """Epochs at which step multiplies the rate by gamma."""
    gamma: PositiveFloat = 0.1
    """Factor of step at each milestone."""
    single_first: NonNegativeInt = 0
    """Epochs at the beginning of the run that use one crop per image."""
    single_last: NonNegativeInt = 0
    """Epochs at the end of the run that use one crop per image."""


@config.settings
class TrainSettings:
    """A run."""

    student: str
    """NAME of timm, with random weights, or NAME=FILE; a run folder."""
    target: str | None = None
    """What is learnt, for example marginal-smoothing:5. By default ground-truth, unless the labels
    of a store are all there is to teach with: then it must be named."""
    epochs: PositiveInt = 100
    """Length of the run; one pass over the images with m crops of each counts as m."""
    batch_size: PositiveInt = 256
    """Crops per optimiser step, over all processes."""
    crops_per_image: PositiveInt = 1
    """m: crops of each image in a batch."""
    method: dict[str, Any] = field(default_factory=DEFAULT_METHOD.copy)
    """Name and settings of the distillation method."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side of the student's input in pixels; by default the network's own."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of the crops' resize; by default the network's own."""
    student_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model for the student."""
    crop: CropDistribution = field(default_factory=CropDistribution)
    """Of the fresh crops when there is no store; a store's crops bring theirs, colour jitter
    included."""
    source: str | None = None
    """Which labels of the store, when it has several."""
    label_temperature: PositiveFloat | None = None
    """Temperature of the labels; by default as stored."""
    teacher: str | None = None
    """NAME or NAME=FILE of a teacher that runs beside the student, for methods that need one."""
    teacher_class_map: Path | None = None
    """File that says which of the teacher's outputs are the folder's classes."""
    teacher_size: PositiveInt | None = None
    """Side of the teacher's input in pixels; by default its own."""
    seed: Seed = 0
    """Of weights, order and fresh crops."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the student's forward pass; auto is bfloat16 on GPUs that have it, else float32."""
    replay: Literal["auto", "cpu", "dali"] = "auto"
    """Backend that turns recorded crops into pixels."""
    threads: PositiveInt | None = None
    """Of the replay; by default the machine's cores."""
    window: PositiveInt = 8
    """Units of images that are shuffled together."""
    fraction: Share = 1.0
    """Share of the images of every class that is trained on, chosen by the seed."""
    pretrained: bool = False
    """Begin from the library's published weights instead of random ones."""
    new_head: bool = False
    """Leave out the classifier of NAME=FILE; it may be of other classes."""
    train_only: Literal["all", "classifier"] = "all"
    """classifier trains a linear probe: the rest keeps its weights, in eval mode."""
    accumulate: PositiveInt = 1
    """Parts that a process's share of a step is cut into, one backward pass each."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the weights, which is then what is evaluated and exported; for
    example 0.9999."""
    compile: str | None = None
    """A backend of torch.compile: inductor or aot_eager."""
    sync_batchnorm: bool = False
    """Batch-norm statistics over all processes (GPUs only)."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints, beside the one after every pass."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest stay."""
    tensorboard: bool = False
    """Metrics go to TensorBoard too."""
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
                f"batch_size counts crops: {batch_size} is no multiple of {crops_per_image} crops "
                "per image"
            )
        return crops_per_image

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: dict[str, Any]) -> dict[str, Any]:
        if method != DEFAULT_METHOD:  # the methods' files need torch, which takes seconds to load
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
    """Every setting of a run, those of the table's method (`method.*`) after the method itself."""
    from fkdpipe.train import methods

    described = config.describe(TrainSettings)
    after = 1 + [setting.name for setting in described].index("method")
    return [*described[: after - 1], *methods.describe(table.get("method", {})), *described[after:]]
