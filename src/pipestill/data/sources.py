"""Where images come from: folders, EDM's zip or folder, npz files, DMD2's LMDB."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipestill.config import DataParams
from pipestill.data import arrays, edm, folders
from pipestill.data.class_names import renamed
from pipestill.data.source import Source
from pipestill.errors import InputError
from pipestill.userfiles import escaped, is_utf8, kind_of, unreadable

READERS = {"folder": folders.by_class, "edm": edm.edm, "npz": arrays.npz, "lmdb": arrays.dmd2_lmdb}


def open_source(data: DataParams) -> Source:
    """Lists the images that `data` names. Raises InputError where they are not there or not of that form."""
    path = Path(data.path)
    _require_readable(path)
    if data.split.by == "folder" and data.format != "folder":
        raise InputError(f"data.split.by=folder takes data.format=folder, not {data.format}: use fraction or none")
    source: Source = READERS[data.format](path, data)
    if not len(source.names):
        odd = min(source.strays.items(), default=None)
        why = f" that can be read: {escaped(path / odd[0])} {odd[1]}" if odd else ""
        raise InputError(f"data.path={path} holds no images{why}")
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


def _require_readable(path: Path) -> None:
    """Raises InputError unless a folder or a regular file is there."""
    if not is_utf8(str(path)):
        raise InputError(f"data.path={escaped(path)} is not UTF-8: rename it")
    try:
        kind = kind_of(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"data.path={path} does not exist: name the folder or file that holds the images") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if kind not in ("", "a folder"):
        raise InputError(f"data.path={path} is {kind}: name the folder or file that holds the images")
