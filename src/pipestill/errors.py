"""What can go wrong, by who can mend it, and the exit code that says so.

Every error here is printed as one line; anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class PipestillError(Exception):
    """An error whose message alone tells the reader what happened, where, and what to do."""

    exit_code = 1


class InputError(PipestillError):
    """The user's input is wrong: a file, a folder, a parameter or a combination of them."""

    exit_code = 2


class SurroundingsError(PipestillError):
    """The surroundings failed: a full disk, a lost rank, a NaN, a lock that another process holds."""

    exit_code = 3


class Stopped(PipestillError):
    """The stage stopped at its time limit or on request, with its state saved: start it again."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    import difflib

    names = [str(other) for other in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f" (there are: {', '.join(names) or 'none'})"
