"""Fetch outside files (a teacher's weights, an extractor, statistics) at a pinned revision, and check size and SHA-256.

Nothing in them is read. Where there is no network, put the files into the folder that the message names (inputs/NAME by
default): they are taken from there, with the same checks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipestill import artifacts, digests, download
from pipestill.artifacts import Artifact
from pipestill.config import FetchedFile, FetchParams
from pipestill.errors import InputError, SurroundingsError
from pipestill.progress import say
from pipestill.stages import common
from pipestill.stopping import StopRequest
from pipestill.userfiles import copy_file, is_there, unreadable
from pipestill.work import Work, open_work, writing

VERSION = 1
INBOX = Path("inputs")  # where files are put by hand, one folder for each entry of `fetched`
EXAMPLES = """
  pipestill fetch --name edm --output artifacts/fetched/edm
  pipestill fetch --name edm --output artifacts/fetched/edm --from /media/stick/edm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_common(parser, makes="files", name="the entry of `fetched`")
    parser.add_argument(
        "--from", dest="inbox", type=Path, metavar="DIR", help="take the files from there (default: inputs/NAME)"
    )
    common.add_deadline(parser)


def main(options: argparse.Namespace) -> int:
    params = common.load_params(options)
    stop = StopRequest(params.operation.margin)
    with stop.listening():
        fetch(
            common.entry(params.fetched, options.name, "fetched"),
            options.output,
            inbox=options.inbox or INBOX / options.name,
            stop=stop,
        )
    return 0


def fetch(params: FetchParams, output: Path, *, inbox: Path, stop: StopRequest | None = None) -> Artifact:
    """Fetches the files of one entry into an artefact of kind `files`, or finds it there.

    Raises InputError (another size or digest than stated, a wrong address), SurroundingsError (no network, full disk)
    and Stopped, with what has come kept.
    """
    inputs = {}
    for file in params.files:
        if file.source == "path" and is_there(Path(file.location)):  # what lies there is not pinned by its name
            inputs[file.path] = artifacts.outside_input(Path(file.location))
    with open_work(
        kind="files", stage="fetch", version=VERSION, parameters=params.plain(), inputs=inputs, output=output
    ) as work:
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done
        found = {}
        for file in params.files:
            found[file.path] = place = _bring(file, work, inbox, stop)
            try:
                _check(file, place)
            except InputError:
                if place.is_relative_to(work.state):
                    place.unlink()  # a further try must not go on from it
                raise
        staging, file_of = work.staging(), {file.path: file for file in params.files}
        for name, place in found.items():
            target = staging / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if place.is_relative_to(work.state):
                    _link(place, target)
                    continue
                copy_file(place, target)
            _check(file_of[name], target)  # what is published, not what lay elsewhere a moment ago
        if params.licence:
            (staging / artifacts.LICENCE).write_text(f"{params.licence}\n", encoding="utf-8")
        artifact = work.publish(staging, {"licence": params.licence})
        work.record(finished=True)
    entries = artifact.manifest.files
    say(f"{output}: {len(entries)} files, {sum(entry.size for entry in entries.values()):,} bytes")
    for file in params.files:
        if file.sha256 is None:
            say(f"{file.path} has sha256 {entries[file.path].sha256}: write it into the parameters, to pin the file")
    return artifact


def _link(place: Path, target: Path) -> None:
    """A checked download at its place in the artefact; it stays in the state too, so that a stop loses nothing."""
    try:
        os.link(place, target)
    except OSError:  # another file system, or one without links
        copy_file(place, target)


def missing(params: FetchParams, inbox: Path) -> list[str]:
    """What a person has to bring before `fetch` can run without a network: a line for each file that is not here."""
    lacking = [file for file in params.files if not _at_hand(file, inbox)]
    return [f"{inbox / file.path} ({_describe(file)})" for file in lacking]


def _at_hand(file: FetchedFile, inbox: Path) -> bool:
    try:
        return is_there(inbox / file.path) or (file.source == "path" and is_there(Path(file.location)))
    except InputError:  # something odd lies there: `fetch` itself says what
        return False


def _describe(file: FetchedFile) -> str:
    """Where a file comes from, and what it should be."""
    words = [f"{file.location}/{file.path} at {file.revision}" if file.source == "hub" else file.location]
    words += [] if file.size is None else [f"{file.size:,} bytes"]
    words += [] if file.sha256 is None else [f"sha256 {file.sha256}"]
    return ", ".join(words)


def _bring(file: FetchedFile, work: Work, inbox: Path, stop: StopRequest | None) -> Path:
    """Where the file is: as somebody brought it, or downloaded into the work's state."""
    brought = inbox / file.path
    if is_there(brought):
        say(f"{file.path}: taken from {brought}")
        return brought
    if file.source == "path":
        place = Path(file.location)
        if not is_there(place):
            raise InputError(f"{place} is not there: put it there, or at {brought}")
        return place
    target = work.state / "files" / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if file.source == "hub":
            assert file.revision is not None  # checked with the parameters
            download.from_hub(file.location, file.revision, file.path, work.state / "files", stop=stop)
        else:
            note = work.state / "notes" / file.path
            pinned = file.size is not None or file.sha256 is not None
            download.from_address(file.location, target, note=note, pinned=pinned, stop=stop)
    except SurroundingsError as error:
        raise SurroundingsError(f"{error}: bring {_describe(file)} by hand to {brought}, and start again") from None
    return target


def _check(file: FetchedFile, place: Path) -> None:
    """Raises InputError where a file is not the one that the parameters state."""
    try:
        size = place.stat().st_size
        wrong = f"{size:,} bytes, {file.size:,} were expected" if file.size not in (None, size) else ""
        if not wrong and file.sha256 is not None:
            say(f"{file.path}: checking {size:,} bytes")
            found = digests.of_file(place)
            wrong = f"sha256 {found}, {file.sha256} was expected" if found != file.sha256 else ""
    except OSError as error:
        raise unreadable(place, error) from error
    if wrong:
        raise InputError(f"{place} has {wrong}: it is another file than {_describe(file)}, or damaged")
