"""Bytes that a store takes, by field."""

from __future__ import annotations

from collections import Counter

from fkdpipe.storage.store import Store


def stored_bytes(store: Store, names: dict[str, str]) -> Counter[str]:
    """All bytes of a store by field; "images" and "commits" count what does not belong to crops.

    Args:
        names: from `field_names`.
    """
    stored: Counter[str] = Counter()
    for key, length in store.location.list():
        stored[_name_of(key, names)] += length
    return stored


def field_names(store: Store) -> dict[str, str]:
    """Array path to the name it is reported under, with its source if there are several."""
    outputs = [p for p in store.parts.values() if p.kind in ("labels", "features")]
    several = len({(p.kind, p.source, p.layer) for p in outputs}) > 1
    names = {}
    for part in store.parts.values():
        for field in part.fields:
            if part.kind == "images":
                continue
            prefix = "/".join(filter(None, (part.source, part.layer))) if several else ""
            plain = part.kind == "crops" or not prefix
            names[f"{part.path}/{field.name}"] = field.name if plain else f"{prefix}/{field.name}"
    return names


def _name_of(key: str, names: dict[str, str]) -> str:
    if key.startswith("commits/"):
        return "commits"
    path = key.split("/c/", 1)[0].removesuffix("/zarr.json")
    return names.get(path, "images" if key.startswith("images/") else "commits")
