"""Lengths of time as people write them; every place that prints one to a person uses this."""

from __future__ import annotations

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `25 min`, `3 h 20 min` or `2 d 5 h`: whole units, the two largest where both matter."""
    whole = max(round(seconds), 0)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < 10 * MINUTE:
        return _two(whole, MINUTE, "min", 1, "s")
    whole = MINUTE * round(whole / MINUTE)
    if whole < HOUR:
        return f"{whole // MINUTE} min"
    if whole < DAY:
        return _two(whole, HOUR, "h", MINUTE, "min")
    return _two(HOUR * round(whole / HOUR), DAY, "d", HOUR, "h")


def _two(whole: int, large: int, name: str, small: int, other: str) -> str:
    first, rest = divmod(whole, large)
    return f"{first} {name}" + (f" {rest // small} {other}" if rest // small else "")
