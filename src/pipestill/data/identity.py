"""By which digest a dataset knows its source: an example artefact's payload, or the content of every outside file.

Reading a million files for their digests is worth doing once: the result is remembered under `$PIPESTILL_RUNS` with
the files' names, sizes, times and inodes, and holds until one of those changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipestill import artifacts, digests
from pipestill.artifacts import InputEntry
from pipestill.data.source import Source
from pipestill.errors import InputError
from pipestill.progress import Bar
from pipestill.userfiles import OF_THE_SURROUNDINGS, unreadable
from pipestill.work import runs_root, write_atomic

READERS = 8  # threads that read files for their digests
TOGETHER = 128  # files that a thread takes at a time
SETTLED = 2 * 10**9  # nanoseconds after which a changed file is sure to show another time


def input_of(source: Source, path: Path) -> InputEntry:
    """What a manifest says of a source at `path`. Raises InputError where an example artefact was tampered with."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        if (folder / artifacts.MANIFEST).is_file():
            entry = _images_artifact(folder, source, path.relative_to(folder).as_posix())
            if entry is not None:
                return entry
    return _outside(source.files, path)


def _images_artifact(folder: Path, source: Source, below: str) -> InputEntry | None:
    """The entry of an artefact of kind `images` whose listing and content are those of the source."""
    try:
        manifest: Any = json.loads((folder / artifacts.MANIFEST).read_text(encoding="utf-8"))
        if manifest["kind"] != "images":
            return None
    except (ValueError, KeyError, TypeError):
        return None
    artifact = artifacts.read(folder, "images")
    artifacts.verify(artifact)
    prefix = "" if below == "." else f"{below}/"
    stated = {name.removeprefix(prefix) for name in artifact.manifest.files if name.startswith(prefix)}
    other = sorted(stated ^ set(source.files))
    if other:
        raise InputError(
            f"{folder} and its manifest differ in '{other[0]}': write it anew, or change the images in a copy elsewhere"
        )
    return artifact.as_input


def _outside(files: dict[str, Path], path: Path) -> InputEntry:
    signature, newest = _signature(files)
    memory = runs_root() / "inputs" / f"{digests.of_value(str(path))[:16]}.json"
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        if remembered["signature"] == signature:
            return InputEntry(remembered["kind"], remembered["payload"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    entry = InputEntry("folder" if path.is_dir() else "file", digests.of_value(_contents(files)))
    if _signature(files)[0] == signature and time.time_ns() - newest > SETTLED:
        write_atomic(memory, json.dumps({"signature": signature, "kind": entry.kind, "payload": entry.payload}) + "\n")
    return entry


def _signature(files: dict[str, Path]) -> tuple[str, int]:
    """A digest of what the file system says of the files, and when the newest of them changed (ns)."""
    digest, newest = hashlib.sha256(), 0
    for name in sorted(files):
        try:
            status = _status(files[name])
        except OSError as error:  # it went away; the build will name it
            digest.update(f"{name}\0{error.strerror}\n".encode())
            continue
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\n".encode())
        newest = max(newest, status.st_ctime_ns)
    return digest.hexdigest(), newest


def _status(path: Path) -> os.stat_result:
    """What the file system says of a file, or of a dead link itself."""
    try:
        return path.stat()
    except OSError:
        return path.lstat()


def _digest(path: Path) -> str:
    """The digest of a file's content; one that cannot be read is known by why (the build will name it).

    Raises SurroundingsError if the machine or its file system failed.
    """
    try:
        return digests.of_file(path)
    except OSError as error:
        if error.errno in OF_THE_SURROUNDINGS:
            raise unreadable(path, error) from error
        return f"unreadable: {error.strerror}"


def _contents(files: dict[str, Path]) -> dict[str, str]:
    """The digest of every file, by name."""

    def digested(share: list[str]) -> list[str]:
        return [_digest(files[name]) for name in share]

    bar = Bar("reading", len(files), unit="file", show=len(files) > 10_000)
    names = sorted(files)
    contents: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), READERS * TOGETHER):
            some = names[start : start + READERS * TOGETHER]
            shares = [some[at : at + TOGETHER] for at in range(0, len(some), TOGETHER)]
            for share, found in zip(shares, pool.map(digested, shares), strict=True):
                contents |= zip(share, found, strict=True)
            bar.advance(len(some))
    bar.close()
    return contents
