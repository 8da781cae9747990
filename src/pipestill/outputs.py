"""What commands write: which paths are outputs, what may be replaced there, and writing whole or not at all.

An output only replaces an earlier output of the same kind. A file is recognised by its content, a folder by the mark
that is written into it; anything else is refused and left as it was. Knows no stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from pipestill import artifacts
from pipestill.artifacts import MARK
from pipestill.errors import InputError
from pipestill.modes import follow_umask
from pipestill.project import PATHS
from pipestill.work import locked, whole, writing

ELSEWHERE = "choose another path, or move it"
MADE_BY = "pipestill"  # the sign in formats that have room for one


class Kind(Protocol):
    """A kind of output."""

    def check(self, path: Path) -> None:
        """Raises InputError if `path` holds anything but an earlier output of this kind."""
        ...


@dataclass(frozen=True)
class ArtifactKind:
    """The folder of an artefact of this kind."""

    kind: str

    def check(self, path: Path) -> None:
        artifacts.check_place(path, self.kind, {})


@dataclass(frozen=True)
class FileKind:
    """A file that `ours` recognises; it is only asked about regular files that are not empty."""

    title: str
    ours: Callable[[Path], bool]

    def check(self, path: Path) -> None:
        if not os.path.lexists(path):
            return
        if not path.is_file():
            raise InputError(f"{path} is not a regular file: {ELSEWHERE}")
        if path.stat().st_size and not self.recognises(path):
            raise InputError(f"{path} is not {self.title} that pipestill wrote, so it is not replaced: {ELSEWHERE}")

    def recognises(self, path: Path) -> bool:
        """Whether `path` holds a file of this kind; an empty one is of none."""
        try:
            return path.is_file() and self.ours(path)
        except Exception:  # whatever a file of another format makes its reader raise
            return False


@dataclass(frozen=True)
class FolderKind:
    """A folder whose mark names the kind and lists the digest of each file."""

    kind: str

    def check(self, path: Path) -> None:
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: {ELSEWHERE}")
        try:
            kind, *lines = (path / MARK).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            raise InputError(f"{path} holds files that pipestill did not write: {ELSEWHERE}") from None
        if kind != self.kind:
            raise InputError(f"{path} holds {kind}, not {self.kind}: {ELSEWHERE}")
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = {name: entry.sha256 for name, entry in artifacts.describe_files(path).items()}
        changed = sorted(name for name, digest in found.items() if listed.get(name) != digest)
        if changed:
            raise InputError(f"{path / changed[0]} was added or changed since pipestill wrote {path}: {ELSEWHERE}")

    def mark(self, folder: Path) -> None:
        """Writes the mark of a finished folder."""
        files = artifacts.describe_files(folder)
        lines = [self.kind, *(f"{entry.sha256}  {name}" for name, entry in files.items())]
        (folder / MARK).write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ResumedFolder:
    """A folder that an earlier call of the same command began, recognised by one of its files, and goes on with."""

    title: str
    file: str

    def check(self, path: Path) -> None:
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"{path} is not a folder: {ELSEWHERE}")
        visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() else []
        if visible and not (path / self.file).is_file():
            raise InputError(f"{path} holds files that do not belong to {self.title}: {ELSEWHERE}")


# --- the kinds ----------------------------------------------------------------------------------------------------


def _body(path: Path) -> dict[str, Any]:
    body = json.loads(path.read_text(encoding="utf-8"))
    return body if isinstance(body, dict) else {}


def _metrics(path: Path, *, floor: bool) -> bool:
    body = _body(path)
    return {"evaluations", "guidance", "images", "seeds"} <= body.keys() and (body["evaluations"] == 0) is floor


def _edm_weights(path: Path) -> bool:
    if path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            return archive.comment == MADE_BY.encode()
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, 100_000_000)))
    return bool(header["__metadata__"]["made_by"] == MADE_BY)


def _lmdb(path: Path) -> bool:
    """The last key and its value, which lie side by side in one of the last pages: LMDB opens no file twice."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 2**20, 0))
        return b"made_by" + MADE_BY.encode() in file.read()


def _parameters(path: Path) -> bool:
    """Whether a file holds parameters, by whatever hand: its edits have a rule of their own (`configure.write`)."""
    import yaml

    from pipestill.config import Params

    text = path.read_text(encoding="utf-8")
    if text.startswith("# Written by: pipestill config"):
        return True
    body = yaml.safe_load(text)
    return isinstance(body, dict) and 2 * len(set(body) & set(Params.model_fields)) > len(body)


METRICS = FileKind("a file of a run's metrics", lambda path: _metrics(path, floor=False))
FLOOR = FileKind("a file of the floor's metrics", lambda path: _metrics(path, floor=True))
EDM_WEIGHTS = FileKind("a file of weights in EDM's names", _edm_weights)
LMDB = FileKind("an LMDB in DMD2's layout", _lmdb)
PARAMETERS = FileKind("a file of parameters", _parameters)
PNGS = FolderKind("pictures")
DATA_REPORT = FolderKind("data-report")
MEASUREMENTS = FolderKind("measurements")
EXPORT = FolderKind("export")
WATCH = ResumedFolder("a table of evaluated checkpoints", "watch.json")


# --- options ------------------------------------------------------------------------------------------------------


class Written:
    """The type of an option that names an output: a Path. `kind` may depend on the other options; None: not written."""

    def __init__(self, kind: Kind | Callable[[argparse.Namespace], Kind | None]) -> None:
        self._kind = kind

    def __call__(self, text: str) -> Path:
        return Path(text)

    def kind(self, options: argparse.Namespace) -> Kind | None:
        """What this call writes there."""
        return self._kind(options) if callable(self._kind) else self._kind


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks every output that a command line names, before anything is done. Raises InputError."""
    reads: list[Path] = []
    writes: dict[str, Path] = {}
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if value is None or isinstance(value, bool):
            continue
        kind = action.type.kind(options) if isinstance(action.type, Written) else None
        if kind is not None:
            kind.check(value)
            writes[action.option_strings[0]] = value
        elif action.metavar in PATHS and not isinstance(action.type, Written):
            reads += [Path(path) for path in (value if isinstance(value, list) else [value])]
    for flag, path in writes.items():
        require_apart(flag, path, reads)
    for first, second in combinations(writes, 2):
        if within(writes[first], writes[second]) or within(writes[second], writes[first]):
            raise InputError(f"{first} {writes[first]} and {second} {writes[second]} overlap: use separate paths")


def require_apart(flag: str, output: Path, inputs: Iterable[Path]) -> None:
    """Raises InputError if an output is one of the command's inputs, holds one, or lies inside an artefact of them."""
    for path in inputs:
        if within(path, output):
            raise InputError(f"{flag} {output} would replace {path}, an input of this command: choose another path")
        if within(output, path) and (path / MARK).is_file():
            raise InputError(f"{flag} {output} lies inside {path}, an input of this command: choose another path")


def within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it once links are followed, which may lead in circles."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path, kind: FileKind) -> Iterator[Path]:
    """A file to fill, which then appears at `path`, whole or not at all.

    Raises InputError if something else is at `path`, SurroundingsError if it cannot be written.
    """
    kind.check(path)
    with whole(path) as partial:
        yield partial
        follow_umask(partial)
        kind.check(path)


def write_file(path: Path, kind: FileKind, text: str) -> None:
    """Writes a text file as `new_file` does."""
    with new_file(path, kind) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path, kind: FolderKind) -> Iterator[Path]:
    """A folder to fill, which is then marked and appears at `path`, whole or not at all.

    Raises InputError if something else is at `path`, SurroundingsError if it cannot be written or another process
    writes it.
    """
    path = Path(os.path.abspath(path))
    kind.check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    with locked(path.with_name(f".{path.name}.lock"), path):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with writing(path):
                staging.mkdir()
                yield staging
                kind.mark(staging)
                follow_umask(staging)
            kind.check(path)
            with writing(path):
                artifacts.put_in_place(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
