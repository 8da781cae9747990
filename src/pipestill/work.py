"""Work in progress: one folder a piece of work, keyed by what goes into it, locked by who does it.

A stage opens its work, goes on from whatever state lies there, and publishes an artefact at the end. It may touch
`$PIPESTILL_RUNS` (default `runs/`) and the artefact's place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipestill import artifacts, digests
from pipestill.artifacts import Artifact, InputEntry, Manifest
from pipestill.errors import InputError, Stopped, SurroundingsError


def runs_root() -> Path:
    """Where work in progress, logs and records live; neither git nor DVC tracks it."""
    return Path(os.environ.get("PIPESTILL_RUNS", "runs"))


def run_folder(stage: str, key: str) -> Path:
    """The folder of one piece of work."""
    return runs_root() / stage / key[:16]


@dataclass
class Work:
    """One piece of work on its way to an artefact.

    `folder` survives kills and is where state lies; `done` holds the artefact when it is already there and verifies.
    """

    kind: str
    stage: str
    version: int
    parameters: Mapping[str, Any]
    inputs: Mapping[str, InputEntry]
    output: Path
    done: Artifact | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> str:
        return artifacts.work_key(self.stage, self.version, self.parameters, self.inputs)

    @property
    def folder(self) -> Path:
        return run_folder(self.stage, self.key)

    def staging(self) -> Path:
        """A fresh folder beside the artefact's place, to be filled and published."""
        folder = self.output.with_name(f".{self.output.name}.partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, staging: Path, summary: Mapping[str, Any], views: tuple[str, ...] = ()) -> Artifact:
        """Publishes the filled staging folder as this work's artefact and drops what only served to resume."""
        manifest = Manifest(
            kind=self.kind,
            stage=self.stage,
            version=self.version,
            parameters=self.parameters,
            inputs=self.inputs,
            files=artifacts.describe_files(staging, leave_out=views),
            summary=summary,
            views=views,
        )
        artifact = artifacts.publish(staging, self.output, manifest)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        return artifact

    @property
    def state(self) -> Path:
        """Folder for what is needed to go on after a kill; removed once the artefact is published."""
        folder = self.folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, **figures: Any) -> None:
        """Writes what differs from run to run (host, time, seconds, speed) to the run's record, outside the artefact.

        Seconds of earlier attempts at the same work are added up.
        """
        path = self.folder / "record.json"
        earlier = read_record(self.stage, self.key)
        seconds = time.monotonic() - self.started + earlier.get("seconds", 0.0) * (not earlier.get("finished", False))
        body = {
            "stage": self.stage,
            "key": self.key,
            "output": str(self.output),
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "finished": False,
        }
        write_atomic(path, json.dumps(body | figures, indent=1) + "\n")


def read_record(stage: str, key: str) -> dict[str, Any]:
    """The run's record, or an empty one where the work was done elsewhere."""
    path = run_folder(stage, key) / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record


@contextmanager
def open_work(
    *,
    kind: str,
    stage: str,
    version: int,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, InputEntry],
    output: Path,
    leader: bool = True,
) -> Iterator[Work]:
    """Opens a piece of work; the leader (rank 0) holds its lock and that of the output until the end.

    Raises SurroundingsError when another process holds either.
    """
    output = Path(os.path.abspath(output))
    work = Work(kind, stage, version, parameters, inputs, output)
    with _locks(work) if leader else _nothing():
        work.done = _finished(work)
        if leader and work.done is None:
            work.folder.mkdir(parents=True, exist_ok=True)
            leftover = output.with_name(f".{output.name}.partial")
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield work
        except Stopped:
            if leader:
                work.record()  # so that the seconds of all attempts add up
            raise


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _locks(work: Work) -> Iterator[None]:
    folder = runs_root() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        by_output = (folder / f"{digests.of_value(str(work.output))[:16]}.lock").open("a")
        by_key = (folder / f"{work.key[:16]}.lock").open("a")
    except OSError as error:
        raise SurroundingsError(f"{folder} cannot be written: {error.strerror}") from error
    with by_output, by_key:
        for lock in (by_output, by_key):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SurroundingsError(
                    f"{work.output} is being written by another process: wait for it or end it"
                ) from error
        yield


def _finished(work: Work) -> Artifact | None:
    """The artefact, if it is there, verifies, and was made by this very work."""
    try:
        artifact = artifacts.read(work.output, work.kind)
        if artifact.manifest.key != work.key:
            return None
        artifacts.verify(artifact)
    except InputError:
        return None
    return artifact


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: beside its place, fsynced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SurroundingsError(f"{path} could not be written: {error.strerror or error}") from error
