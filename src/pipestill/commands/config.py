"""Compose parameters from conf/ with Hydra, check them, and write params.yaml.

GROUP=CHOICE picks a file of conf/, KEY=VALUE sets a parameter. Each call starts from conf/ again: repeat all that
belongs to an experiment, or edit params.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipestill import config, configure, outputs, project
from pipestill.config import Params
from pipestill.errors import InputError
from pipestill.outputs import Kind, Written
from pipestill.progress import say, warn

EXAMPLES = """\
  pipestill config experiment=digits
  pipestill config --estimate
  pipestill config experiment=digits_long distillation.students.student-4-a.generator_lr=1e-4
"""
OUTPUT = Path("params.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="GROUP=CHOICE, or a parameter (see below)")
    parser.add_argument("--output", type=Written(_output), default=OUTPUT, metavar="FILE", help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite edits that this command did not make")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--print", action="store_true", help="print instead of writing")
    other.add_argument("--check", action="store_true", help="check the file as it is, and write nothing")
    other.add_argument("--estimate", action="store_true", help="say how long what is to run will take on this machine")
    parser.add_argument("--stages", nargs="+", help=argparse.SUPPRESS)  # those that a running Snakemake is to make
    other.add_argument("--schema", action="store_true", help="print the JSON schema of params.yaml")
    other.add_argument("--docs", action="store_true", help="print the table of all parameters as Markdown")


def _output(options: argparse.Namespace) -> Kind | None:
    only_read = options.print or options.estimate or options.check or options.schema or options.docs
    return None if only_read else outputs.PARAMETERS


def _refuse_what_is_ignored(options: argparse.Namespace) -> None:
    """Raises InputError for words that would change nothing."""
    for mode in ("estimate", "schema", "docs"):
        if getattr(options, mode) and options.overrides:
            raise InputError(
                f"--{mode} takes no {options.overrides[0]}"
                + (": write params.yaml with it first, then estimate" if mode == "estimate" else "")
            )
    for mode in ("print", "check", "estimate", "schema", "docs"):
        if getattr(options, mode) and options.force:
            raise InputError(f"--{mode} writes nothing: leave --force out")
        if getattr(options, mode) and mode != "check" and options.output != OUTPUT:
            raise InputError(f"--{mode} writes and reads no {options.output}: leave --output out")


def main(options: argparse.Namespace) -> None:
    _refuse_what_is_ignored(options)
    shown = project.shown(options.output, options.stood)
    if options.schema:
        print(configure.schema(), end="")
    elif options.docs:
        from pipestill import parameter_docs

        print(parameter_docs.page(), end="")
    elif options.estimate:
        for line in _estimated(options.stages):
            print(line, flush=True)
    elif options.check:
        config.load(options.output, options.overrides, whole=True)
        say(f"{shown} is in order")
    else:
        params = configure.compose(options.overrides)
        text = configure.render(params, options.overrides)
        if options.print:
            print(text, end="")
            return
        if configure.write(options.output, text, force=options.force):
            say(f"wrote {shown}: {_summary(params)}")
        else:
            say(f"{shown} says this already: {_summary(params)}")
        if params.example is None and not Path(params.data.path).exists():
            warn(f"data.path={params.data.path} is not there yet")


def _estimated(addresses: Sequence[str] | None) -> Iterator[str]:
    """How long these stages will take, or all that are not up to date."""
    from pipestill import pipeline, planning, started

    stages = started.restored(Path.cwd()) or pipeline.load(Path.cwd())
    wanted = planning.to_run(stages) if addresses is None else [s for s in stages.stages if s.address in addresses]
    if wanted:
        yield from planning.lines(stages, wanted)
    else:
        say("nothing to run: all stages are up to date")


def _summary(params: Params) -> str:
    """What the parameters are about, in one line."""
    students, runs = len(params.distillation.students), len(params.sampling.runs)
    return f"{params.report.title}, images of {params.data.path}, {students} students, {runs} runs"
