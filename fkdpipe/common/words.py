"""Human-readable numbers.

humanize is not used: with three digits it prints "0.00 B" and "1e+03 kB", its durations are long
("1 hour, 23 minutes and 20 seconds"), and it has no plurals.
"""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """A count with its noun: `1 unit`, `2 units`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def units_kept(done: int, total: int) -> str:
    """What an interrupted command has kept of its units."""
    units = count(total, "unit")
    return f"{done:,} of {units} committed and kept; the same command makes the rest."


def size(number: float) -> str:
    """Bytes in decimal units (B, kB, MB, GB, TB) with three significant digits."""
    for unit, scale in (("B", 1), ("kB", 1e3), ("MB", 1e6)):
        if number < 999.5 * scale:
            return f"{number:.0f} B" if unit == "B" else f"{number / scale:.3g} {unit}"
    return gigabytes(number)


def gigabytes(number: float) -> str:
    """Bytes in GB or TB, for columns of large sizes."""
    return f"{number / 1e9:,.2f} GB" if number < 1e11 else f"{number / 1e12:,.2f} TB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with one decimal."""
    for scale, unit in ((1, "seconds"), (60, "minutes")):
        if seconds < 99.95 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds / 3600:,.1f} hours"
