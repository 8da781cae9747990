"""Where the pictures of a training are: `$PIPESTILL_RUNS/previews/<name>-<key>`, outside every artefact.

It looks for files and reads nothing else; `sampling.preview` makes the pictures.
"""

from __future__ import annotations

from pathlib import Path

from pipestill.work import runs_root

DIGITS = 8  # of a work's key, enough to tell the trainings of one entry apart


def folder(name: str, key: str, runs: Path | None = None) -> Path:
    """The folder of a training's previews, by its entry's name and the key of its work."""
    return (runs or runs_root()) / "previews" / f"{name}-{key[:DIGITS]}"


def folders(key: str, runs: Path | None = None) -> list[Path]:
    """The folders with previews of a work, whatever its entry is called."""
    return sorted((runs or runs_root()).glob(f"previews/*-{key[:DIGITS]}"))


def previews_of(key: str, runs: Path | None = None) -> list[Path]:
    """The grids that a training on this machine has left, oldest first, by the key of its work (`manifest.key`)."""
    return sorted(picture for folder in folders(key, runs) for picture in folder.glob("step-*.png"))
