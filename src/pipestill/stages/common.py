"""What stages share: their command lines (parameter file, overrides, output, ranks, deadline), and work over ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import artifacts, config, previews, started
from pipestill.arguments import count, minutes
from pipestill.config import OperationParams, Params
from pipestill.config.runs import RankedStage
from pipestill.errors import InputError
from pipestill.launch import CONTAINER, Spread, is_rank
from pipestill.outputs import ArtifactKind, Written
from pipestill.progress import say, warn
from pipestill.work import open_work

DEFAULT = "experiment=digits"  # that of conf/config.yaml

if TYPE_CHECKING:
    from pipestill.artifacts import InputEntry
    from pipestill.diffusion.denoiser import Denoiser
    from pipestill.distributed import World
    from pipestill.networks.model import ModelCard
    from pipestill.training.curves import Curves
    from pipestill.training.loop import Training
    from pipestill.work import Work


def add_common(parser: argparse.ArgumentParser, *, makes: str | None = None, name: str | None = None) -> None:
    """Adds the shared arguments.

    `makes` is the kind of artefact that goes to --output, None if the stage has options of its own for what it writes;
    `name` describes the entry (teacher, student, run) that the stage works on.
    """
    if name:
        parser.add_argument("--name", required=True, metavar="NAME", help=name)
    if makes is not None:
        kind = Written(ArtifactKind(makes))
        parser.add_argument("--output", type=kind, required=True, metavar="DIR", help="where the artefact goes")
    parser.add_argument(
        "--params", type=Path, metavar="FILE", help="parameter file (default: params.yaml, else the packaged one)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="parameters to set, by full name (see below)")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds what stages that run over ranks share."""
    parser.add_argument("--ranks", type=count, metavar="N", help="processes (default: operation.ranks, else 1)")
    parser.add_argument(
        "--nodes", type=count, metavar="N", help="nodes of a Slurm job that share them (default: operation.nodes)"
    )
    add_deadline(parser)


def add_deadline(parser: argparse.ArgumentParser) -> None:
    """Adds the deadline of a stage that can stop and go on."""
    parser.add_argument(
        "--deadline-min", type=minutes, metavar="MIN", help="save, stop and exit 75 after so many minutes"
    )


def load_params(options: argparse.Namespace, *needs: str) -> Params:
    """The parameters that this call works with, checked.

    A stage that is run by hand reads one section, so it is not refused for what other stages need. DVC has no moment
    before its stages at which the whole could be checked, so under DVC each stage does it. Where parameters are
    composed, the sections in `needs` must be complete.
    """
    path, whole = options.params or started.parameters(), started.STAGE in os.environ
    if options.params is None and path == started.FILE and not path.exists():
        from pipestill import configure

        _say_packaged(options)
        return configure.compose(options.overrides, whole=whole, needs=needs)
    return config.load(path, options.overrides, whole=whole)


def _say_packaged(options: argparse.Namespace) -> None:
    """Says once for a command, and not on every rank, that no file of the user's decides its parameters."""
    if is_rank() or getattr(options, "said_packaged", False):
        return
    options.said_packaged = True
    named = [word for word in options.overrides if word.startswith("experiment=")]
    say(
        f"no params.yaml in {Path.cwd()} or above: using the packaged parameters ({(named or [DEFAULT])[-1]}); "
        "write your own with pipestill config"
    )


def spread_of(options: argparse.Namespace, stage: RankedStage) -> Spread:
    """How this call is to be started; an image only where this process is not in one yet."""
    operation = load_params(options).operation
    return Spread(
        ranks=options.ranks or operation.ranks.get(stage, 1),
        nodes=options.nodes or operation.nodes.get(stage, 1),
        image=None if CONTAINER in os.environ else operation.container,
    )


def entry(section: dict[str, config.Checked], name: str, where: str) -> config.Checked:
    """The named entry of a section. Raises InputError with the nearest name."""
    if name not in section:
        raise InputError(f"{where} has no entry '{name}' (there are: {', '.join(section) or 'none'})")
    return section[name]


@contextmanager
def work_over_ranks(
    *,
    kind: str,
    stage: str,
    version: int,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, InputEntry],
    output: Path,
    threads: int,
    operation: OperationParams,
) -> Iterator[tuple[World, Work]]:
    """Joins the ranks and opens their common work; where `work.done` is set, it is so on every rank.

    Raises SurroundingsError (another process holds the work, a rank is lost) and Stopped.
    """
    from pipestill import distributed

    with (
        distributed.world(
            device=operation.device, threads=threads, timeout=operation.timeout, margin=operation.margin
        ) as world,
        open_work(
            kind=kind,
            stage=stage,
            version=version,
            parameters=parameters,
            inputs=inputs,
            output=output,
            leader=world.leader,
            ranks=world.size,
        ) as work,
    ):
        if world.broadcast(work.done is not None):
            work.done = work.done or artifacts.read(work.output, kind)
            if world.leader:
                say(f"{output} is there and verifies: nothing to do")
        yield world, work


def run_training(
    training: Training,
    denoiser: Denoiser,
    card: ModelCard,
    work: Work,
    world: World,
    operation: OperationParams,
    *,
    name: str,
) -> Curves:
    """Runs a training to its end, with trackers on the leader and previews on all ranks; returns its curves."""
    from pipestill.sampling.preview import Previews
    from pipestill.training import following
    from pipestill.training.loop import run
    from pipestill.training.tracking import Silent, open_trackers

    if world.leader:
        following.describe(work, name, training.updates, card, denoiser.network)
        for warning in training.warnings:
            warn(f"{name}: {warning}")
        say(f"states: {work.folder}; to measure them as they are saved, see docs/stages/evaluate.md")
    follow = open_trackers(operation.trackers, work.folder, name, work.parameters) if world.leader else Silent()
    try:
        with ExitStack() as stack:
            preview = None
            if operation.preview.share > 0:
                folder = previews.folder(name, work.key)
                if world.leader:
                    say(f"previews: {folder}")
                made = Previews(
                    denoiser,
                    card,
                    training.ema,
                    operation.preview,
                    folder=folder,
                    tracker=follow,
                    world=world,
                    updates=training.updates,
                )
                preview = stack.enter_context(made)
            return run(
                training,
                work=work,
                world=world,
                operation=operation,
                label=f"{work.stage} {name}",
                tracker=follow,
                preview=preview,
            )
    finally:
        follow.close()


def summary_of(training: Training, **figures: float) -> dict[str, Any]:
    """A trained model's summary: its figures, and the training's warnings if there are any, for the report to show."""
    return figures | ({"warnings": training.warnings} if training.warnings else {})
