"""Delete or archive what no entry of params.yaml refers to: artefacts, metrics, logs, and unfinished work.

It lists everything with its size and asks; without a terminal it only lists, unless --yes is given. What a stage is
writing, and what pipestill did not make, is left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipestill import leftovers, pipeline
from pipestill.errors import InputError
from pipestill.leftovers import Leftover
from pipestill.pipeline import Pipeline
from pipestill.progress import say, warn
from pipestill.work import runs_root

EXAMPLES = """\
  pipestill clean                                   # list, then ask
  pipestill clean artifacts/models/student-10       # only this one
  pipestill clean --archive /data/earlier           # move instead of deleting
  pipestill clean --yes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", metavar="PATH", help="only what lies at or below these paths")
    parser.add_argument("--archive", type=Path, metavar="DIR", help="move everything into DIR instead of deleting it")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def main(options: argparse.Namespace) -> None:
    stages = pipeline.load(Path.cwd())
    found = _chosen(leftovers.find(stages, runs_root()), options.paths)
    if not found:
        say("nothing to clean: params.yaml refers to everything that is here")
        return
    targets = _targets(found, options.archive, stages) if options.archive is not None else {}
    sizes = {item: item.size() for item in found}
    for item, size in sizes.items():
        shown = item.path.relative_to(stages.root) if item.path.is_relative_to(stages.root) else item.path
        print(f"{readable(size):>8}  {shown}  ({item.what})")
    if not options.yes and not _agreed(_total(sizes), options.archive):
        return
    free = {item.path for item in leftovers.find(stages, runs_root())}
    for item in found:
        if item.path not in free:  # a stage has started meanwhile
            warn(f"{item.path} is in use now, and is left alone")
            del sizes[item]
        elif item in targets:
            targets[item].parent.mkdir(parents=True, exist_ok=True)
            shutil.move(item.path, targets[item])
        elif item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink()
    say(f"{'moved' if targets else 'deleted'} {_total(sizes)}")


def _total(sizes: Mapping[Leftover, int]) -> str:
    return f"{len(sizes)} {'item' if len(sizes) == 1 else 'items'}, {readable(sum(sizes.values()))}"


def _agreed(total: str, archive: Path | None) -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        more = "delete them, or --archive DIR --yes to move them" if archive is None else f"move them to {archive}"
        say(f"{total}: nothing was changed; add --yes to {more}")
        return False
    try:
        answer = input(f"{'Delete' if archive is None else 'Move'} {total}? [y/N] ")
    except EOFError:  # Ctrl-D
        answer = ""
        print()
    if answer.strip().lower() in ("y", "yes"):
        return True
    say("nothing was changed")
    return False


def _chosen(found: list[Leftover], paths: Sequence[str]) -> list[Leftover]:
    """What lies at or below the given paths. Raises InputError for a path where nothing does."""
    if not paths:
        return found
    wanted = [Path(os.path.abspath(path)) for path in paths]
    for path, place in zip(paths, wanted, strict=True):
        if not any(item.path.absolute().is_relative_to(place) for item in found):
            raise InputError(f"there is nothing to clean at or below {path}: pipestill clean lists what there is")
    return [item for item in found if any(item.path.absolute().is_relative_to(place) for place in wanted)]


def _targets(found: list[Leftover], archive: Path, stages: Pipeline) -> dict[Leftover, Path]:
    """Where each item goes. Raises InputError where something is there already, or pipestill would find it again."""
    where = Path(os.path.abspath(archive))
    for item in found:
        if where.is_relative_to(item.path.absolute().parent) and where != stages.root and item.path.is_dir():
            raise InputError(
                f"--archive {archive} lies in {item.path.parent}, which is being cleaned: name another folder"
            )
    targets = {item: where / item.name for item in found}
    for target in targets.values():
        if os.path.lexists(target):
            raise InputError(f"{target} exists already, and an archive replaces nothing: name another folder")
    return targets


def readable(count: int) -> str:
    """A number of bytes."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
