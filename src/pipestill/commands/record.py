"""Let DVC record what was finished outside `dvc repro`: by Snakemake, or by hand.

Each stage's artefact is checked against the stage as resolved now (version, parameters, payload digests of its
inputs), and only those that stand are committed. Inside a DVC stage this does nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipestill import pipeline, tools
from pipestill.progress import say, warn
from pipestill.standing import Standing

EXAMPLES = """\
  pipestill record
  pipestill record --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be recorded, and record nothing")


def main(options: argparse.Namespace) -> None:
    if "DVC_STAGE" in os.environ:
        say("inside a DVC stage: DVC records by itself")
        return
    stages = pipeline.load(Path.cwd())
    record(stages, dry_run=options.dry_run)


def record(stages: pipeline.Pipeline, *, dry_run: bool = False) -> list[str]:
    """Commits what stands and is not recorded yet; returns the stages' addresses. Raises SurroundingsError."""
    standing = Standing(stages)
    sound = []
    for stage in stages.stages:
        if standing.missing(stage):
            continue
        problem = standing.problem(stage) or _strangers(stages, stage) or _unready(standing, stage)
        if problem is None:
            sound.append(stage.address)
        else:
            warn(f"not recorded: {stage.address}: {problem}")
    new = tools.unrecorded(stages.root, sound)
    standing.examine(new)
    for stage in stages.stages:
        if stage.address in new and standing.problem(stage) is not None:
            warn(f"not recorded: {stage.address}: {standing.problem(stage)}")
            new.remove(stage.address)
    if new and not dry_run:
        tools.commit(stages, new)
    if new:
        say(f"{'would record' if dry_run else 'recorded'} {len(new)}: {' '.join(new)}")
    else:
        say(f"all {len(sound)} finished stages are recorded")
    return new


def _unready(standing: Standing, stage: pipeline.Stage) -> str | None:
    """DVC would sign the report with the parameters of every model and run, so all of these must be up to date."""
    if len(stage.parameters) > 1:
        for source in standing.pipeline.upstream(stage):
            if standing.missing(source) or standing.problem(source) is not None:
                return f"{source.address} is not up to date"
    return None


def _strangers(stages: pipeline.Pipeline, stage: pipeline.Stage) -> str | None:
    """DVC counts whole folders as the report's inputs: what no stage makes any more would be signed with them."""
    strangers = stages.strangers(stage)
    if not strangers:
        return None
    which = f"{', '.join(strangers)} {'belongs' if len(strangers) == 1 else 'belong'} to no stage of dvc.yaml any more"
    return f"{which}: pipestill clean deletes or archives what pipestill made there"
