"""Whether a model and a dataset are of the same images, and one message where they are not. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipestill.errors import InputError


class OfImages(Protocol):
    """What makes or holds images [channels, resolution, resolution] of named classes."""

    @property
    def resolution(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


def require_fit(model: Path, made: OfImages, data: Path, held: OfImages, advice: str) -> None:
    """Raises InputError, in one line that ends in `advice`, where a model makes other images than the data holds."""
    for what in ("resolution", "channels"):
        if getattr(made, what) != getattr(held, what):
            raise InputError(f"{model} has {what} {getattr(made, what)}, {data} has {getattr(held, what)}: {advice}")
    require_classes(model, made.classes, data, held.classes, advice)


def require_classes(model: Path | str, made: Sequence[str], data: Path, held: Sequence[str], advice: str) -> None:
    """Raises InputError, with the first difference, unless both have the same classes in the same order."""
    if len(made) != len(held):
        raise InputError(f"{model} has {len(made)} classes, {data} has {len(held)}: {advice}")
    for number, (one, other) in enumerate(zip(made, held, strict=True)):
        if one != other:
            raise InputError(f"class {number} of {model} is '{one}', that of {data} is '{other}': {advice}")
