"""Artefacts: folders with a payload and a deterministic manifest, written whole or not at all.

A manifest names what the artefact is, the parameters that went in, the payload digests of its inputs and the size
and digest of each payload file; it is written last. It may touch the artefact's folder and the files beside it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pipestill import digests
from pipestill.errors import InputError, SurroundingsError, denied
from pipestill.modes import follow_umask
from pipestill.userfiles import escaped, is_utf8, unreadable

MANIFEST = "manifest.json"
LICENCE = "LICENCE"  # in artefacts of fetched files: under which they may be used, a part of their payload
MARK = ".pipestill"  # holds the kind; says that a folder is ours to replace, even without its manifest
SCHEMA = 1
MANY_FILES = 100  # from here on one sync of the file system is faster than an fsync for each file


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one payload file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class InputEntry:
    """What a stage read: the kind and the payload digest of an input artefact, or of an outside file or folder."""

    kind: str
    payload: str


@dataclass(frozen=True)
class Manifest:
    """The deterministic description of an artefact; equal work gives equal bytes.

    `views` are files that show the payload (the page on a dataset): present in the folder, but outside the payload
    digest. They hold no times either: equal work gives equal views.
    """

    kind: str
    stage: str
    version: int
    parameters: Mapping[str, Any]
    inputs: Mapping[str, InputEntry]
    files: Mapping[str, FileEntry]
    summary: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def payload(self) -> str:
        """Digest of the kind and of every payload file's name, size and digest."""
        return payload_digest(self.kind, self.files)

    @property
    def key(self) -> str:
        """Digest of the work that made this artefact: stage, version, parameters, inputs."""
        return work_key(self.stage, self.version, self.parameters, self.inputs)

    def to_json(self) -> str:
        body = asdict(self) | {"payload": self.payload}
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        body = json.loads(text)
        stated = body.pop("payload")
        body["inputs"] = {name: InputEntry(**entry) for name, entry in body["inputs"].items()}
        body["files"] = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        body["views"] = tuple(body["views"])
        manifest = Manifest(**body)
        if manifest.payload != stated:
            raise ValueError("the payload digest does not match the files listed")
        return manifest


def payload_digest(kind: str, files: Mapping[str, FileEntry]) -> str:
    """Digest by which other artefacts refer to a payload."""
    return digests.of_value({"kind": kind, "files": {name: asdict(entry) for name, entry in files.items()}})


def work_key(stage: str, version: int, parameters: Mapping[str, Any], inputs: Mapping[str, InputEntry]) -> str:
    """Key of a piece of work, and so of its resumable state: equal keys give equal artefacts."""
    return digests.of_value(
        {
            "stage": stage,
            "version": version,
            "parameters": dict(parameters),
            "inputs": {name: asdict(entry) for name, entry in inputs.items()},
        }
    )


@dataclass(frozen=True)
class Artifact:
    """A whole artefact on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a payload file; a missing one is the artefact's fault, not the caller's."""
        if name not in self.manifest.files:
            raise InputError(f"{self.path} holds no '{name}': rebuild it with pipestill {self.manifest.stage}")
        return self.path / name

    @property
    def as_input(self) -> InputEntry:
        return InputEntry(self.manifest.kind, self.manifest.payload)


def read(path: Path, kind: str) -> Artifact:
    """Opens the artefact in `path`, checking kind, schema, and presence and size of every payload file.

    Raises InputError, in one line that says what is wrong and what to do.
    """
    manifest_path = path / MANIFEST
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist: a {kind} artefact was expected there")
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        message = f"{path} is no artefact (it has no {MANIFEST}): a {kind} artefact was expected there"
        raise InputError(message) from error
    except PermissionError as error:
        raise denied(manifest_path) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{manifest_path} cannot be read ({error}): rebuild the artefact") from error
    if manifest.kind != kind:
        raise InputError(f"{path} is a {manifest.kind} artefact, a {kind} was expected")
    if manifest.schema != SCHEMA:
        raise InputError(f"{path} has manifest schema {manifest.schema}, this version reads {SCHEMA}: rebuild it")
    for name, entry in manifest.files.items():
        size = _size(path, path / name)
        if size != entry.size:
            raise InputError(f"{path / name} has {size} bytes, {entry.size} were written: rebuild {path}")
    for name in manifest.views:
        _size(path, path / name)
    return Artifact(path, manifest)


def _size(path: Path, file: Path) -> int:
    """The size of an artefact's file, looked at once: it may be replaced meanwhile. Raises InputError for none."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except PermissionError as error:
        raise denied(file) from error
    if found is None or not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file} is missing: {path} is not whole, rebuild it or pull it again")
    if not os.access(file, os.R_OK):  # libraries each have an error of their own for it
        raise denied(file)
    return found.st_size


def verify(artifact: Artifact) -> None:
    """Recomputes every payload digest. Raises InputError naming the first file that differs."""
    for name, entry in artifact.manifest.files.items():
        try:
            digest = digests.of_file(artifact.path / name)
        except FileNotFoundError as error:
            raise InputError(f"{artifact.path / name} went missing: rebuild {artifact.path}") from error
        if digest != entry.sha256:
            raise InputError(f"{artifact.path / name} differs from its manifest: rebuild {artifact.path}")


def outside_input(path: Path) -> InputEntry:
    """An input that is no artefact (a user's folder or file), identified by names, sizes and contents.

    Raises InputError for anything in it that cannot be read: a named pipe, a missing permission, a name that is not
    UTF-8, a file that disappears meanwhile.
    """
    if not path.is_dir():
        return InputEntry("file", _digest(path))
    listing = {}
    for folder, _, names in os.walk(path, onerror=_raise):
        for name in names:
            file = Path(folder, name)
            if not is_utf8(name):
                raise InputError(f"{escaped(file)} has a name that is not UTF-8: rename it")
            listing[file.relative_to(path).as_posix()] = _digest(file)
    return InputEntry("folder", digests.of_value(listing))


def _digest(path: Path) -> str:
    try:
        return digests.of_file(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _raise(error: OSError) -> NoReturn:
    raise unreadable(error.filename, error) from error


def describe_files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, FileEntry]:
    """Sizes and digests of every file below `folder`, by relative path, the manifest and `leave_out` aside."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in (MANIFEST, MARK, *leave_out):
            files[name] = FileEntry(file.stat().st_size, digests.of_file(file))
    return files


def marked_kind(folder: Path) -> str | None:
    """The kind that a folder's mark names in its first line; None where there is no mark that can be read."""
    try:
        return (folder / MARK).read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return None


def check_place(path: Path, kind: str, inputs: Mapping[str, InputEntry]) -> None:
    """Raises InputError where an artefact published at `path` would replace anything but an older one of its kind.

    Free are a place where nothing is, an empty folder, and one that bears this kind's mark, whole or not (Snakemake
    removes manifests before it runs a stage), unless it is an input of the work.
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    found = marked_kind(path)
    if found is None:
        raise InputError(f"{path} holds what pipestill did not make, and is left alone: name another --output")
    if found != kind:
        raise InputError(
            f"{path} is a {found} artefact, a {kind} would replace it: name another --output, or remove it"
        )
    try:
        payload = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["payload"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if payload in {entry.payload for entry in inputs.values()}:
        raise InputError(f"{path} is an input of this work, its result would replace it: name another --output")


def publish(staging: Path, final: Path, manifest: Manifest) -> Artifact:
    """Puts a finished folder in its place in one step: a reader sees the old artefact, the new one, or none.

    `staging` must be on the file system of `final`. Every file is fsynced before the manifest is written; an old
    artefact is exchanged and then removed. Raises InputError where something else than an artefact of this kind is
    there (`check_place`), SurroundingsError where it cannot be written.
    """
    check_place(final, manifest.kind, manifest.inputs)
    try:
        follow_umask(staging)
        _sync_below(staging, [*manifest.files, *manifest.views])
        (staging / MARK).write_text(f"{manifest.kind}\n", encoding="utf-8")
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _sync_below(staging, [MARK, MANIFEST])
        final.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(staging, final)
    except OSError as error:
        raise SurroundingsError(f"{final} could not be written: {error.strerror or error}") from error
    return Artifact(final, manifest)


def put_in_place(staging: Path, final: Path) -> None:
    """Renames a finished folder to `final` in one step; a folder that is there is exchanged, then removed."""
    if final.exists():
        _exchange(staging, final)
        shutil.rmtree(staging)
    else:
        os.rename(staging, final)
    _fsync(final.parent)


def _sync_below(folder: Path, names: Sequence[str]) -> None:
    """Makes files and the folders that hold them durable; many at once by syncing their file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    if len(names) > MANY_FILES and hasattr(libc, "syncfs"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if libc.syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(folder))
        finally:
            os.close(descriptor)
        return
    for name in names:
        _fsync(folder / name)
    for parent in {(folder / name).parent for name in names}:
        _fsync(parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swaps two names atomically (renameat2 with RENAME_EXCHANGE); where the system has none, by three renames."""
    at_cwd, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(second))
    aside = first.with_name(first.name + ".old")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)
