"""Settings of an existing store, which a user need not repeat and cannot change."""

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
        """As a round records it, except for the crops of the sequence that it holds."""
        return CropsSettings.of(self.distribution, seed=self.seed, count=0, derived=self.derived)


def drawing(store: Store | None, settings: GenerateSettings) -> Drawing:
    """How to draw crops: as the user asks, else as the store's crops were drawn, else by default.

    Imported boxes were not drawn by fkdpipe and have no known distribution.
    """
    drawn = [part.settings for part in store.rounds()] if store is not None else []
    old = (
        drawn[0]
        if drawn and not drawn[0].imported
        else CropsSettings.of(CropDistribution(), seed=0, count=0)
    )
    seed = old.seed if settings.seed is None else settings.seed
    assert seed is not None  # crops drawn by fkdpipe have one
    derived = settings.boxes == "derived" if settings.boxes else old.derived
    return Drawing(settings.crop or old.distribution, seed, derived)


def crops_per_image(store: Store | None, settings: GenerateSettings) -> int:
    """M as requested, else as the store has it.

    Raises:
        UsageError: there is neither.
    """
    if settings.crops is not None:
        return settings.crops
    have = sum(part.settings.crops for part in store.rounds()) if store is not None else 0
    if not have:
        raise UsageError("choose how many crops per image to record: --crops M.")
    return have


def as_store(store: Store | None, settings: GenerateSettings, source: str) -> GenerateSettings:
    """The settings, completed with those that a run on this store would take from it.

    Args:
        source: whose form is taken if none is requested.
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
    """The form of a source's labels, None if it has none."""
    ours = (p for p in store.parts.values() if p.kind == "labels" and p.source == source)
    return next((part.settings.form for part in ours), None)


def recorded_options(store: Store) -> dict[str, dict[str, Any]]:
    """By source, the settings that labels and features were made with, without imported ones."""
    recorded: dict[str, dict[str, Any]] = {}
    for part in store.parts.values():
        old = part.settings
        imported = part.kind == "labels" and old.imported_from is not None
        if part.kind not in ("labels", "features") or imported:
            continue
        names = [_spec(teacher) for teacher in old.teachers]
        options = recorded.setdefault(part.source, {"teacher": names, "form": "none"})
        options |= {"source": part.source, "precision": old.precision}
        if part.kind == "labels":
            options |= {"form": str(old.form), "temperature": old.temperature}
        else:
            dims = "" if old.basis is None else f":{old.dims}"
            kept = {*options.get("features", ()), f"{part.layer}{dims}"}
            options |= {"features": sorted(kept), "features_code": old.code}
    return recorded


def repair_options(location: Location, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a repair takes from the store: those of its source that the user left out.

    Raises:
        UsageError: no teacher is named; says with which options the store was made. The teacher's
            name in the store is not used: it would be loaded, and a store may come from others.
    """
    try:
        recorded = recorded_options(Store(location))
    except StoreError:
        recorded = {}  # damaged records, which the repair restores first
    if not options.get("teacher"):
        lines = "".join(f"\n  {as_words(each)}" for each in recorded.values())
        raise UsageError(
            "--repair needs the teacher that made the store: --teacher NAME or NAME=FILE."
            + (f" The store was made with:{lines}" if lines else "")
        )
    source = options.get("source") or (next(iter(recorded)) if len(recorded) == 1 else "")
    old = recorded.get(source, {})
    return {key: value for key, value in old.items() if key != "teacher" and key not in options}


def _spec(teacher: Mapping[str, Any]) -> str:
    name, library = teacher["name"], teacher["library"]
    return name if library == "timm" else f"{library}:{name}"


def as_words(options: Mapping[str, Any]) -> str:
    """Settings as command-line options."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if name == "features_code":
            words.append(f"--set {name}={value}")
        else:
            words += [f"--{name} {each}" for each in values]
    return " ".join(words)


def check_drawing(store: Store, part: Part[CropsSettings], new: Drawing) -> None:
    """Refuse to draw crops in another way than a round's.

    Raises:
        StoreMismatchError: lists the differences, by the keys that a user types.
    """
    if part.settings.imported:
        raise StoreMismatchError(
            f"{store.url} has {part.settings.crops} crops per image that were imported with "
            "their labels; no other crops can be drawn beside them. Leave --crops out to keep "
            "them, or name another store.",
            code="settings",
        )
    changed = schema.differences(_comparable(part.settings), _comparable(new.settings()))
    if changed:
        raise StoreMismatchError(
            f"{store.url} was made with other settings: {'; '.join(changed)}. Leave them out to "
            "use the store's, or name another store.",
            code="settings",
        )


def _key(name: str) -> str:
    """A setting's key in --set and in recipes."""
    return f"crop.{name}" if name in _OF_DISTRIBUTION else name


def _comparable(settings: CropsSettings) -> Json:
    """Settings by the keys a user types, without what differs by round; pairs as one value."""
    kept = {k: v for k, v in settings.to_json().items() if k not in ("first", "crops")}
    return {_key(k): tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
