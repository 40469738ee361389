"""What a generation is: as flags, as a recipe, and as a store records it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fkdpipe.common.errors import UsageError
from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.features import parse_features
from fkdpipe.networks.teachers import Precision
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import schema
from fkdpipe.storage.labels import parse_form


@dataclass(frozen=True)
class GenerateSettings:
    """A generation.

    teacher: NAME or NAME=FILE, one or several. teacher_weight: their relative shares.
    class_map: files that say which output is which class, none, one for all or one per teacher.
    form: what is stored of the outputs, "none" for features only; None takes what the store
    holds of this source, or topk:10.
    temperature: logits are divided by it before softmax.
    features: "pre" or "post" (before or after the last activation), ":D" for the leading D
    components of `basis`, or "map" (the last map after the final norm).
    features_code: float16, or int8 after a cube root.
    crops: M, crops per image in all; None keeps what the store has.
    crop: the law they are drawn by, colour jitter included (crop.jitter). boxes: stored, or derived
    from the seed with a checksum. None takes the store's, or RandomResizedCrop and stored.
    source: name of the labels within the store; "" takes the teachers' names.
    seed: of the crops and of the order of images; None takes the store's, or 0.
    batch: crops per teacher batch. threads: of the replay, None takes the machine's cores.
    """

    teacher: tuple[str, ...] = ()
    teacher_weight: tuple[float, ...] = ()
    class_map: tuple[Path, ...] = ()
    form: str | None = None
    temperature: float = 1.0
    features: tuple[str, ...] = ()
    features_code: Literal["float16", "int8"] = "float16"
    basis: Path | None = None
    crops: int | None = None
    crop: CropDistribution | None = None
    boxes: Literal["stored", "derived"] | None = None
    source: str = ""
    seed: int | None = None
    precision: Precision = "float32"
    batch: int = 64
    replay: Literal["auto", "cpu", "dali"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, "none"):
            parse_form(self.form)
        if self.form == "none" and not self.features:
            raise UsageError("form none without features leaves nothing to generate.")
        for text in self.features:
            _, dims = parse_features(text)
            if dims is not None and self.basis is None:
                raise UsageError(
                    f"features {text}: leading components need a basis. Fit one with fkdpipe "
                    "fit-basis and name it with --basis FILE."
                )
        if not self.teacher:
            raise UsageError("name at least one teacher: --teacher NAME or NAME=FILE.")
        if self.crops is not None and self.crops < 1:
            raise UsageError(f"crops must be at least 1; found {self.crops}.")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be positive; found {self.temperature}.")
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; found {value}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1; found {self.seed}.")
        if self.source:
            schema.check_source_name(self.source)

    @property
    def needs(self) -> Needs:
        """What is asked of the teachers beside logits."""
        return feature_layers.needs_of({parse_features(text)[0] for text in self.features})
