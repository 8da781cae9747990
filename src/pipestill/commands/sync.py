"""Let Snakemake accept what `dvc repro`, `dvc pull`, `dvc checkout` or a stage run by hand brought.

The same check as for record: only artefacts that their stages would make from what lies there now are accepted, with
all that they come from; Snakemake runs the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipestill import pipeline, tools
from pipestill.progress import say
from pipestill.standing import Standing

EXAMPLES = """\
  dvc pull && pipestill sync
  pipestill sync && snakemake --profile local
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(options: argparse.Namespace) -> None:
    stages = pipeline.load(Path.cwd())
    sync(stages)


def sync(stages: pipeline.Pipeline) -> list[str]:
    """Touches what stands, so that Snakemake's times and parameter records agree; returns the stages' addresses."""
    standing = Standing(stages)
    standing.examine(tools.unrecorded(stages.root, [stage.address for stage in standing.current()]))
    current = standing.current()
    kept = {stage.address for stage in current}
    for stage in stages.stages:
        if stage.address not in kept and not standing.missing(stage):
            say(f"left to run: {stage.address}: {standing.problem(stage) or 'what it comes from has to run'}")
    if current:
        # what a killed Snakemake left marked as incomplete has just been checked
        tools.snakemake(stages, "--touch", "--forceall", "--ignore-incomplete", *(stage.manifest for stage in current))
    say(f"{len(current)} of {len(stages.stages)} stages are up to date for Snakemake")
    return [stage.address for stage in current]
