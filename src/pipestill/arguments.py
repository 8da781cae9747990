"""The parser of every subcommand, and the types of its options: each says what it expects.

It imports nothing of the project but errors, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from pipestill.errors import InputError, nearest

GRAMMAR = """\
overrides: KEY=VALUE sets a parameter by its full name, ~KEY removes an entry. VALUE is a number, true, false, null, a
  list [1, 2], a mapping {kind: vp}, or text, with spaces too: quote the whole for your shell, 'data.path=Data (old)'.
  Text that reads as something else has quotes of its own: 'data.path="010"'. ~/ is your home folder.
"""


class Parser(argparse.ArgumentParser):
    """Takes options and other words in any order; raises InputError, for an unknown option before a missing one."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(args or ())
        end = words.index("--") if "--" in words else len(words)
        self._refuse_unknown(words[:end])
        found: argparse.Namespace = self.parse_intermixed_args(words[:end], namespace)
        if rest := words[end + 1 :]:  # intermixed parsing would read options among them
            places = [action.dest for action in self._actions if not action.option_strings and action.nargs == "*"]
            if not places:
                self.error(f"unrecognized arguments: {' '.join(rest)}")
            setattr(found, places[0], [*getattr(found, places[0]), *rest])
        return found

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        known = list(self._option_string_actions)
        for word in words:
            name = word.partition("=")[0]
            short = len(name) > 1 and name[0] == "-" != name[1] and not is_number(name)
            long = name.startswith("--")
            if (long and not any(option.startswith(name) for option in known)) or (short and name[:2] not in known):
                self.error(f"there is no option {name}{nearest(name, known)}")


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse(expected: str, text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"expects {expected}, not '{text}'")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        _refuse("a whole number, 1 or more", text)
    return int(text)


def counts(text: str) -> list[int]:
    """Such numbers with commas between them, each once."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) >= 1 for word in words) or len(set(words)) < len(words):
        _refuse("different whole numbers with commas between them, like 1,2,4", text)
    return sorted(map(int, words))


def minutes(text: str) -> float:
    """A time from now in minutes."""
    if not is_number(text) or not 0 <= float(text) < math.inf:
        _refuse("minutes, 0 or more", text)
    return float(text)


def seconds(text: str) -> float:
    """A pause in seconds."""
    if not is_number(text) or not 0 < float(text) < math.inf:
        _refuse("seconds, more than 0", text)
    return float(text)
