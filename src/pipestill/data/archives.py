"""Zip archives (npz files too) that users provide: what reading one raises, and whose fault that is."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from pathlib import Path

from pipestill.errors import InputError, PipestillError
from pipestill.userfiles import OF_THE_SURROUNDINGS, unreadable

# what zipfile raises for damaged, encrypted or unknown content
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    OSError,
)


def of_the_machine(error: Exception) -> bool:
    """Whether reading failed for a reason that says nothing about the file."""
    return isinstance(error, OSError) and error.errno in OF_THE_SURROUNDINGS


def damaged(path: Path, kind: str, error: Exception) -> PipestillError:
    """The one line about an archive that raised one of `DAMAGED`; a SurroundingsError if the machine failed."""
    if isinstance(error, OSError) and of_the_machine(error):
        return unreadable(path, error)
    return InputError(f"{path} is no {kind} that can be read ({error}): copy it again")
