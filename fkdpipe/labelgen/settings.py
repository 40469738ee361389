"""Settings of a generation, on the command line, in a recipe and in Python."""

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
    """Relative weights of the teachers; by default, all are equal."""
    class_map: tuple[Path, ...] = ()
    """Files that map outputs to classes: none, one for all teachers or one per teacher."""
    numbered: bool = False
    """Class folders are named by the index of the teachers' outputs, counted from 0."""
    form: str | None = None
    """What is stored of the outputs, or none for features only; by default, as the store has it
    for this source, or topk:10."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it before softmax."""
    features: tuple[str, ...] = ()
    """pre or post (before or after the last activation), with :D for the leading D components of
    basis, or map (the last feature map after the final norm)."""
    features_code: Literal["float16", "int8"] = "float16"
    """How features are stored: float16, or int8 of the cube root."""
    basis: Path | None = None
    """File written by fit-basis, for leading components."""
    crops: PositiveInt | None = None
    """M, crops per image in total; by default, as many as the store has."""
    crop: CropDistribution | None = None
    """The distribution of the crops, with colour jitter; by default, the store's, or
    RandomResizedCrop."""
    boxes: Literal["stored", "derived"] | None = None
    """Stored, or derived from the seed with a checksum; by default, as in the store, or stored."""
    source: str = ""
    """Name of the labels within the store; by default, the teachers' names."""
    seed: Seed | None = None
    """Seed of the crops and of the order of images; by default, the store's, or 0."""
    precision: Precision = "float32"
    """Precision of the teachers' forward passes."""
    batch_size: PositiveInt = 64
    """Crops per teacher batch."""
    replay: Literal["auto", "cpu", "dali"] = "auto"
    """Backend that turns recorded crops into pixels."""
    threads: PositiveInt | None = None
    """Threads of the replay; by default, the machine's cores."""

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
            raise UsageError("with form none and no features, there is nothing to generate")
        return texts

    @field_validator("basis")
    @classmethod
    def _basis_of_components(cls, basis: Path | None, info: ValidationInfo) -> Path | None:
        for text in info.data.get("features", ()):
            if basis is None and parse_features(text)[1] is not None:
                raise UsageError(
                    f"features {text}: leading components need a basis. Fit one with fkdpipe "
                    "fit-basis and pass it with --basis FILE"
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
        """What the teachers must return beside logits."""
        return feature_layers.needs_of({parse_features(text)[0] for text in self.features})
