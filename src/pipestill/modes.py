"""Modes of files: what libraries make through temporary files of mode 0600 gets the mode that a new file has there.

It changes modes below the place that it is given, and nothing else.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path


def follow_umask(place: Path) -> None:
    """Gives a file, or everything below a folder, the mode that the umask or a default ACL gives to new files there.

    The set-group-ID bit of folders is inherited in the same way. Files of other users are left as they are.
    """
    folder = place if place.is_dir() else place.parent
    file_mode, folder_mode = _new_modes(folder)
    for path in [*place.rglob("*")] if place.is_dir() else [place]:
        found = path.lstat()
        wanted = {stat.S_IFREG: file_mode, stat.S_IFDIR: folder_mode}.get(stat.S_IFMT(found.st_mode))
        if wanted is not None and stat.S_IMODE(found.st_mode) != wanted and found.st_uid == os.geteuid():
            path.chmod(wanted)


def _new_modes(folder: Path) -> tuple[int, int]:
    """The modes that a new file and a new folder have in a folder, seen from ones made for it."""
    probe = folder / f".{uuid.uuid4().hex}.probe"
    probe.touch(0o666)
    file_mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    probe.mkdir()
    folder_mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return file_mode, folder_mode
