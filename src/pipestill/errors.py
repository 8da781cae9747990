"""What can go wrong, by who can mend it, and the exit code that says so.

Every error here is printed as one line; anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

SHOWN = 40  # names in a message


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


def denied(path: Path) -> InputError:
    """The error for a file or folder that may not be read or written: who owns what stands in the way."""
    import pwd
    import stat

    shown, path = path, path.absolute()
    there = (each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 (Path.exists can raise)
    place = next(there)
    wanted = "readable"
    if os.access(place, os.R_OK if place == path else os.X_OK):
        wanted = "writable"
        if place == path and os.access(path, os.W_OK):
            place = path.parent  # where it would be replaced or removed
        if os.access(place, os.W_OK):
            return InputError(f"{shown}: permission denied")
    found = place.stat()
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = f"uid {found.st_uid}"
    whose = f"{'it' if place == path else place} belongs to {owner}, {stat.filemode(found.st_mode)}"
    return InputError(f"{shown}: permission denied ({whose}): have it made {wanted}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    import difflib

    names = [str(other) for other in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" (there are: {', '.join(names[:SHOWN]) or 'none'}{more})"
