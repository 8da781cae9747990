"""Which version each stage has now, as its module declares it. Imports nothing heavy: stages do not either."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from pipestill.artifacts import Manifest


def version_of(stage: str) -> int | None:
    """The VERSION of a stage, by name; None for what is no stage."""
    name = f"pipestill.stages.{stage}"
    if not stage.isidentifier() or find_spec(name) is None:
        return None
    return getattr(importlib.import_module(name), "VERSION", None)


def superseded(manifest: Manifest) -> str | None:
    """Says that an artefact was made by another version of its stage than there is now; None where it was not."""
    now = version_of(manifest.stage)
    if manifest.version == now:
        return None
    return f"was made by version {manifest.version} of pipestill {manifest.stage}, it is {now or 'no stage'} now"
