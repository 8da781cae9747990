"""Images in EDM's form: a folder or zip of image files with `dataset.json`."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipestill.config import DataParams
from pipestill.data.archives import DAMAGED, damaged, of_the_machine
from pipestill.data.folders import MOST_BYTES, file_content, listed
from pipestill.data.listing import Lister
from pipestill.data.source import Source, numbered, without_labels
from pipestill.data.transforms import BadImage
from pipestill.errors import InputError
from pipestill.userfiles import escaped, is_utf8, open_file, unreadable

LABEL_FILE = "dataset.json"


def edm(path: Path, data: DataParams) -> Source:
    """A folder or zip of image files with `dataset.json` {"labels": [[name, label], …] or null}.

    A file that `dataset.json` names is an image of the source, there or not: one that is not there is a bad one.
    """
    strays: Mapping[str, str] = {}
    if path.is_dir():
        lister = Lister(path)
        everything = {name: path / name for name in lister.walk()}
        content: Callable[[str], bytes] = lambda name: file_content(everything[name])  # noqa: E731
        files, strays = everything | lister.strays.paths, lister.strays.reasons
    else:
        archive = _Archive(path)
        everything = dict.fromkeys(archive.names(), path)
        content, files = archive.read, {path.name: path}
    names = sorted(name for name in everything if name != LABEL_FILE)
    aside = {name: reason for name, reason in strays.items() if name != LABEL_FILE}
    if not data.labels:
        return Source(names, without_labels(names), (), lambda index: content(names[index]), files, strays=aside)
    if LABEL_FILE in strays:
        raise InputError(f"{path / LABEL_FILE} {strays[LABEL_FILE]}: data.format=edm takes labels from it")
    if LABEL_FILE not in everything:
        raise InputError(f"data.path={path} holds no {LABEL_FILE}: data.format=edm takes labels from it")
    by_name = _labels(path, content)
    unlabelled = [name for name in names if name not in by_name]
    if unlabelled:
        raise InputError(f"{path}: {LABEL_FILE} has no label for {listed(unlabelled)}: add it or remove the image")
    names = sorted({*names, *by_name} - {*aside})
    labels, classes = numbered([by_name[name] for name in names], path)

    def read(index: int) -> bytes:
        if names[index] not in everything:
            raise BadImage(f"is named in {LABEL_FILE} but missing")
        return content(names[index])

    return Source(names, labels, classes, read, files, strays=aside)


def _labels(path: Path, content: Callable[[str], bytes]) -> dict[str, Any]:
    """What `dataset.json` says of each file. Raises InputError if it cannot be read, or contradicts itself."""
    where = f"{path}: {LABEL_FILE}"
    try:
        body = json.loads(content(LABEL_FILE), object_pairs_hook=_once)
        stated = body["labels"]
    except BadImage as error:
        raise InputError(f"{where} {error}: copy it again") from error
    except OSError as error:
        raise unreadable(where, error) from error
    except KeyError:
        raise InputError(f"{where} has no 'labels': {{\"labels\": [[name, number], …]}} is expected") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as EDM's labels ({error})") from error
    if stated is None:
        raise InputError(f"{where} holds no labels: set data.labels=false")
    pairs: Sequence[Any] = list(stated.items()) if isinstance(stated, dict) else stated
    if not isinstance(pairs, list):
        raise InputError(f"{where} cannot be read as EDM's labels (a list of [name, number] is expected)")
    found: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError(f"{where} cannot be read as EDM's labels ({repr(pair)[:40]} is not [name, number])")
        name, label = pair
        if not isinstance(name, str) or not is_utf8(name):
            raise InputError(f"{where} labels {ascii(name)[:40]}, which is no file's name")
        if name in found and found[name] != label:
            raise InputError(
                f"{where} labels {escaped(name)} twice, as {repr(found[name])[:20]} and as {repr(label)[:20]}: "
                "keep the right one"
            )
        found[name] = label
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand once; JSON itself would let the last of them win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{ascii(twice)[:40]} stands there twice")
    return found


class _Archive:
    """A zip file, opened once in each process that reads from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(open_file(self._path))
            except DAMAGED as error:
                raise damaged(self._path, "zip", error) from error
        return self._opened[1]

    def names(self) -> list[str]:
        """Visible members. Raises InputError for a name that occurs twice: which of the two counts?"""
        names = [info.filename for info in self._zip().infolist() if not info.is_dir()]
        visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        if len(set(visible)) < len(visible):
            twice = Counter(visible).most_common(1)[0][0]
            raise InputError(f"{self._path} holds {escaped(twice)} twice: pack it again")
        return visible

    def read(self, name: str) -> bytes:
        archive = self._zip()
        try:
            if archive.getinfo(name).file_size > MOST_BYTES:
                raise BadImage(f"is larger than {MOST_BYTES >> 20} MiB, the most that an image may have")
            return archive.read(name)
        except DAMAGED as error:
            if of_the_machine(error):
                raise
            raise BadImage(f"cannot be read from the zip ({' '.join(str(error).split())})") from error
