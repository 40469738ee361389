"""Numbers as a person reads them."""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Bytes in the largest decimal unit that leaves a digit before the point."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= least:
            return f"{number / least:,.1f} {unit}"
    return f"{number:,.0f} bytes"
