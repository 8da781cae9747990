"""Where images come from: folders, EDM's zip or folder, npz files, DMD2's LMDB; each an ordered list to read from.

A source is listed in the calling process and read in any process that inherits it by fork; what lies there is only
read. Names are sorted, so the order is the same on every machine.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill.config import DataParams
from pipestill.data.class_names import renamed
from pipestill.data.split import TEST, TRAIN, VALIDATION
from pipestill.data.transforms import BadImage
from pipestill.errors import InputError

Content = bytes | NDArray[np.uint8]
PART_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
IMAGE_ARRAYS = ("images", "arr_0", "data")
LABEL_FILE = "dataset.json"  # EDM's
LABEL_ARRAYS = ("labels", "arr_1", "label")


@dataclass(frozen=True)
class Source:
    """Images in their canonical order.

    `labels` int64 [N] index into `classes` (-1 and () without labels); `parts` uint8 [N] where the source itself
    says what is for training; `strays` are files that belong to no class, with the reason; `files` is what the source
    consists of, by name; `read` gives an encoded file or pixels uint8 [H, W, C].
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    read: Callable[[int], Content]
    files: dict[str, Path]
    parts: NDArray[np.uint8] | None = None
    strays: dict[str, str] = field(default_factory=dict)


def open_source(data: DataParams) -> Source:
    """Lists the images that `data` names. Raises InputError where they are not there or not of that form."""
    path = Path(data.path)
    if not path.exists():
        raise InputError(f"data.path={path} does not exist: name the folder or file that holds the images")
    if data.split.by == "folder" and data.format != "folder":
        raise InputError(f"data.split.by=folder takes data.format=folder, not {data.format}: use fraction or none")
    source: Source = {"folder": _folder, "edm": _edm, "npz": _npz, "lmdb": _lmdb}[data.format](path, data)
    if not len(source.names):
        raise InputError(f"data.path={path} holds no images")
    if data.class_names is not None:
        source = renamed(source, Path(data.class_names))
    if data.expect is not None:
        for what, count in (("images", len(source.names)), ("classes", len(source.classes))):
            wanted = getattr(data.expect, what)
            if count != wanted:
                raise InputError(f"data.path={path} holds {count:,} {what}, {wanted:,} were expected (data.expect)")
    if data.labels:
        filled = np.unique(source.labels)
        if len(source.classes) < 2 or len(filled) < 2:
            named = source.classes[filled[0]]
            raise InputError(f"data.path={path} holds one class only ('{named}'): add others or set data.labels=false")
    return source


# ---- folders ----


def _folder(path: Path, data: DataParams) -> Source:
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
    classes = sorted({label for _, label, _ in found}) if data.labels else []
    number = {label: index for index, label in enumerate(classes)}
    return Source(
        names,
        np.array([number.get(label, -1) for _, label, _ in found], dtype=np.int64),
        tuple(classes),
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


# ---- EDM's form: a folder or zip with dataset.json ----


def _edm(path: Path, data: DataParams) -> Source:
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
        return Source(names, _unlabelled(names), (), lambda index: content(names[index]), files)
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
    labels, classes = _numbered([by_name[name] for name in names], path)

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


# ---- arrays ----


def _npz(path: Path, data: DataParams) -> Source:
    """A file, or a folder of them in sorted order: images uint8 NHWC, NHW or flat rows (as down-sampled ImageNet's).

    Flat rows are channel by channel; their labels, where they start at 1 as that archive's do, are stored from 0 on.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    images, labels, names, flat = [], [], [], False
    for file in files:
        found = _load_npz(file)
        array = _named(found, IMAGE_ARRAYS)
        if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3, 4):
            raise InputError(f"{file} holds no images: one of {', '.join(IMAGE_ARRAYS)} as uint8 [N, H, W, C] is taken")
        flat = flat or array.ndim == 2
        images.append(_as_nhwc(array, file))
        names += [f"{file.stem}/{index:08d}" if path.is_dir() else f"{index:08d}" for index in range(len(array))]
        if data.labels:
            given = _named(found, LABEL_ARRAYS)
            if given is None:
                raise InputError(f"{file} holds no labels ({', '.join(LABEL_ARRAYS)}): set data.labels=false")
            if given.size != len(array):
                raise InputError(f"{file} holds {given.size} labels for {len(array)} images")
            labels += given.reshape(-1).tolist()
    starts = np.cumsum([0, *map(len, images)])

    def read(index: int) -> NDArray[np.uint8]:
        which = int(np.searchsorted(starts, index, side="right")) - 1
        return np.asarray(images[which][index - starts[which]])

    named = {file.name: file for file in files}
    if not data.labels:
        return Source(names, _unlabelled(names), (), read, named)
    numbers, classes = _numbered(labels, path, from_one=flat)
    return Source(names, numbers, classes, read, named)


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file; those stored without compression are mapped, not read. Raises InputError."""
    wanted = {f"{name}.npy" for name in IMAGE_ARRAYS + LABEL_ARRAYS}
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            for info in archive.infolist():
                if info.filename not in wanted:
                    continue
                with archive.open(info) as member:
                    if info.compress_type != zipfile.ZIP_STORED:
                        array = np.lib.format.read_array(member, allow_pickle=False)
                    else:
                        shape, fortran, dtype = _header(member)
                        raw.seek(info.header_offset + 26)  # lengths of name and extra field in the local header
                        name, extra = np.frombuffer(raw.read(4), dtype="<u2").tolist()
                        start = info.header_offset + 30 + name + extra + member.tell()
                        if dtype.hasobject:
                            raise ValueError("it holds Python objects")
                        array = np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
                arrays[info.filename.removesuffix(".npy")] = array
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} is no npz that can be read ({error}): copy it again") from error
    return arrays


def _header(member: Any) -> tuple[Any, bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header: tuple[Any, bool, np.dtype[Any]] = read(member)
    return header


def _named(arrays: dict[str, NDArray[Any]], names: Sequence[str]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _as_nhwc(array: NDArray[np.uint8], where: Path) -> NDArray[np.uint8]:
    """A view [N, H, W, C] with 1 or 3 channels. Raises InputError."""
    if array.ndim == 2:
        for channels in (3, 1):
            side = round((array.shape[1] / channels) ** 0.5)
            if side * side * channels == array.shape[1]:
                return array.reshape(-1, channels, side, side).transpose(0, 2, 3, 1)
    elif array.ndim == 3:
        return array[..., None]
    elif array.shape[-1] in (1, 3):
        return array
    raise InputError(f"{where} holds images of shape {list(array.shape)}: uint8 [N, H, W, 1 or 3] is taken")


# ---- DMD2's LMDB ----


def _lmdb(path: Path, data: DataParams) -> Source:
    """DMD2's layout: `images_{i}_data` uint8 CHW, `labels_{i}_data` int64, and their shapes as text."""
    from pipestill.data.store import environment

    def stored(key: str) -> bytes:
        with environment(path).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise InputError(f"{path} has no '{key}': data.format=lmdb takes the layout of DMD2's image files")
        return bytes(value)

    def shape_of(key: str) -> list[int]:
        text = stored(key).decode(errors="replace")
        if not re.fullmatch(r"\d+( \d+)*", text.strip()):
            raise InputError(f"{path}: '{key}' is no shape but '{text[:40]}'")
        return [int(size) for size in text.split()]

    count, channels, height, width = [*shape_of("images_shape"), 0, 0, 0, 0][:4]
    if channels not in (1, 3) or not height or not width:
        raise InputError(f"{path}: 'images_shape' is {shape_of('images_shape')}: [N, 1 or 3, H, W] is taken")

    def read(index: int) -> NDArray[np.uint8]:
        pixels = np.frombuffer(stored(f"images_{index}_data"), dtype=np.uint8)
        if pixels.size != channels * height * width:
            raise InputError(f"{path}: image {index} has {pixels.size} bytes, {channels * height * width} belong to it")
        return pixels.reshape(channels, height, width).transpose(1, 2, 0)

    read(0), read(count - 1)
    names = [f"{index:08d}" for index in range(count)]
    files = {path.name: path / "data.mdb" if path.is_dir() else path}
    if not data.labels:
        return Source(names, _unlabelled(names), (), read, files)
    if shape_of("labels_shape") not in ([count], [count, 1]):
        raise InputError(f"{path}: 'labels_shape' is {shape_of('labels_shape')}: [{count}] or [{count}, 1] is taken")
    with environment(path).begin() as transaction:
        raw = b"".join(transaction.get(b"labels_%d_data" % index, b"") for index in range(count))
    if len(raw) != 8 * count:
        raise InputError(f"{path} does not hold one int64 label for each of its {count} images")
    labels, classes = _numbered(np.frombuffer(raw, dtype="<i8").tolist(), path)
    return Source(names, labels, classes, read, files)


# ---- labels ----


def _unlabelled(names: Sequence[str]) -> NDArray[np.int64]:
    return np.full(len(names), -1, dtype=np.int64)


def _numbered(
    labels: Sequence[Any], where: Path, *, from_one: bool = False
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels that are class numbers already: kept as they are, so that a network's class k stays class k.

    Raises InputError where they are no whole numbers from 0 on.
    """
    if not all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int) or isinstance(label, bool) or label < 0)
        raise InputError(f"{where}: label {repr(wrong)[:40]} is no class number (0, 1, 2, …)")
    first = 1 if from_one and labels and min(labels) == 1 else 0
    highest = max(labels, default=-1)
    if highest >= 2**20:
        raise InputError(f"{where}: label {highest} is no class number: they run from 0 to below {2**20}")
    return np.array(labels, dtype=np.int64) - first, tuple(str(number) for number in range(first, highest + 1))
