"""Colour, on a terminal only: not in pipes and logs, and not where NO_COLOR is set (no-color.org)."""

from __future__ import annotations

import os
from typing import TextIO

COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34"}


def coloured(text: str, colour: str | None, stream: TextIO) -> str:
    """The text in a colour, if the stream is a terminal that shows colours and nobody minds."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if colour is None or plain else f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"
