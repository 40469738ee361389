"""What an existing store was made with: what a user need not say again, or must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fkdpipe.common.errors import StoreError, StoreMismatchError, UsageError
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.pixels.crops import DISTRIBUTION_NAME, CropDistribution
from fkdpipe.storage import rounds, schema
from fkdpipe.storage.location import Location
from fkdpipe.storage.schema import Json
from fkdpipe.storage.store import Part, Store

_OF_LAW = ("scale", "ratio", "flip", "jitter")


@dataclass(frozen=True)
class Drawing:
    """How crops are drawn. derived: boxes are not stored."""

    distribution: CropDistribution
    seed: int
    derived: bool

    def settings(self) -> Json:
        """As a round records it, whichever crops of the sequence it holds."""
        return _comparable(
            rounds.crop_settings(
                self.distribution, seed=self.seed, first=0, count=0, derived=self.derived
            )
        )


def drawing(store: Store | None, settings: GenerateSettings) -> Drawing:
    """What the user named of the crops; else what the store's crops were drawn by; else defaults.

    Boxes of an import were drawn by nobody here: they have no law to take.
    """
    drawn = [p.settings for p in store.rounds()] if store is not None else []
    old = drawn[0] if drawn and drawn[0]["law"] == DISTRIBUTION_NAME else None
    distribution = settings.crop or (rounds.distribution_of(old) if old else CropDistribution())
    seed = settings.seed if settings.seed is not None else (int(old["seed"]) if old else 0)
    boxes = settings.boxes or (old["boxes"] if old else "stored")
    return Drawing(distribution, seed, boxes == "derived")


def crops_per_image(store: Store | None, settings: GenerateSettings) -> int:
    """M as asked for, or as the store has it.

    Raises:
        UsageError: neither.
    """
    if settings.crops is not None:
        return settings.crops
    have = sum(int(part.settings["crops"]) for part in store.rounds()) if store is not None else 0
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
    drawn = drawing(store, settings)
    return replace(
        settings,
        form=settings.form or form_of(store, source),
        crops=crops_per_image(store, settings),
        crop=drawn.distribution,
        seed=drawn.seed,
        boxes="derived" if drawn.derived else "stored",
    )


def form_of(store: Store, source: str) -> str | None:
    """Of the labels of a source, None where there are none."""
    ours = (p for p in store.parts.values() if p.kind == "labels" and p.source == source)
    return next((p.settings["form"] for p in ours), None)


def recorded_options(store: Store) -> dict[str, dict[str, Any]]:
    """By source, the settings its labels and features were made with; imported ones left out."""
    found: dict[str, dict[str, Any]] = {}
    for part in store.parts.values():
        if part.kind not in ("labels", "features") or "imported_from" in part.settings:
            continue
        old = part.settings
        names = [_spec(teacher) for teacher in old["teachers"]]
        options = found.setdefault(part.source, {"teacher": names, "form": "none"})
        options |= {"source": part.source, "precision": old["precision"]}
        if part.kind == "labels":
            options |= {"form": old["form"], "temperature": old["temperature"]}
        else:
            dims = "" if old["basis"] is None else f":{old['dims']}"
            kept = {*options.get("features", ()), f"{part.layer}{dims}"}
            options |= {"features": sorted(kept), "features_code": old["code"]}
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


def check_drawing(store: Store, part: Part, wanted: Drawing) -> None:
    """Refuse to draw other crops beside those of a round.

    Raises:
        StoreMismatchError: naming what differs by the keys a user types.
    """
    if part.settings["law"] != DISTRIBUTION_NAME:
        raise StoreMismatchError(
            f"{store.url} has {part.settings['crops']} crops per image that were imported with "
            "their labels; no others can be drawn beside them. Leave --crops out to keep them, or "
            "name another store.",
            code="settings",
        )
    old, new = ({_key(k): v for k, v in s.items()} for s in (part.settings, wanted.settings()))
    changed = schema.differences(_comparable(old), new)
    if changed:
        raise StoreMismatchError(
            f"{store.url} was made with other settings: {'; '.join(changed)}. Leave them out to "
            "take the store's, or name another store.",
            code="settings",
        )


def _key(name: str) -> str:
    """As --set and a recipe have it."""
    return f"crop.{name}" if name in _OF_LAW else name


def _comparable(settings: dict[str, Any]) -> Json:
    """Without what differs from round to round; pairs as one value."""
    kept = {k: v for k, v in settings.items() if k not in ("first", "crops")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
