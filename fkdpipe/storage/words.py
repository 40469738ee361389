"""Numbers as a person reads them."""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Decimal bytes in the unit that leaves few digits before the point."""
    for unit, scale in (("B", 1), ("kB", 1e3), ("MB", 1e6)):
        if number < 999.5 * scale:
            return f"{number:.0f} B" if unit == "B" else f"{number / scale:.3g} {unit}"
    return f"{number / 1e9:,.2f} GB" if number < 1e11 else f"{number / 1e12:,.2f} TB"
