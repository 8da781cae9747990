"""What every stage's command line shares: the parameter file, overrides, the output, ranks and the deadline."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipestill import config
from pipestill.config import Params
from pipestill.errors import InputError


def add_common(parser: argparse.ArgumentParser, *, output: bool = True, name: str | None = None) -> None:
    """Adds the shared arguments; `name` describes the entry (teacher, student, run) that the stage works on."""
    if name:
        parser.add_argument("--name", required=True, metavar="NAME", help=name)
    if output:
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the artefact goes")
    parser.add_argument(
        "--params", type=Path, metavar="FILE", help="parameter file (default: params.yaml, else the packaged one)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parameters to set, by full name")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds what stages that run over ranks share."""
    parser.add_argument("--ranks", type=_positive, metavar="N", help="processes (default: operation.ranks, else 1)")
    parser.add_argument(
        "--deadline-min", type=float, metavar="MIN", help="save, stop and exit 75 after so many minutes"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def load_params(options: argparse.Namespace) -> Params:
    """The parameters that this call works with, checked."""
    path = options.params or Path("params.yaml")
    if options.params is None and not path.exists():
        from pipestill import configure

        return configure.compose(options.overrides)
    return config.load(path, options.overrides)


def ranks_of(options: argparse.Namespace, stage: str) -> int:
    """How many ranks this call wants."""
    if options.ranks is not None:
        return int(options.ranks)
    return load_params(options).operation.ranks.get(stage, 1)  # type: ignore[call-overload,no-any-return]


def entry(section: dict[str, config.Checked], name: str, where: str) -> config.Checked:
    """The named entry of a section. Raises InputError with the nearest name."""
    if name not in section:
        raise InputError(f"{where} has no entry '{name}' (there are: {', '.join(section) or 'none'})")
    return section[name]
