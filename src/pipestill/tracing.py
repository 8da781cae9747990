"""The chain of artefacts behind a figure: from metrics or an artefact back to the images, digest by digest.

Inputs are found by payload digest among the project's artefacts, wherever they lie. Only reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipestill import artifacts
from pipestill.artifacts import MANIFEST, Artifact, InputEntry
from pipestill.errors import InputError
from pipestill.evaluation.headline import is_file_of
from pipestill.standing import figures_of, open_any
from pipestill.userfiles import read_text, unreadable

OUTSIDE = ("folder", "file")  # kinds of what no stage makes
PART = "extractors"  # of a reference: what a run that keeps features depends on
FOLDERS = ("data", "artifacts")  # where a project's artefacts lie


@dataclass(frozen=True)
class Link:
    """One artefact of the chain, under the name that its reader gave it; None where no artefact has the digest."""

    name: str
    entry: InputEntry
    artifact: Artifact | None
    inputs: tuple[Link, ...] = ()

    def walk(self) -> Iterator[Link]:
        """This link and all before it, each payload once."""
        seen: set[InputEntry] = set()
        waiting = [self]
        while waiting:
            link = waiting.pop(0)
            if link.entry not in seen:
                seen.add(link.entry)
                yield link
                waiting.extend(link.inputs)


def project_artifacts(root: Path) -> dict[InputEntry, Artifact]:
    """Every whole artefact below the project's folders, by kind and payload digest."""
    found: dict[InputEntry, Artifact] = {}
    for folder in FOLDERS:
        for manifest in sorted((root / folder).glob(f"**/{MANIFEST}")):
            if any(part.startswith(".") for part in manifest.relative_to(root).parts):
                continue
            try:
                artifact = open_any(manifest.parent)
            except InputError:
                continue
            found.setdefault(artifact.as_input, artifact)
    return found


def trace(path: Path, root: Path) -> Link:
    """The chain behind an artefact, a file in one, or a metrics file. Raises InputError."""
    known = project_artifacts(root)
    artifact = _artifact_of(path, known)
    return _link(artifact.path.name, artifact.as_input, artifact, known)


def _link(name: str, entry: InputEntry, artifact: Artifact | None, known: Mapping[InputEntry, Artifact]) -> Link:
    inputs = artifact.manifest.inputs if artifact is not None else {}
    below = tuple(_link(name, entry, known.get(entry), known) for name, entry in inputs.items())
    return Link(name, entry, artifact, below)


def _artifact_of(path: Path, known: Mapping[InputEntry, Artifact]) -> Artifact:
    """The artefact that a path names, lies in, or is a copy of."""
    if not path.exists():
        raise InputError(f"{path} does not exist: name an artefact, a file in one, or metrics/RUN.json")
    for folder in (path.absolute(), *path.absolute().parents):
        if (folder / MANIFEST).is_file():
            return open_any(folder)
    if path.suffix == ".json":
        try:
            body = json.loads(read_text(path))
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(body, dict):
            raise InputError(f"{path} holds no metrics: name metrics/RUN.json")
        for artifact in sorted(known.values(), key=lambda artifact: artifact.path.name != path.stem):
            if is_file_of(body, figures_of(artifact)):
                return artifact
        raise InputError(f"no artefact here has the metrics in {path}: pull the artefacts (dvc pull) or run the stage")
    raise InputError(f"{path} belongs to no artefact: name an artefact, a file in one, or metrics/RUN.json")


def lines(link: Link, root: Path, *, verify: bool = False) -> Iterator[str]:
    """The chain as an indented tree; what was shown already is named again without its inputs.

    `verify` recomputes every file's digest. Raises InputError where one differs.
    """
    yield from _lines(link, root, "", "", set(), verify)


def _lines(link: Link, root: Path, first: str, rest: str, shown: set[InputEntry], verify: bool) -> Iterator[str]:
    head = f"{first}{link.name}: {link.entry.kind} {link.entry.payload}"
    if link.artifact is None:
        known = {PART: "a part of the reference"} | dict.fromkeys(OUTSIDE, "an outside source")
        yield f"{head} ({known.get(link.entry.kind, 'not here: pull it, or run again what follows it')})"
        return
    manifest, place = link.artifact.manifest, _place(link.artifact.path, root)
    if link.entry in shown:
        yield f"{head} in {place} (above)"
        return
    shown.add(link.entry)
    if verify:
        artifacts.verify(link.artifact)
    size = sum(entry.size for entry in manifest.files.values())
    yield f"{head} in {place}, {len(manifest.files)} files, {size:,} bytes{', verified' if verify else ''}"
    bar = "│  " if link.inputs else "   "
    yield f"{rest}{bar}pipestill {manifest.stage}, version {manifest.version}, work {manifest.key}"
    for index, before in enumerate(link.inputs):
        last = index == len(link.inputs) - 1
        mark, bar = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield from _lines(before, root, rest + mark, rest + bar, shown, verify)


def verdict(link: Link) -> str:
    """One line on a chain that has been verified to its end: what was, and what is not here to be."""
    links = list(link.walk())
    whole = sum(before.artifact is not None for before in links)
    outside = [before.name for before in links if before.artifact is None and before.entry.kind in OUTSIDE]
    absent = [before.name for before in links if before.artifact is None and before.entry.kind not in (*OUTSIDE, PART)]
    says = f"every byte of {whole} {'artefact' if whole == 1 else 'artefacts'} is as its manifest says"
    if outside:
        says += f"; named by digest alone, as outside sources: {', '.join(outside)}"
    return says + (f"; not here, so not verified: {', '.join(absent)}" if absent else "")


def _place(path: Path, root: Path) -> str:
    absolute = path.absolute()
    return str(absolute.relative_to(root.absolute())) if absolute.is_relative_to(root.absolute()) else str(path)
