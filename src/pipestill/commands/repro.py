"""Run `dvc repro`, and run it again each time a stage stopped at its time limit with its state saved (exit 75).

What follows the command's own options goes to dvc repro.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipestill import config, started, tools
from pipestill.arguments import count
from pipestill.errors import Stopped, SurroundingsError
from pipestill.progress import say
from pipestill.started import FILE

EXAMPLES = """\
  pipestill repro
  pipestill repro --attempts 50 -- distill@student-4 --force
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attempts", type=count, default=20, metavar="N", help="run dvc repro at most N times (20)")
    parser.add_argument("rest", nargs="*", metavar="ARGUMENT", help="for dvc repro: stages, or its options after --")


def main(options: argparse.Namespace) -> int:
    # all attempts are one run: none may go on with parameters that were edited meanwhile
    kept = {started.PARAMS: str(started.keep(config.text_of(FILE)))} if FILE.is_file() else {}
    for attempt in range(1, options.attempts + 1):
        code, stopped = tools.dvc_repro(Path.cwd(), [*options.rest, *(["--quiet"] if options.quiet else [])], kept)
        if code == 0:
            return 0
        if not stopped:
            raise SurroundingsError("dvc repro failed: the stage's own message stands above")
        if attempt < options.attempts:
            say(f"a stage stopped with its state saved; attempt {attempt + 1} goes on from there")
    raise Stopped(f"stopped with its state saved after {options.attempts} attempts: start it again")
