"""`key.name=value`: parameters that are set on a command line, in one grammar for every command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipestill.config.values import parse_value
from pipestill.errors import InputError, nearest

KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class Override:
    """One parameter to set, or to remove."""

    key: str
    value: Any = None
    remove: bool = False


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """The overrides of a command line. Raises InputError that shows how a wrong one is written."""
    found: list[Override] = []
    for number, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals and word.startswith("~") and KEY.fullmatch(word[1:]):
            found.append(Override(word[1:], remove=True))
            continue
        if not equals and number and "=" in words[number - 1]:
            whole = shlex.quote(f"{words[number - 1]} {word}")
            raise InputError(f"'{word}' is not KEY=VALUE; if it belongs to the value before it, write {whole}")
        if not equals or not KEY.fullmatch(key):
            raise InputError(f"'{word}' is not KEY=VALUE: write key.name=value")
        try:
            found.append(Override(key, parse_value(text)))
        except InputError as error:
            quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
            raise InputError(f"{key}: {error}; as text write {shlex.quote(f'{key}={quoted}')}") from None
    return found


def apply(body: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Sets and removes parameters in a plain mapping; whether they exist is checked afterwards."""
    for override in overrides:
        *parents, last = override.key.split(".")
        node = body
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise InputError(f"{override.key}: '{parent}' has no parameters below it")
        if not override.remove:
            node[last] = override.value
        elif last in node:
            del node[last]
        else:
            raise InputError(f"~{override.key}: there is no '{last}'{nearest(last, node)}")
