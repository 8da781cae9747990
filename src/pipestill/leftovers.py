"""What no entry of params.yaml refers to: artefacts, metrics, logs, and work below $PIPESTILL_RUNS. It only reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipestill import outputs, pipeline, previews, status
from pipestill.artifacts import marked_kind
from pipestill.pipeline import Pipeline
from pipestill.work import RECORD, read_record_at


@dataclass(frozen=True)
class Leftover:
    """A file or folder that no entry refers to; `name` is where an archive keeps it."""

    path: Path
    name: str
    what: str

    def size(self) -> int:
        """Bytes of its files; links count as themselves."""
        if not self.path.is_dir():
            return self.path.lstat().st_size
        return sum(file.lstat().st_size for file in self.path.rglob("*") if file.is_symlink() or not file.is_dir())


def find(stages: Pipeline, runs: Path) -> list[Leftover]:
    """All leftovers: artefacts, metrics, then work and logs. What a running stage writes is not among them."""
    patterns = pipeline.output_patterns(stages.root)
    works = list(_works(runs))
    busy = {str(word["output"]) for _, word in works if word.get("state") == "running"}
    found = [*_artifacts(stages, patterns, busy), *_metrics(stages)]
    found += [*_unused_works(stages, patterns, works, runs, busy), *_logs(stages, patterns, runs, works)]
    return found


def _artifacts(stages: Pipeline, patterns: dict[str, str], busy: set[str]) -> Iterator[Leftover]:
    known = {stage.output for stage in stages.stages}
    for pattern in dict.fromkeys(pattern for pattern in patterns.values() if "{name}" in pattern):
        for folder in sorted(stages.root.glob(pattern.replace("{name}", "*"))):
            name = folder.relative_to(stages.root).as_posix()
            kind = None if folder.is_symlink() or folder.name.startswith(".") else marked_kind(folder)
            if kind is not None and name not in known and os.path.abspath(folder) not in busy:
                yield Leftover(folder, name, kind)


def _metrics(stages: Pipeline) -> Iterator[Leftover]:
    """Metrics files that pipestill wrote; others may lie beside them."""
    known = {path for stage in stages.stages for path in stage.metrics}
    for folder in sorted({PurePosixPath(path).parent.as_posix() for path in known}):
        for file in sorted((stages.root / folder).glob("*.json")):
            name = file.relative_to(stages.root).as_posix()
            if name not in known and (outputs.METRICS.recognises(file) or outputs.FLOOR.recognises(file)):
                yield Leftover(file, name, "metrics")


def _works(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every folder of work, with what it last said of itself."""
    for folder in sorted({path.parent for name in (status.FILE, RECORD) for path in runs.glob(f"*/*/{name}")}):
        word = status.read(folder / status.FILE) or read_record_at(folder)
        if "output" in word:
            yield folder, word


def _unused_works(
    stages: Pipeline, patterns: dict[str, str], works: list[tuple[Path, dict[str, Any]]], runs: Path, busy: set[str]
) -> Iterator[Leftover]:
    """Work on artefacts at this project's places; work of an experiment in a folder of its own is not judged here."""
    known = {str(stages.root / stage.output) for stage in stages.stages}
    places = {str((stages.root / pattern).parent) for pattern in patterns.values()}
    for folder, word in works:
        output = str(word["output"])
        if output not in known | busy and str(Path(output).parent) in places:
            state = folder / "state"
            unfinished = state.is_dir() and any(state.iterdir())
            model = os.path.relpath(output, stages.root)
            what = f"{'unfinished work' if unfinished else 'records'} of {model}"
            yield Leftover(folder, f"runs/{folder.relative_to(runs).as_posix()}", what)
            for pictures in previews.folders(folder.name, runs):
                yield Leftover(pictures, f"runs/{pictures.relative_to(runs).as_posix()}", f"previews of {model}")


def _logs(
    stages: Pipeline, patterns: dict[str, str], runs: Path, works: list[tuple[Path, dict[str, Any]]]
) -> Iterator[Leftover]:
    """What attempt.sh and Snakemake keep by entry, but not where a stage runs: attempt.sh needs its folder."""
    known = {(stage.name, stage.entry or "all") for stage in stages.stages}
    for folder, word in works:
        if word.get("state") == "running":
            known |= {(folder.parent.name, entry) for entry in (Path(word["output"]).name, "all")}
    for kind, ending in (("logs", ".log"), ("benchmarks", ".tsv")):
        for place in sorted((runs / kind).glob("*/*")):
            entry = place.name if place.is_dir() else place.name.removesuffix(ending)
            if place.parent.name in patterns and (place.parent.name, entry) not in known:
                yield Leftover(place, f"runs/{place.relative_to(runs).as_posix()}", kind)
