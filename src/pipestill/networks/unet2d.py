"""Diffusers' UNet2DModel, imported without the many networks that lie beside it, and without torch's compiler.

Importing it the plain way imports every network of two packages, and with them Transformers' models, SciPy's
statistics and `torch._dynamo`, in each command. It touches `sys.modules` while it imports, and leaves all of these to
be imported whole. Diffusers wants the compiler for a mark on its attention layers alone, which `mark_for_compiling`
makes where a network is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

COMPILER = "torch._dynamo"


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Meanwhile torch's compiler cannot be imported, unless it is there already; Diffusers does without it."""
    if COMPILER in sys.modules:
        yield
        return
    sys.modules[COMPILER] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[COMPILER]


with _without_compiler():
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
    with _without_compiler(), _without_what_lies_beside():
        from diffusers.models.unets.unet_2d import UNet2DModel
except ImportError:  # a version of Diffusers that needs what its packages import
    from diffusers.models.unets.unet_2d import UNet2DModel


def mark_for_compiling() -> None:
    """Tells torch's compiler to take attention layers whole, as Diffusers does where the compiler is imported first."""
    from diffusers.models.attention_processor import Attention

    torch._dynamo.allow_in_graph(Attention)


__all__ = ["UNet2DModel", "mark_for_compiling"]
