"""What an existing store was made with: what a user need not say again, or must not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fkdpipe.crops import LAW_NAME, CropLaw
from fkdpipe.errors import StoreMismatchError, UsageError
from fkdpipe.labelgen.settings import GenerateSettings
from fkdpipe.storage import rounds, schema
from fkdpipe.storage.schema import Json
from fkdpipe.storage.store import Part, Store

_OF_LAW = ("scale", "ratio", "flip", "jitter")


@dataclass(frozen=True)
class Drawing:
    """How crops are drawn. derived: boxes are not stored."""

    law: CropLaw
    seed: int
    derived: bool

    def settings(self) -> Json:
        """As a round records it, whichever crops of the sequence it holds."""
        return _comparable(
            rounds.crop_settings(self.law, seed=self.seed, first=0, count=0, derived=self.derived)
        )


def drawing(store: Store | None, settings: GenerateSettings) -> Drawing:
    """What the user named of the crops; else what the store's crops were drawn by; else defaults.

    Boxes of an import were drawn by nobody here: they have no law to take.
    """
    drawn = [p.settings for p in store.rounds()] if store is not None else []
    old = drawn[0] if drawn and drawn[0]["law"] == LAW_NAME else None
    law = settings.crop or (rounds.law_of(old) if old else CropLaw())
    seed = settings.seed if settings.seed is not None else (int(old["seed"]) if old else 0)
    boxes = settings.boxes or (old["boxes"] if old else "stored")
    return Drawing(law, seed, boxes == "derived")


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


def check_drawing(store: Store, part: Part, wanted: Drawing) -> None:
    """Refuse to draw other crops beside those of a round.

    Raises:
        StoreMismatchError: naming what differs by the keys a user types.
    """
    if part.settings["law"] != LAW_NAME:
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
