"""Images as files in folders: one folder per class, with or without folders for the parts of the split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipestill import mixes
from pipestill.config import DataParams
from pipestill.data.listing import Lister
from pipestill.data.source import Source, in_order
from pipestill.data.split import TEST, TRAIN, VALIDATION
from pipestill.data.transforms import BadImage
from pipestill.errors import InputError
from pipestill.userfiles import OF_THE_SURROUNDINGS, NotAFile, escaped, open_file

PART_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
MOST_BYTES = 1 << 30  # of one file; no image within the limit of pixels needs more


def by_class(path: Path, data: DataParams) -> Source:
    """One sub-folder per class; below train/, validation/ and test/ if the folders define the split."""
    if not path.is_dir():
        raise InputError(f"data.path={path} is not a folder, which data.format=folder needs; see edm, npz and lmdb")
    lister = Lister(path)
    strays = lister.strays
    if data.split.by == "folder":
        tops, outside = lister.children()
        unknown = [name for name in tops if name not in PART_FOLDERS]
        if unknown or "train" not in tops:
            raise InputError(
                f"data.path={path} holds {listed(tops)}: data.split.by=folder takes train/, validation/ and test/"
            )
        roots = [(f"{name}/", PART_FOLDERS[name]) for name in tops]
        for name in outside:
            strays.add(name, path / name, "lies beside the folders of the split")
    else:
        roots = [("", TRAIN)]
    found: list[tuple[str, str, int]] = []  # name, class, part
    for root, part in roots:
        folder = root.rstrip("/")
        if not data.labels:
            found += [(name, "", part) for name in lister.walk(folder)]
            continue
        classes, beside = lister.children(folder)
        for name in beside:
            strays.add(root + name, path / root / name, "lies beside the class folders")
        for label in classes:
            names = list(lister.walk(root + label))
            if not names:
                reason = strays.below(root + label)
                why = f"without images that can be read (the first {reason})" if reason else "without images"
                raise InputError(f"{escaped(path / root / label)} is a class folder {why}: fill or remove it")
            found += [(name, label, part) for name in names]
    if not found and strays.reasons:
        name, reason = min(strays.reasons.items())
        if "lies beside the class folders" in strays.reasons.values():
            raise InputError(
                f"data.path={path} holds files but no class folders: "
                "make one sub-folder per class, or set data.labels=false"
            )
        raise InputError(f"data.path={path} holds no image that can be read: {escaped(path / name)} {reason}")
    found.sort()
    names = [name for name, _, _ in found]
    named = in_order({label for _, label, _ in found}) if data.labels else ()
    number = {label: index for index, label in enumerate(named)}
    return Source(
        names,
        np.array([number.get(label, -1) for _, label, _ in found], dtype=np.int64),
        named,
        lambda index: file_content(path / names[index]),
        {name: path / name for name in names} | strays.paths,
        np.array([part for _, _, part in found], dtype=np.uint8) if data.split.by == "folder" else None,
        strays.reasons,
    )


def file_content(path: Path) -> bytes:
    """A file's bytes. Raises BadImage if it cannot be opened (a dead link, no permission, no file any more)."""
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise BadImage(f"is larger than {MOST_BYTES >> 20} MiB, the most that an image may have")
            return file.read()
    except NotAFile as error:
        raise BadImage(str(error.strerror).removeprefix("it ").removesuffix(", not a file")) from error
    except OSError as error:
        if error.errno in OF_THE_SURROUNDINGS:
            raise
        raise BadImage(f"cannot be read ({error.strerror})") from error


def listed(names: Sequence[str]) -> str:
    """The first of some names of files, for a message."""
    return mixes.listed([escaped(name) for name in names]) or "no folders"
