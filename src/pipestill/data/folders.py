"""Images as files: folders by class, and EDM's form, a folder or zip with dataset.json."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipestill.config import DataParams
from pipestill.data.source import Source, in_order, numbered, without_labels
from pipestill.data.split import TEST, TRAIN, VALIDATION
from pipestill.data.transforms import BadImage
from pipestill.errors import InputError

PART_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
LABEL_FILE = "dataset.json"  # EDM's


def by_class(path: Path, data: DataParams) -> Source:
    """One sub-folder a class; below train/, validation/ and test/ where the split is the folders'."""
    if not path.is_dir():
        raise InputError(f"data.path={path} is no folder: data.format=folder takes one, see edm, npz and lmdb")
    if data.split.by == "folder":
        tops, outside = _children(path)
        unknown = [name for name in tops if name not in PART_FOLDERS]
        if unknown or "train" not in tops:
            raise InputError(
                f"data.path={path} holds {_listed(tops)}: data.split.by=folder takes train/, validation/ and test/"
            )
        roots = [(f"{name}/", PART_FOLDERS[name]) for name in tops]
    else:
        outside, roots = [], [("", TRAIN)]
    strays = dict.fromkeys(outside, "lies beside the folders of the split")
    found: list[tuple[str, str, int]] = []  # name, class, part
    for root, part in roots:
        if data.labels:
            classes, beside = _children(path / root)
            strays |= dict.fromkeys((root + name for name in beside), "lies beside the class folders")
        else:
            classes = [""]
        for label in classes:
            names = [f"{root}{name}" for name in _walk(path / root, label)]
            if label and not names:
                raise InputError(f"{path / root / label} is a class folder without images: fill or remove it")
            found += [(name, label, part) for name in names]
    if not found and strays:
        raise InputError(
            f"data.path={path} holds files but no class folders: make one sub-folder a class, or set data.labels=false"
        )
    found.sort()
    names = [name for name, _, _ in found]
    named = in_order({label for _, label, _ in found}) if data.labels else ()
    number = {label: index for index, label in enumerate(named)}
    return Source(
        names,
        np.array([number.get(label, -1) for _, label, _ in found], dtype=np.int64),
        named,
        lambda index: _file_content(path / names[index]),
        {name: path / name for name in (*names, *strays)},
        np.array([part for _, _, part in found], dtype=np.uint8) if data.split.by == "folder" else None,
        strays,
    )


def _file_content(path: Path) -> bytes:
    """A file's bytes. Raises BadImage where it cannot be opened (a dead link, no permission)."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error


def _children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and files in a folder, sorted; hidden ones (a leading dot) are no input."""
    with os.scandir(folder) as entries:
        visible = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name, is_dir in visible if is_dir), sorted(name for name, is_dir in visible if not is_dir)


def _walk(root: Path, below: str) -> Iterator[str]:
    """Every visible file below a folder of `root`, by path relative to `root`."""
    folders, files = _children(root / below)
    prefix = f"{below}/" if below else ""
    yield from (prefix + name for name in files)
    for name in folders:
        yield from _walk(root, prefix + name)


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "no folders"
    return shown + (", …" if len(names) > most else "")


def edm(path: Path, data: DataParams) -> Source:
    """A folder or zip of image files with `dataset.json` {"labels": [[name, label], …] or null}.

    A file that `dataset.json` names is an image of the source, there or not: one that is not there is a bad one.
    """
    if path.is_dir():
        everything = {name: path / name for name in _walk(path, "")}
        content: Callable[[str], bytes] = lambda name: _file_content(everything[name])  # noqa: E731
        files = everything
    else:
        archive = _Archive(path)
        everything = dict.fromkeys(archive.names(), path)
        content, files = archive.read, {path.name: path}
    names = sorted(name for name in everything if name != LABEL_FILE)
    if not data.labels:
        return Source(names, without_labels(names), (), lambda index: content(names[index]), files)
    if LABEL_FILE not in everything:
        raise InputError(f"data.path={path} holds no {LABEL_FILE}: data.format=edm takes labels from it")
    try:
        stated = json.loads(content(LABEL_FILE))["labels"]
        by_name = None if stated is None else dict(stated)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: {LABEL_FILE} cannot be read as EDM's labels ({error})") from error
    if by_name is None:
        raise InputError(f"{path}: {LABEL_FILE} holds no labels: set data.labels=false")
    if not all(isinstance(name, str) for name in by_name):
        wrong = next(name for name in by_name if not isinstance(name, str))
        raise InputError(f"{path}: {LABEL_FILE} labels {str(wrong)[:40]}, which is no file's name")
    unlabelled = [name for name in names if name not in by_name]
    if unlabelled:
        raise InputError(f"{path}: {LABEL_FILE} has no label for {_listed(unlabelled)}: add it or remove the image")
    names = sorted({*names, *by_name})
    labels, classes = numbered([by_name[name] for name in names], path)

    def read(index: int) -> bytes:
        if names[index] not in everything:
            raise BadImage(f"is labelled in {LABEL_FILE} and not there")
        return content(names[index])

    return Source(names, labels, classes, read, files)


class _Archive:
    """A zip file, opened once in each process that reads from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self._path)
            except (OSError, zipfile.BadZipFile) as error:
                raise InputError(f"{self._path} is no zip that can be read ({error}): copy it again") from error
        return self._opened[1]

    def names(self) -> list[str]:
        names = [info.filename for info in self._zip().infolist() if not info.is_dir()]
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]

    def read(self, name: str) -> bytes:
        try:
            return self._zip().read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadImage(f"cannot be read from the zip ({error})") from error
