"""The project around the folder in which a command is started, as git and DVC find theirs.

Commands run at the project's root. Paths that are typed are relative to where the user stands, paths in params.yaml to
the root. It reads dvc.yaml and params.yaml of the folders above, and touches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipestill.errors import InputError

Typed = TypeVar("Typed", str, Path)
PATHS = ("DIR", "FILE", "PATH")  # what stands for a path in the help of an option
PARAMETERS = (  # parameters that hold a path, by full name
    "data.path",
    "data.class_names",
    "reference.statistics",
    "reference.protocol.inception_weights",
    "operation.container",
)


def here() -> Path:
    """Where the user stands. Raises InputError where that has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise InputError("the working folder does not exist any more: change to another one") from None


def root_of(folder: Path) -> Path:
    """The nearest folder, from this one upwards, with a pipeline or parameters of ours; without one, the folder."""
    if (folder / "params.yaml").exists():
        return folder
    return next((place for place in (folder, *folder.parents) if _is_ours(place)), folder)


def _is_ours(folder: Path) -> bool:
    """Other projects have a dvc.yaml and a params.yaml too."""
    for name, sign in (("dvc.yaml", "pipestill "), ("params.yaml", "# Written by: pipestill config")):
        try:
            if sign in (folder / name).read_text(encoding="utf-8", errors="replace"):
                return True
        except OSError:
            continue
    return False


def from_root(parser: argparse.ArgumentParser, options: argparse.Namespace, stood: Path, root: Path) -> None:
    """Makes the paths that were typed in `stood` relative to the root, in options and overrides."""
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.metavar in PATHS and value is not None and value is not action.default:
            moved = [_moved(each, stood, root) for each in (value if isinstance(value, list) else [value])]
            setattr(options, action.dest, moved if isinstance(value, list) else moved[0])
    if getattr(options, "overrides", None):
        options.overrides = [_moved_override(word, stood, root) for word in options.overrides]


def _moved(path: Typed, stood: Path, root: Path) -> Typed:
    whole = Path(os.path.normpath(stood / path))
    return type(path)(whole.relative_to(root) if whole.is_relative_to(root) else whole)


def _moved_override(word: str, stood: Path, root: Path) -> str:
    from pipestill.config import parse_overrides

    key = word.partition("=")[0]
    if key not in PARAMETERS:
        return word
    (override,) = parse_overrides([word])
    if not isinstance(override.value, str) or not override.value or "://" in override.value:
        return word
    return f"{key}={json.dumps(_moved(override.value, stood, root), ensure_ascii=False)}"


def shown(path: Path, stood: Path) -> str:
    """A path relative to the root as somebody sees it who stands elsewhere."""
    return str(path) if path.is_absolute() else os.path.relpath(path, stood)


def words_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """A command line that parses to these options."""
    words, positional = [], []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if value is None or value == action.default or (isinstance(action.default, str) and action.nargs == 0):
            continue
        if not action.option_strings:
            positional += [str(each) for each in (value if isinstance(value, list) else [value])]
        elif action.nargs == 0:
            words.append(action.option_strings[-1])
        elif action.nargs == "*":
            words += [action.option_strings[-1], *map(str, value)]
        else:
            words.append(f"{action.option_strings[-1]}={_text(value)}")
    dashes = ["--"] if any(word.startswith("-") for word in positional) else []
    return [*words, *dashes, *positional]


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
