"""What a generation is: as flags, as a recipe, and as a store records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fkdpipe.crops import CropLaw
from fkdpipe.errors import UsageError
from fkdpipe.storage import schema
from fkdpipe.storage.labels import Form, parse_form
from fkdpipe.teachers import Precision


@dataclass(frozen=True)
class GenerateSettings:
    """A generation.

    teacher: NAME or NAME=FILE, one or several. teacher_weight: their relative shares.
    class_map: files that say which output is which class, none, one for all or one per teacher.
    form: what is stored of the outputs. temperature: logits are divided by it before softmax.
    crops: M, crops per image in all; None keeps what the store has.
    crop: the law they are drawn by. boxes: stored, or derived from the seed with a checksum.
    source: name of the labels within the store; "" takes the teachers' names.
    seed: of the crops and of the order of images.
    batch: crops per teacher batch. threads: of the replay, None takes the machine's cores.
    """

    teacher: tuple[str, ...] = ()
    teacher_weight: tuple[float, ...] = ()
    class_map: tuple[Path, ...] = ()
    form: str = "topk:10"
    temperature: float = 1.0
    crops: int | None = None
    crop: CropLaw = field(default_factory=CropLaw)
    boxes: Literal["stored", "derived"] = "stored"
    source: str = ""
    seed: int = 0
    precision: Precision = "float32"
    batch: int = 64
    replay: Literal["auto", "cpu", "dali"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        parse_form(self.form)
        if not self.teacher:
            raise UsageError("name at least one teacher: --teacher NAME or NAME=FILE.")
        if self.crops is not None and self.crops < 1:
            raise UsageError(f"crops must be at least 1; found {self.crops}.")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be positive; found {self.temperature}.")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1; found {self.batch}.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1; found {self.seed}.")
        if self.source:
            schema.check_source_name(self.source)

    @property
    def parsed_form(self) -> Form:
        return parse_form(self.form)
