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
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipestill import artifacts, status
from pipestill.artifacts import Artifact, InputEntry, Manifest
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.stopping import Interrupted

STATE = "PIPESTILL_STATE"  # names a file in which a stage notes where its state lies, for attempt.sh
OWNER = ".owner"  # locked by the process that a scratch folder belongs to
YOUNG = 60.0  # seconds in which a scratch folder may be without its lock
RECORD = "record.json"  # in a work folder: what differs from run to run
DYING = 5.0  # seconds that a killed process may take to end with all its threads and let go of its locks


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
        path = self.folder / RECORD
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


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder below `$PIPESTILL_RUNS` for as long as this process needs it; what killed ones left is removed."""
    place = runs_root().absolute() / "scratch"
    place.mkdir(parents=True, exist_ok=True)
    for left in place.iterdir():
        _remove_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
    try:
        with (folder / OWNER).open("w", encoding="utf-8") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)  # the kernel lets go of it, however the process ends
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime > YOUNG:
            with (folder / OWNER).open("a", encoding="utf-8") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def read_record(stage: str, key: str) -> dict[str, Any]:
    """The run's record, or an empty one where the work was done elsewhere."""
    return read_record_at(run_folder(stage, key))


def read_record_at(folder: Path) -> dict[str, Any]:
    """The record in a work folder; an empty one where there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
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
    ranks: int = 1,
) -> Iterator[Work]:
    """Opens a piece of work; the leader (rank 0) holds its lock and that of the output until the end.

    The leader also says how the work goes (`status.py`), and notes for whoever counts attempts where its state lies.
    On other ranks `done` is None: the leader says whether there is anything to do. Raises InputError where the output
    would replace something else, SurroundingsError when another process holds a lock.
    """
    output = Path(os.path.abspath(output))
    work = Work(kind, stage, version, parameters, inputs, output)
    with _locks(work) if leader else _nothing():
        if leader:
            work.done = _finished(work)
            if work.done is None:
                artifacts.check_place(output, kind, inputs)
        if leader:
            _sweep(work)
        try:
            with _told(work, ranks) if leader and work.done is None else _nothing():
                yield work
        except (Stopped, Interrupted):
            if leader:
                work.record()  # so that the seconds of all attempts add up
            raise


@contextmanager
def _told(work: Work, ranks: int) -> Iterator[None]:
    if STATE in os.environ:
        write_atomic(Path(os.environ[STATE]), str((work.folder / "state").absolute()))
    facts = {"stage": work.stage, "key": work.key, "output": str(work.output), "ranks": ranks}
    with status.told(work.folder / status.FILE, facts):
        yield


def _sweep(work: Work) -> None:
    """Makes room for the work, and removes what a kill left of an earlier attempt."""
    shutil.rmtree(work.output.with_name(f".{work.output.name}.partial"), ignore_errors=True)
    if work.done is not None:
        shutil.rmtree(work.folder / "state", ignore_errors=True)
        return
    work.folder.mkdir(parents=True, exist_ok=True)
    for partial in work.folder.rglob(".*.partial"):
        if partial.is_file():
            partial.unlink()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _locks(work: Work) -> Iterator[None]:
    """The locks of the output, which lies beside it, and of the key; both are removed at the end."""
    by_output = work.output.with_name(f".{work.output.name}.lock")
    with locked(by_output, work.output), locked(runs_root() / "locks" / f"{work.key[:16]}.lock", work.output):
        yield


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Holds a lock file on behalf of `output`; it is removed at the end.

    Raises SurroundingsError when another process holds it for longer than a killed one takes to end, or it cannot be
    written.
    """
    limit = time.monotonic() + DYING
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{error.filename} is no folder, nothing can lie below it: name another place") from error
        except OSError as error:
            raise SurroundingsError(f"{path} cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < limit:
                    time.sleep(0.05)
                    continue
                raise SurroundingsError(
                    f"{output} is being written by another process: wait for it or end it"
                ) from error
            except OSError as error:
                raise SurroundingsError(
                    f"{path} cannot be locked: {error.strerror}: does its file system know flock?"
                ) from error
            if not _is_at(path, file.fileno()):
                continue  # its last holder removed it between our opening and our locking
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Files of a library's making are written within: what they raise on a full disk becomes a SurroundingsError.

    NumPy's short write has no error number, safetensors and torch have errors of their own.
    """
    try:
        yield
    except OSError as error:
        raise SurroundingsError(f"{place} could not be written: {error.strerror or error}") from error
    except Exception as error:
        torchs = any(sign in str(error) for sign in ("PytorchStreamWriter", "inline_container"))
        if type(error).__name__ != "SafetensorError" and not torchs:
            raise
        raise SurroundingsError(f"{place} could not be written: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to fill, whose file then appears at `path` whole or not at all: written beside it, fsynced, renamed.

    Raises SurroundingsError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` as with `whole`. Raises SurroundingsError where it cannot be written."""
    with whole(path) as partial, partial.open("wb") as file:
        yield file


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Raises SurroundingsError where it cannot be written."""
    with atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
