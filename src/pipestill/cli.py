"""The command line: one subcommand a stage, and those that look after the pipeline.

Imports nothing heavy before a subcommand is chosen, so that `--help` answers at once; `running.py` does the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pipestill import __version__
from pipestill.errors import InputError, nearest
from pipestill.surroundings import in_utf8, open_streams

COMMANDS = {
    "example": "write an embedded data set as a folder of PNGs by class",
    "fetch": "bring outside files at a pinned revision, checked",
    "dataset": "validate images and build an LMDB store",
    "reference": "statistics, classifier and real-against-real floors",
    "convert": "make a model of NVIDIA's pickle or a DMD2 checkpoint",
    "train": "train a teacher",
    "tune": "choose each sampler's sigma range on the validation part",
    "distill": "distil a few-step student with DMD2",
    "sample": "sample images, sharded over ranks",
    "evaluate": "measure a run's images against the reference",
    "report": "one self-contained page with tables, curves and pictures",
    "bench": "measure a training over ranks, and where its time goes",
    "export": "hand a model over: a Diffusers folder with a model card",
    "config": "compose parameters and write params.yaml",
    "record": "let DVC record what Snakemake finished",
    "sync": "let Snakemake accept what DVC brought",
    "repro": "dvc repro that goes on after a time limit",
    "clean": "delete or archive what params.yaml no longer refers to",
    "trace": "print the chain from a figure back to the images",
    "status": "which stages are done, running, stopped, and how far they are",
    "completion": "print a completion script for bash, zsh or fish",
    "doctor": "check this installation and this project",
}
LIGHT = (
    "config",
    "record",
    "sync",
    "repro",
    "clean",
    "trace",
    "status",
    "doctor",
    "completion",
    "report",
    "example",
    "fetch",
)  # do no arithmetic
EXIT_CODES = (
    "exit codes: 0 done, or nothing to do; 75 stopped with its state saved, start it again; "
    "2 the input is wrong; 3 the surroundings failed; anything else is a bug"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    if argv is None:
        open_streams()
        in_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        from pipestill import logs

        line = f"pipestill: there is no command '{arguments[0]}'{nearest(arguments[0], COMMANDS)}"
        logs.say_outcome(line, wrong=True)
        return InputError.exit_code
    if not arguments or arguments[0] not in COMMANDS:
        parser = _top_level()
        parser.parse_args(arguments)
        parser.print_help()
        return 0 if not arguments else 2
    if arguments[0] not in LIGHT:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pipestill import running

    return running.main(arguments[0], arguments[1:])


def stages() -> tuple[str, ...]:
    return (
        "example",
        "fetch",
        "dataset",
        "reference",
        "convert",
        "train",
        "tune",
        "distill",
        "sample",
        "evaluate",
        "report",
    )


def _top_level() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pipestill",
        usage="pipestill COMMAND ...",
        description="Distil a diffusion model into a few-step student, with measured quality.",
        epilog=f"commands:\n{listing}\n\nexamples:\n  pipestill config experiment=digits\n"
        f"  pipestill train --help\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pipestill {__version__}")
    return parser
