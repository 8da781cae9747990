"""Listing the folders of a user: which entries are files to read, and what is odd about the others.

Odd entries (named pipes, sockets, devices, names that are not UTF-8, folders that cannot be read, link loops) are
collected with a reason and a printable name; none is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipestill.userfiles import OF_THE_SURROUNDINGS, escaped, is_utf8, kind_of, unreadable


@dataclass
class Strays:
    """Entries that are no image of any class: for each name, which prints on one line, its path and the reason."""

    paths: dict[str, Path] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, path: Path, reason: str) -> None:
        name = name if is_utf8(name) else escaped(name)
        self.paths[name], self.reasons[name] = path, reason

    def below(self, folder: str) -> str | None:
        """The reason of the first one in a folder, or of the folder itself; None without any."""
        mine = (name for name in sorted(self.reasons) if f"{name}/".startswith(f"{folder}/"))
        return next((self.reasons[name] for name in mine), None)


class Lister:
    """Lists folders below `root`; names are relative to it, sorted, without those that begin with a dot."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.strays = Strays()

    def children(self, below: str = "") -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder. Raises SurroundingsError."""
        folders: list[str] = []
        files: list[str] = []
        where = self._root / below
        prefix = f"{below}/" if below else ""
        try:
            with os.scandir(where) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            self._unreadable(below, where, error)
            return [], []
        for entry in visible:
            path = where / entry.name
            if not is_utf8(entry.name):
                self.strays.add(prefix + entry.name, path, "has a name that is not UTF-8")
            else:
                self._sort(prefix + entry.name, entry, folders, files)
        return sorted(folders), sorted(files)

    def _sort(self, name: str, entry: os.DirEntry[str], folders: list[str], files: list[str]) -> None:
        """Puts an entry among folders or files, or among the strays."""
        path = Path(entry.path)
        try:
            if entry.is_file(follow_symlinks=False):  # mostly known without asking the file system
                files.append(entry.name)
                return
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
                return
            mode = path.stat().st_mode
        except FileNotFoundError:  # a dead link, or gone since the folder was listed: reading it will say so
            files.append(path.name)
        except OSError as error:
            self._unreadable(name, path, error)
        else:
            kind = kind_of(mode)
            if not kind:
                files.append(path.name)
            elif kind == "a folder":
                folders.append(path.name)
            else:
                self.strays.add(name, path, f"is {kind}")

    def _unreadable(self, name: str, path: Path, error: OSError) -> None:
        if error.errno in OF_THE_SURROUNDINGS:
            raise unreadable(path, error) from error
        self.strays.add(name or ".", path, f"cannot be read ({error.strerror})")

    def walk(self, below: str = "") -> Iterator[str]:
        """Every visible file below a folder. A link to a folder that contains it is a stray."""
        return self._walk(below, tuple(os.path.realpath(self._root / parent) for parent in Path(below).parents))

    def _walk(self, below: str, above: tuple[str, ...]) -> Iterator[str]:
        """The same, where `above` are the real paths of the folders from `root` on that it lies in."""
        here = os.path.realpath(self._root / below)
        if any(f"{place}/".startswith(f"{here}/") for place in above):
            self.strays.add(below, self._root / below, "is a link to a folder that contains it")
            return
        folders, files = self.children(below)
        prefix = f"{below}/" if below else ""
        yield from (prefix + name for name in files)
        for name in folders:
            yield from self._walk(prefix + name, (*above, here))
