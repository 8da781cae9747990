"""Parameter files: YAML in, validated objects out, each mistake in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipestill.config.fields import Section
from pipestill.config.overrides import apply, parse_overrides
from pipestill.config.values import parse_yaml
from pipestill.config.whole import Params, contradictions
from pipestill.errors import InputError, denied
from pipestill.explain import explain


def same(found: Any, stated: Any) -> bool:
    """Whether another reader of YAML found what a parameter file states; one of YAML 1.1 takes 2e-05 for a text."""
    if isinstance(found, Mapping) and isinstance(stated, Mapping):
        return found.keys() == stated.keys() and all(same(found[key], stated[key]) for key in stated)
    if isinstance(found, list) and isinstance(stated, list):
        return len(found) == len(stated) and all(map(same, found, stated))
    return bool(found == stated) or (isinstance(found, str) and parse_yaml(found) == stated)


def text_of(path: Path) -> str:
    """The text of a parameter file. Raises InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except PermissionError as error:
        raise denied(path) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read ({reason}): write one with pipestill config") from error


def read_parameters(path: Path) -> dict[str, Any]:
    """The plain values of a parameter file, not yet checked. Raises InputError where it cannot be read."""
    body = parse_yaml(text_of(path), str(path))
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no parameters: write it again with pipestill config")
    return body


def load(path: Path, overrides: Sequence[str] = (), *, whole: bool = False) -> Params:
    """Reads a parameter file, applies `key.name=value` overrides, checks (`whole`: see `check`). Raises InputError."""
    body = read_parameters(path)
    apply(body, parse_overrides(overrides))
    return check(body, str(path), whole=whole)


Checked = TypeVar("Checked", bound=Section)


def check(
    body: Mapping[str, Any],
    where: str = "parameters",
    shared: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> Params:
    """Validates a plain mapping. Raises InputError naming each wrong key, its allowed range and the nearest name.

    `shared` is what the mapping was expanded from: what is wrong in it is named once, as it was written there. With
    `whole`, what must hold between the sections is checked too: the pipeline needs it, a single stage does not.
    """
    params = check_section(Params, body, where, shared)
    for contradiction in contradictions(params) if whole else ():
        raise InputError(f"{where}: {contradiction}")
    return params


def check_section(
    section: type[Checked], body: Mapping[str, Any], where: str, shared: Mapping[str, Any] | None = None
) -> Checked:
    """Validates one section's plain mapping; see `check`."""
    try:
        return section.model_validate(body)
    except ValidationError as error:
        lines = explain(section, error, shared)
        raise InputError(f"{where}: " + "; ".join(lines)) from None
