"""Where what a stage prints is kept: a folder for each entry below `$PIPESTILL_RUNS/logs`, a file an attempt and rank.

`workflow/scripts/attempt.sh` writes the attempts' own; ranks other than the leader write theirs beside them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipestill.status import LOG
from pipestill.terminal import coloured

WRONG = "PIPESTILL_WRONG"  # variable: the file in which attempt.sh wants to find what is wrong with an input


@dataclass(frozen=True)
class Ended:
    """How the last attempt at a stage ended."""

    time: float  # Unix seconds
    code: int
    said: str  # its last line
    log: Path | None


def folder(runs: Path, stage: str, entry: str | None) -> Path:
    """Where the logs of a stage's entry lie."""
    return runs / "logs" / stage / (entry or "all")


def attempts(place: Path) -> list[Path]:
    """The logs of attempts, oldest first; those of ranks are not among them."""
    return sorted(path for path in place.glob("*.log") if "-rank-" not in path.name)


def last(place: Path) -> Ended | None:
    """How the last attempt ended; None where none did."""
    try:
        code, time = int((place / "outcome").read_text(encoding="utf-8")), (place / "outcome").stat().st_mtime
    except (OSError, ValueError):
        return None
    found = attempts(place)
    log = found[-1] if found else None
    text = log.read_text(encoding="utf-8", errors="replace") if log else ""
    said = [line for line in text.splitlines() if line.strip()]
    return Ended(time, code, said[-1] if said else "it said nothing", log)


def say_outcome(line: str, *, wrong: bool) -> None:
    """Prints how a command failed; what is wrong with an input is left to attempt.sh, where that asks for it."""
    if wrong and WRONG in os.environ:
        with suppress(OSError):
            Path(os.environ[WRONG]).write_text(f"{line}\n", encoding="utf-8")
            return
    print(coloured(line, "red", sys.stderr), file=sys.stderr)


def keep_own(rank: int) -> None:
    """Sends what a rank other than the leader prints to a file of its own, libraries' lines included."""
    prefix = os.environ.get(LOG)
    if prefix is None or rank == 0:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    path = of_rank(prefix, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def of_rank(prefix: str, rank: int) -> Path:
    """The log of a rank other than the leader, beside its attempt's."""
    return Path(f"{prefix}-rank-{rank}.log")
