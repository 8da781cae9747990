"""Classes as people write them, by name or number, and the numbers that networks take. Pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pipestill.errors import InputError

LISTED = 12  # names in a message


def numbers(wanted: Sequence[int | str], names: Sequence[str], where: str) -> list[int]:
    """The number of each class in `wanted`, given by name or by number; `where` begins the message of an error.

    Raises InputError for an unknown class, and for a number that is also the name of a different class.
    """
    return [by_name(one, names, where) if isinstance(one, str) else _by_number(one, names, where) for one in wanted]


def by_name(name: str, names: Sequence[str], where: str) -> int:
    """The number of the class with this name. Raises InputError that lists the names nearest to it."""
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = "; did you mean " + " or ".join(f"'{one}'" for one in near) + "?"
    else:
        more = ", …" if len(names) > LISTED else ""
        hint = f" (there are: {', '.join(names[:LISTED]) or 'none'}{more})"
    raise InputError(f"{where}: there is no class '{name}'{hint}")


def _by_number(number: int, names: Sequence[str], where: str) -> int:
    same = [name for name in names if name.isascii() and name.isdigit() and int(name) == number]
    inside = 0 <= number < len(names)
    if same and not (inside and names[number] in same):
        meant = f"class number {number} is '{names[number]}'" if inside else f"there is no class number {number}"
        quoted = " or ".join(f"'{name}'" for name in ([names[number]] if inside else []) + same)
        raise InputError(f"{where}: {meant}, but a class is named '{same[0]}': write its name in quotes, {quoted}")
    if not inside:
        raise InputError(f"{where}: there is no class number {number}, they run from 0 to {len(names) - 1}")
    return number
