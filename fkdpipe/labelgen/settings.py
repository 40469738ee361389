"""What a generation is: as flags, as a recipe, and as a store records it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, ValidationInfo, field_validator

from fkdpipe.common import config
from fkdpipe.common.config import Seed
from fkdpipe.common.errors import UsageError
from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import Needs
from fkdpipe.networks.features import parse_features
from fkdpipe.networks.teachers import Precision
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import schema
from fkdpipe.storage.labels import parse_form


@config.settings
class GenerateSettings:
    """A generation."""

    teacher: tuple[str, ...]
    """NAME or NAME=FILE, one or several."""
    teacher_weight: tuple[float, ...] = ()
    """Relative shares of the teachers; by default all the same."""
    class_map: tuple[Path, ...] = ()
    """Files that say which output is which class: none, one for all or one per teacher."""
    form: str | None = None
    """What is stored of the outputs, none for features only; by default what the store holds of
    this source, or topk:10."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it before softmax."""
    features: tuple[str, ...] = ()
    """pre or post (before or after the last activation), :D for the leading D components of basis,
    or map (the last map after the final norm)."""
    features_code: Literal["float16", "int8"] = "float16"
    """float16, or int8 after a cube root."""
    basis: Path | None = None
    """File of fit-basis, for leading components."""
    crops: PositiveInt | None = None
    """M, crops per image in all; by default what the store has."""
    crop: CropDistribution | None = None
    """The distribution they are drawn from, colour jitter included; by default the store's, or
    RandomResizedCrop."""
    boxes: Literal["stored", "derived"] | None = None
    """Stored, or derived from the seed with a checksum; by default as the store's, or stored."""
    source: str = ""
    """Name of the labels within the store; by default the teachers' names."""
    seed: Seed | None = None
    """Of the crops and of the order of images; by default the store's, or 0."""
    precision: Precision = "float32"
    """Of the teachers' forward passes."""
    batch_size: PositiveInt = 64
    """Crops per teacher batch."""
    replay: Literal["auto", "cpu", "dali"] = "auto"
    """Backend that turns recorded crops into pixels."""
    threads: PositiveInt | None = None
    """Of the replay; by default the machine's cores."""

    @field_validator("teacher")
    @classmethod
    def _one_teacher(cls, teacher: tuple[str, ...]) -> tuple[str, ...]:
        if not teacher:
            raise UsageError("name at least one")
        return teacher

    @field_validator("form")
    @classmethod
    def _known_form(cls, form: str | None) -> str | None:
        if form not in (None, "none"):
            parse_form(form)
        return form

    @field_validator("features")
    @classmethod
    def _known_features(cls, texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for text in texts:
            parse_features(text)
        if not texts and info.data.get("form") == "none":
            raise UsageError("form none without features leaves nothing to generate")
        return texts

    @field_validator("basis")
    @classmethod
    def _basis_of_components(cls, basis: Path | None, info: ValidationInfo) -> Path | None:
        for text in info.data.get("features", ()):
            if basis is None and parse_features(text)[1] is not None:
                raise UsageError(
                    f"features {text}: leading components need a basis. Fit one with fkdpipe "
                    "fit-basis and name it with --basis FILE"
                )
        return basis

    @field_validator("source")
    @classmethod
    def _fit_name(cls, source: str) -> str:
        if source:
            schema.check_source_name(source)
        return source

    @property
    def needs(self) -> Needs:
        """What is asked of the teachers beside logits."""
        return feature_layers.needs_of({parse_features(text)[0] for text in self.features})
