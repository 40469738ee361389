"""What a training run is: the recipe, as frozen dataclasses. `config` reads them
from TOML.

Batch size counts crops, over all processes, per optimiser step. Epochs count crops too: one pass
over the images with m crops of each counts as m epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fkdpipe.common.errors import UsageError
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage.labels import Target, parse_target


@dataclass(frozen=True)
class OptimizerSettings:
    """name is any optimiser of timm (`sgd`, `adamw`, `lamb`, ...).

    betas, eps: None take the optimiser's own.
    auxiliary_lr: rate of a method's auxiliary modules, None for the student's.
    decay_all: weight decay on biases and norms too. layer_decay: factor of the rate from each
        layer to the one before it, as timm groups them.
    clip_norm: largest norm of the whole gradient.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    auxiliary_lr: float | None = None
    decay_all: bool = True
    layer_decay: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UsageError("lr must be positive and weight_decay not negative.")
        for name in ("auxiliary_lr", "layer_decay", "clip_norm", "eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} must be positive; found {value}.")


@dataclass(frozen=True)
class MixingSettings:
    """Mixup and CutMix of the batch: alpha of each, 0 for none.

    probability: of mixing a block of images at all. switch: of CutMix where both are asked for.
    block: images that are mixed with each other; no process splits one.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    block: int = 8

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise UsageError("mixup and cutmix are the alpha of a Beta law; they are not negative.")
        if not (0 <= self.probability <= 1 and 0 <= self.switch <= 1):
            raise UsageError("mixing: probability and switch must be within 0 and 1.")
        if self.block < 2:
            raise UsageError(f"mixing: a block has at least 2 images; found {self.block}.")

    @property
    def on(self) -> bool:
        return bool(self.mixup or self.cutmix) and self.probability > 0


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate, set once per pass of m epochs (FKD's serrated schedule).

    single_first, single_last: epochs at the ends of the run that use one crop per image.
    milestones: epochs at which `step` multiplies the rate by gamma.
    """

    name: Literal["cosine", "step", "linear", "constant"] = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    single_first: int = 0
    single_last: int = 0


@dataclass(frozen=True)
class TrainSettings:
    """A run.

    target: what is learnt. None is ground-truth, unless the labels of a store are all there is
        to teach with: then it must be named.
    size: side of the student's input in pixels; None takes the network's own.
    interpolation: of the crops' resize; None takes the network's own.
    replay: backend; threads: of the replay, None takes the machine's cores.
    crop: law of the fresh crops when there is no store; a store's crops bring theirs, colour
        jitter included.
    source: which labels of the store; label_temperature: of the labels, None as stored.
    teacher: NAME[=FILE] of a teacher that runs beside the student, for methods that need one;
        teacher_class_map: which of its outputs are the folder's classes; teacher_size: side of
        its input in pixels, None takes its own.
    window: units of images that are shuffled together.
    fraction: share of the images of every class that is trained on, chosen by the seed.
    pretrained: begin from the library's published weights instead of random ones.
    new_head: leave out the classifier of NAME=FILE; it may be of other classes.
    train_only: `classifier` trains a linear probe: the rest keeps its weights, in eval mode.
    accumulate: parts that a process's share of a step is cut into, one backward pass each.
    ema: decay of an average of the weights, which is then what is evaluated and exported.
    compile: a backend of torch.compile, `inductor` or `aot_eager`.
    sync_batchnorm: statistics over all processes (GPUs only).
    log_every: steps between lines of metrics. eval_every: epochs between evaluations.
    checkpoint_every: steps between checkpoints, beside the one after every pass.
    keep_checkpoints: how many of the newest stay. tensorboard: metrics go there too.
    """

    student: str
    target: str | None = None
    epochs: int = 100
    batch_size: int = 256
    crops_per_image: int = 1
    method: dict[str, Any] = field(default_factory=lambda: {"name": "fkd"})
    size: int | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    student_options: dict[str, Any] = field(default_factory=dict)
    crop: CropDistribution = field(default_factory=CropDistribution)
    source: str | None = None
    label_temperature: float | None = None
    teacher: str | None = None
    teacher_class_map: Path | None = None
    teacher_size: int | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    replay: Literal["auto", "cpu", "dali"] = "auto"
    threads: int | None = None
    window: int = 8
    fraction: float = 1.0
    pretrained: bool = False
    new_head: bool = False
    train_only: Literal["all", "classifier"] = "all"
    accumulate: int = 1
    ema: float | None = None
    compile: str | None = None
    sync_batchnorm: bool = False
    log_every: int = 50
    eval_every: int = 1
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    tensorboard: bool = False
    mixing: MixingSettings = field(default_factory=MixingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)

    def __post_init__(self) -> None:
        parse_target(self.target or "ground-truth")
        for name in (
            "epochs",
            "batch_size",
            "crops_per_image",
            "window",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; found {getattr(self, name)}.")
        if self.batch_size % self.crops_per_image:
            raise UsageError(
                f"batch_size counts crops: {self.batch_size} is no multiple of "
                f"{self.crops_per_image} crops per image."
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1; found {self.seed}.")
        if self.size is not None and self.size < 8:
            raise UsageError(f"size must be at least 8 pixels; found {self.size}.")
        if not 0 < self.fraction <= 1:
            raise UsageError(
                f"fraction is a share above 0 and up to 1, such as 0.1; found {self.fraction}."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(
                f"ema is a decay between 0 and 1, for example 0.9999; found {self.ema}."
            )
        edges = self.schedule.single_first + self.schedule.single_last
        if edges > self.epochs:
            raise UsageError(f"{edges} epochs of single crops do not fit {self.epochs} epochs.")

    @property
    def parsed_target(self) -> Target:
        return parse_target(self.target or "ground-truth")
