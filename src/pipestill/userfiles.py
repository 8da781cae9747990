"""Reading files that users provide: only regular files, so that no named pipe or device blocks, and printable names.

May open what it is asked for; writes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from pipestill.errors import InputError, PipestillError, SurroundingsError

# failures of the machine or the file system, which say nothing about the file
OF_THE_SURROUNDINGS = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFile(OSError):
    """A folder, named pipe, socket or device where a file was expected."""

    def __init__(self, path: Path, mode: int) -> None:
        super().__init__(errno.EINVAL, f"it is {kind_of(mode) or 'no regular file'}, not a file", str(path))


def kind_of(mode: int) -> str:
    """What an entry is that is no regular file, in words; empty for a regular file."""
    return "" if stat.S_ISREG(mode) else next((words for test, words in _KINDS if test(mode)), "a special file")


def open_file(path: Path) -> BufferedReader:
    """Opens a regular file for reading, without ever waiting for a writer. Raises OSError, NotAFile among them."""
    _require_file(path, path.stat().st_mode)  # before it is opened: opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_file(path, os.fstat(descriptor).st_mode)  # it may have been replaced in between
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_file(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFile(path, mode)


def read_text(path: Path) -> str:
    """A user's text file, UTF-8. Raises OSError, and UnicodeDecodeError (a ValueError) for other bytes."""
    with open_file(path) as file:
        return file.read().decode("utf-8-sig").replace("\r\n", "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copies a regular file. Raises what `unreadable` says if the source cannot be read, OSError for the target."""
    try:
        file = open_file(source)
    except OSError as error:
        raise unreadable(source, error) from error
    with file, target.open("wb") as copy:
        while True:
            try:
                block = file.read(1 << 20)
            except OSError as error:
                raise unreadable(source, error) from error
            if not block:
                return
            copy.write(block)


def is_there(path: Path) -> bool:
    """Whether a regular file is at `path`. Raises InputError for anything else there, or if it cannot be told."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(f"{escaped(path)} is a link to nothing: remove it or restore its target") from None
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{escaped(path)} is {kind_of(mode)}: a file was expected there")
    return True


def unreadable(path: str | Path, error: OSError) -> PipestillError:
    """The one line about a file that cannot be read: an InputError, or a SurroundingsError if the machine failed."""
    if error.errno in OF_THE_SURROUNDINGS:
        return SurroundingsError(f"{escaped(path)} could not be read ({error.strerror}): try again")
    return InputError(f"{escaped(path)} cannot be read ({error.strerror or error})")


def escaped(name: str | Path) -> str:
    """A name that prints on one line: backslash escapes for control characters and for bytes that are not UTF-8."""
    text = str(name)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    """`\\xff` for a byte that is not UTF-8 (which Python holds as a lone surrogate), `\\n` and the like for others."""
    if 0xDC80 <= ord(char) <= 0xDCFF:
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8; those of files may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
