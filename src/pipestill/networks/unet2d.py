"""Diffusers' UNet2DModel, imported without the many networks that lie beside it.

Importing it the plain way imports every network of two packages, and with them Transformers' models and SciPy's
statistics, in each command. It touches `sys.modules` while it imports, and leaves both packages to be imported whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import diffusers.models


@contextmanager
def _without_what_lies_beside() -> Iterator[None]:
    """Meanwhile the packages that are not imported yet are only places of modules: their own code does not run."""
    folder = Path(diffusers.models.__file__).parent
    bare = []
    for name in ("unets", "transformers"):
        package = ModuleType(f"diffusers.models.{name}")
        package.__path__ = [str(folder / name)]
        if sys.modules.setdefault(package.__name__, package) is package:
            bare.append(package.__name__)
    try:
        yield
    finally:
        for name in bare:
            del sys.modules[name]


try:
    with _without_what_lies_beside():
        from diffusers.models.unets.unet_2d import UNet2DModel
except ImportError:  # a version of Diffusers that needs what its packages import
    from diffusers.models.unets.unet_2d import UNet2DModel

__all__ = ["UNet2DModel"]
