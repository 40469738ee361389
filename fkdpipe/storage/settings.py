"""Settings of a part, as stored in its `zarr.json`: what two runs must agree on.

They are parsed once, when a part is loaded or started. `to_json` returns exactly what was read,
since markers hold its digest. `others` holds keys without a field here, such as an import's origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from fkdpipe.common.errors import StoreError
from fkdpipe.pixels import crops as drawing
from fkdpipe.pixels.crops import CropDistribution, Jitter
from fkdpipe.storage.features import Code
from fkdpipe.storage.labels import Form, parse_form
from fkdpipe.storage.schema import Json

Kind = Literal["images", "crops", "labels", "features"]
Backend = Literal["cpu", "dali"]
Pair = tuple[float, float]


@dataclass(frozen=True)
class ImagesSettings:
    """Of the list of images. rows: length of each array."""

    kind: ClassVar[Kind] = "images"

    fingerprint: str
    order_seed: int
    rows: dict[str, int]

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        return cls(**facts)


@dataclass(frozen=True)
class CropsSettings:
    """Of a round of crops: their distribution, and which crops of the endless sequence it holds.

    Attributes:
        name, version: of the distribution; "imported:<format>" if the boxes came with labels.
        scale, ratio, flip, seed: None if an import does not know them.
        derived: only a checksum is stored, and crops are drawn again from the seed.
        first, crops: the round holds crops `first` to `first + crops - 1`.
        jitter: strengths of recorded colour jitter; None if none is recorded.
    """

    kind: ClassVar[Kind] = "crops"

    name: str
    version: int
    scale: Pair | None
    ratio: Pair | None
    flip: float | None
    seed: int | None
    first: int
    crops: int
    derived: bool = False
    jitter: Jitter | None = None
    others: Json = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        distribution: CropDistribution,
        *,
        seed: int,
        count: int,
        first: int = 0,
        derived: bool = False,
    ) -> Self:
        """Settings of crops that fkdpipe draws."""
        return cls(
            name=drawing.DISTRIBUTION_NAME,
            version=drawing.DISTRIBUTION_VERSION,
            scale=distribution.scale,
            ratio=distribution.ratio,
            flip=distribution.flip,
            seed=seed,
            first=first,
            crops=count,
            derived=derived,
            jitter=distribution.jitter,
        )

    @property
    def imported(self) -> bool:
        """Were the boxes imported with their labels?"""
        return self.name != drawing.DISTRIBUTION_NAME

    @property
    def known(self) -> bool:
        """Can this version draw these crops again?"""
        return not self.imported and self.version == drawing.DISTRIBUTION_VERSION

    @property
    def distribution(self) -> CropDistribution:
        """The distribution the crops are drawn from.

        Raises:
            StoreError: this version of fkdpipe does not know the distribution or its version.
        """
        if not self.known or self.scale is None or self.ratio is None or self.flip is None:
            raise StoreError(
                f"these crops come from the distribution {self.name} (version {self.version}), "
                "which this version of fkdpipe cannot draw from.",
                code="unknown-law",
            )
        return CropDistribution(self.scale, self.ratio, self.flip, self.jitter)

    def to_json(self) -> Json:
        facts = _to_json(self, optional="jitter")
        facts["law"] = facts.pop("name")
        facts["boxes"] = "derived" if facts.pop("derived") else "stored"
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        boxes = facts["boxes"]
        values = _from_json(cls, facts, optional="jitter", name="law", derived="boxes")
        jitter = values["jitter"] and Jitter(**values["jitter"])
        return cls(**{**values, "derived": boxes == "derived", "jitter": jitter})


@dataclass(frozen=True)
class LabelSettings:
    """Of one source's labels in a round; None is what an import does not know.

    Attributes:
        classes: C, width of the teacher's output. crops: M.
        temperature: logits were divided by it before the softmax.
        precision: of the teacher's computation. replay: backend of the pixels.
        teachers: facts of each (`fkdpipe.networks.teachers.Teacher.facts`).
        imported_from: the label files' format and fingerprint; None for generated labels.
    """

    kind: ClassVar[Kind] = "labels"

    form: Form
    classes: int
    crops: int
    temperature: float | None = 1.0
    precision: str | None = None
    replay: Backend | None = None
    teachers: tuple[Json, ...] = ()
    imported_from: Json | None = None
    others: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        return {**_to_json(self, optional="imported_from"), "form": str(self.form)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        values = _from_json(cls, facts, optional="imported_from")
        return cls(**{**values, "form": parse_form(values["form"])})


@dataclass(frozen=True)
class FeatureSettings:
    """Of one source's feature vectors in a round.

    Attributes:
        layer: "pre", "post" or "map". dims: D. width: of the teacher. code: how they are stored.
        basis: digest of the basis whose leading D components these are; None for raw vectors.
        pre_is_post: the teacher has no last activation, so "pre" also serves as "post".
        shape: (C, H, W) of a map, else None.
    """

    kind: ClassVar[Kind] = "features"

    layer: str
    dims: int
    width: int
    code: Code
    crops: int
    basis: str | None = None
    pre_is_post: bool = False
    shape: tuple[int, ...] | None = None
    precision: str | None = None
    replay: Backend | None = None
    teachers: tuple[Json, ...] = ()
    others: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        facts = _to_json(self, optional="shape")
        facts["tap"] = facts.pop("layer")
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        return cls(**_from_json(cls, facts, optional="shape", layer="tap"))


Settings = ImagesSettings | CropsSettings | LabelSettings | FeatureSettings
_BY_KIND: dict[str, type[Settings]] = {
    "images": ImagesSettings,
    "crops": CropsSettings,
    "labels": LabelSettings,
    "features": FeatureSettings,
}


def parse(kind: str, facts: Mapping[str, Any]) -> Settings:
    """Parse settings; raises KeyError, TypeError or ValueError if they are not of this kind."""
    return _BY_KIND[kind].from_json(facts)


def _to_json(settings: Any, *, optional: str) -> Json:
    """JSON values by field, without the optional one if it is None."""
    facts = asdict(settings)
    facts |= facts.pop("others")
    if facts[optional] is None:
        del facts[optional]
    return {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}


def _from_json(cls: Any, facts: Mapping[str, Any], *, optional: str, **keys: str) -> dict[str, Any]:
    """Arguments of a settings class. keys: field to key, where they differ.

    Raises:
        KeyError: a required key is missing. A default in its place would be written back and
            change the digest.
    """
    others = {optional: None, **facts}
    names = [f.name for f in fields(cls) if f.name != "others"]
    values = {name: others.pop(keys.get(name, name)) for name in names}
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    return {**values, **lists, "others": others}
