"""Parameter files: YAML in, validated objects out, each mistake in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipestill.config.fields import Section
from pipestill.config.whole import Params
from pipestill.errors import InputError
from pipestill.explain import explain


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's floats: 1e-4 is a number (PyYAML alone reads it as text). In C where PyYAML was built so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """YAML as parameter files and `key=value` overrides use it. Raises InputError where it cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"not readable as YAML: {' '.join(str(error).split())}") from error


def same(found: Any, stated: Any) -> bool:
    """Whether another reader of YAML found what a parameter file states; one of YAML 1.1 takes 2e-05 for a text."""
    if isinstance(found, Mapping) and isinstance(stated, Mapping):
        return found.keys() == stated.keys() and all(same(found[key], stated[key]) for key in stated)
    if isinstance(found, list) and isinstance(stated, list):
        return len(found) == len(stated) and all(map(same, found, stated))
    return bool(found == stated) or (isinstance(found, str) and parse_yaml(found) == stated)


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Reads and checks a parameter file, `key.name=value` overrides applied. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"{path} cannot be read ({reason}): write one with pipestill config") from error
    body = parse_yaml(text)
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no parameters: write it anew with pipestill config")
    for override in overrides:
        _apply(body, override)
    return check(body, str(path))


def _apply(body: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"'{override}' is no override: write key.name=value")
    *parents, last = key.split(".")
    node = body
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{key}: '{parent}' has no parameters below it")
    node[last] = parse_yaml(value)


Checked = TypeVar("Checked", bound=Section)


def check(body: Mapping[str, Any], where: str = "parameters") -> Params:
    """Validates a plain mapping. Raises InputError naming each wrong key, its allowed range and the nearest name."""
    return check_section(Params, body, where)


def check_section(section: type[Checked], body: Mapping[str, Any], where: str) -> Checked:
    """Validates one section's plain mapping; see `check`."""
    try:
        return section.model_validate(body)
    except ValidationError as error:
        lines = [explain(section, problem) for problem in error.errors(include_url=False)]
        raise InputError(f"{where}: " + "; ".join(lines)) from None
