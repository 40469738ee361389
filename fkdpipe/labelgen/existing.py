"""What an existing store was made with: what a user need not say again, or must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fkdpipe.common.errors import StoreError, StoreMismatchError, UsageError
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.storage import schema
from fkdpipe.storage.labels import Form
from fkdpipe.storage.location import Location
from fkdpipe.storage.schema import Json
from fkdpipe.storage.settings import CropsSettings
from fkdpipe.storage.store import Part, Store

_OF_DISTRIBUTION = ("scale", "ratio", "flip", "jitter")


@dataclass(frozen=True)
class Drawing:
    """How crops are drawn. derived: boxes are not stored."""

    distribution: CropDistribution
    seed: int
    derived: bool

    def settings(self) -> CropsSettings:
        """As a round records it, whichever crops of the sequence it holds."""
        return CropsSettings.of(self.distribution, seed=self.seed, count=0, derived=self.derived)


def drawing(store: Store | None, settings: GenerateSettings) -> Drawing:
    """What the user named of the crops; else what the store's crops were drawn by; else defaults.

    Boxes of an import were drawn by nobody here: they have no distribution to take.
    """
    drawn = [part.settings for part in store.rounds()] if store is not None else []
    old = (
        drawn[0]
        if drawn and not drawn[0].imported
        else CropsSettings.of(CropDistribution(), seed=0, count=0)
    )
    seed = old.seed if settings.seed is None else settings.seed
    assert seed is not None  # crops drawn here have one
    derived = settings.boxes == "derived" if settings.boxes else old.derived
    return Drawing(settings.crop or old.distribution, seed, derived)


def crops_per_image(store: Store | None, settings: GenerateSettings) -> int:
    """M as asked for, or as the store has it.

    Raises:
        UsageError: neither.
    """
    if settings.crops is not None:
        return settings.crops
    have = sum(part.settings.crops for part in store.rounds()) if store is not None else 0
    if not have:
        raise UsageError("say how many crops per image to record: --crops M.")
    return have


def as_store(store: Store | None, settings: GenerateSettings, source: str) -> GenerateSettings:
    """The settings with what a run onto this store would take from it.

    Args:
        source: whose form is taken, where none is asked for.
    """
    if store is None:
        return settings
    drawn, recorded = drawing(store, settings), form_of(store, source)
    return replace(
        settings,
        form=settings.form or (str(recorded) if recorded else None),
        crops=crops_per_image(store, settings),
        crop=drawn.distribution,
        seed=drawn.seed,
        boxes="derived" if drawn.derived else "stored",
    )


def form_of(store: Store, source: str) -> Form | None:
    """Of the labels of a source, None where there are none."""
    ours = (p for p in store.parts.values() if p.kind == "labels" and p.source == source)
    return next((part.settings.form for part in ours), None)


def recorded_options(store: Store) -> dict[str, dict[str, Any]]:
    """By source, the settings its labels and features were made with; imported ones left out."""
    found: dict[str, dict[str, Any]] = {}
    for part in store.parts.values():
        old = part.settings
        imported = part.kind == "labels" and old.imported_from is not None
        if part.kind not in ("labels", "features") or imported:
            continue
        names = [_spec(teacher) for teacher in old.teachers]
        options = found.setdefault(part.source, {"teacher": names, "form": "none"})
        options |= {"source": part.source, "precision": old.precision}
        if part.kind == "labels":
            options |= {"form": str(old.form), "temperature": old.temperature}
        else:
            dims = "" if old.basis is None else f":{old.dims}"
            kept = {*options.get("features", ()), f"{part.layer}{dims}"}
            options |= {"features": sorted(kept), "features_code": old.code}
    return found


def repair_options(location: Location, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a repair takes from the store: the recorded settings of its source that are not given.

    Raises:
        UsageError: no teacher is given; says with which options the store was made. Its name in the
            store is never taken: it would be loaded, and a store may come from others.
    """
    try:
        recorded = recorded_options(Store(location))
    except StoreError:
        recorded = {}  # damaged records: the repair restores them first
    if not given.get("teacher"):
        lines = "".join(f"\n  {as_words(each)}" for each in recorded.values())
        raise UsageError(
            "--repair needs the teacher that made the store: --teacher NAME or NAME=FILE."
            + (f" The store was made with:{lines}" if lines else "")
        )
    source = given.get("source") or (next(iter(recorded)) if len(recorded) == 1 else "")
    old = recorded.get(source, {})
    return {key: value for key, value in old.items() if key != "teacher" and key not in given}


def _spec(teacher: Mapping[str, Any]) -> str:
    name, library = teacher["name"], teacher["library"]
    return name if library == "timm" else f"{library}:{name}"


def as_words(options: Mapping[str, Any]) -> str:
    """Settings as options of the command line."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if name == "features_code":
            words.append(f"--set {name}={value}")
        else:
            words += [f"--{name} {each}" for each in values]
    return " ".join(words)


def check_drawing(store: Store, part: Part[CropsSettings], wanted: Drawing) -> None:
    """Refuse to draw other crops beside those of a round.

    Raises:
        StoreMismatchError: naming what differs by the keys a user types.
    """
    if part.settings.imported:
        raise StoreMismatchError(
            f"{store.url} has {part.settings.crops} crops per image that were imported with "
            "their labels; no others can be drawn beside them. Leave --crops out to keep them, or "
            "name another store.",
            code="settings",
        )
    changed = schema.differences(_comparable(part.settings), _comparable(wanted.settings()))
    if changed:
        raise StoreMismatchError(
            f"{store.url} was made with other settings: {'; '.join(changed)}. Leave them out to "
            "take the store's, or name another store.",
            code="settings",
        )


def _key(name: str) -> str:
    """As --set and a recipe have it."""
    return f"crop.{name}" if name in _OF_DISTRIBUTION else name


def _comparable(settings: CropsSettings) -> Json:
    """By the keys a user types, without what differs from round to round; pairs as one value."""
    kept = {k: v for k, v in settings.to_json().items() if k not in ("first", "crops")}
    return {_key(k): tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
