"""Images as arrays: npz files, as down-sampled ImageNet's, and DMD2's LMDB."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill.config import DataParams
from pipestill.data.archives import DAMAGED, damaged
from pipestill.data.listing import Lister
from pipestill.data.source import Source, numbered, without_labels
from pipestill.errors import InputError
from pipestill.userfiles import escaped, open_file

IMAGE_ARRAYS = ("images", "arr_0", "data")
LABEL_ARRAYS = ("labels", "arr_1", "label")


def npz(path: Path, data: DataParams) -> Source:
    """A file, or a folder of them in sorted order: images uint8 NHWC, NHW or flat rows (as down-sampled ImageNet's).

    Flat rows are channel by channel; their labels, where they start at 1 as that archive's do, are stored from 0 on.
    """
    files = _npz_files(path) if path.is_dir() else [path]
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
        return Source(names, without_labels(names), (), read, named)
    numbers, classes = numbered(labels, path, from_one=flat)
    return Source(names, numbers, classes, read, named)


def _npz_files(folder: Path) -> list[Path]:
    """The npz files of a folder, sorted. Raises InputError for an odd entry among them."""
    lister = Lister(folder)
    _, names = lister.children()
    for name, reason in sorted(lister.strays.reasons.items()):
        if name == "." or name.endswith(".npz"):
            raise InputError(f"{escaped(folder / name)} {reason}: fix it or remove it")
    return [folder / name for name in names if name.endswith(".npz")]


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file; those stored without compression are mapped, not read. Raises InputError."""
    wanted = {f"{name}.npy" for name in IMAGE_ARRAYS + LABEL_ARRAYS}
    arrays = {}
    try:
        with open_file(path) as raw, zipfile.ZipFile(path) as archive:
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
    except DAMAGED as error:
        raise damaged(path, "npz", error) from error
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


def dmd2_lmdb(path: Path, data: DataParams) -> Source:
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
        return Source(names, without_labels(names), (), read, files)
    if shape_of("labels_shape") not in ([count], [count, 1]):
        raise InputError(f"{path}: 'labels_shape' is {shape_of('labels_shape')}: [{count}] or [{count}, 1] is taken")
    with environment(path).begin() as transaction:
        raw = b"".join(transaction.get(b"labels_%d_data" % index, b"") for index in range(count))
    if len(raw) != 8 * count:
        raise InputError(f"{path} does not hold one int64 label for each of its {count} images")
    labels, classes = numbered(np.frombuffer(raw, dtype="<i8").tolist(), path)
    return Source(names, labels, classes, read, files)
