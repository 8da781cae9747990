"""Digests of bytes, files and plain values: the names by which artefacts and states know each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipestill.userfiles import open_file


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, floats by shortest representation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def of_value(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def of_bytes(data: bytes | memoryview) -> str:
    """SHA-256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 (hex) of a regular file's content. Raises OSError, also for a named pipe, a device or a folder."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
