"""The command line: one subcommand a stage, and those that look after the pipeline.

Imports nothing heavy before a subcommand is chosen, so that `--help` answers at once; turns every outcome into the
exit codes that the documentation promises.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from pipestill import __version__, launch, logs, outputs, slurm, started, surroundings
from pipestill.arguments import GRAMMAR, Parser
from pipestill.errors import InputError, PipestillError, Stopped, SurroundingsError, denied, nearest
from pipestill.stopping import STOPPED

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
    "doctor": "check this installation and this project",
}
MISPLACED = (FileExistsError, NotADirectoryError, IsADirectoryError)
LOST_PEER = ("onnection closed by peer", "onnection reset by peer")  # in what gloo raises
EXIT_CODES = (
    "exit codes: 0 done, or nothing to do; 75 stopped with its state saved, start it again; "
    "2 the input is wrong; 3 the surroundings failed; anything else is a bug"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    if argv is None:
        surroundings.in_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        line = f"pipestill: there is no command '{arguments[0]}'{nearest(arguments[0], COMMANDS)}"
        logs.say_outcome(line, wrong=True)
        return InputError.exit_code
    if not arguments or arguments[0] not in COMMANDS:
        parser = _top_level()
        parser.parse_args(arguments)
        parser.print_help()
        return 0 if not arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in (
        "config",
        "record",
        "sync",
        "repro",
        "clean",
        "trace",
        "status",
        "doctor",
        "report",
        "example",
        "fetch",
    ):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    surroundings.prepare()
    if launch.is_rank():
        launch.die_with_launcher()
        launch.watch_siblings()
        logs.keep_own(int(os.environ["RANK"]))
    code, message = _guarded(name, rest)
    if message and not launch.is_collected():
        logs.say_outcome(f"pipestill {name}: {message}", wrong=code == InputError.exit_code)
    if code == Stopped.exit_code and STOPPED in os.environ:
        Path(os.environ[STOPPED]).touch()
    launch.leave_outcome(code, message)
    return code


def _guarded(name: str, arguments: list[str]) -> tuple[int, str]:
    """Runs the subcommand and turns what it raises into a code and one line; a bug shows its traceback."""
    try:
        package = "stages" if name in _stages() else "commands"
        module = importlib.import_module(f"pipestill.{package}.{name}")
        parser = _parser(name, module)
        held = started.by_dvc() if name in _stages() and not launch.is_rank() else None
        outcome = run(module, parser, arguments)
        if held is not None and outcome[0] == 0:
            held.check(ended=True)
        sys.stdout.flush()
        return outcome
    except PipestillError as error:
        return error.exit_code, str(error)
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
            return 128 + signal.SIGPIPE, ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            where = f" ({error.filename})" if error.filename else ""
            return SurroundingsError.exit_code, f"{error.strerror}{where}: free some space or mend it, then go on"
        if isinstance(error, PermissionError) and error.filename:
            return InputError.exit_code, str(denied(Path(os.fsdecode(error.filename))))
        if isinstance(error, MISPLACED) and error.filename:
            return InputError.exit_code, f"{error.filename}: {error.strerror}: name another place, or make room there"
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        lost = any(sign in str(error) for sign in LOST_PEER)
        if lost or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
            return SurroundingsError.exit_code, f"{launch.LOST_ANOTHER}; its state is kept, start it again"
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"


def _reader_left() -> bool:
    """Whether whoever read the standard output has closed it, as `| head` does."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _stages() -> tuple[str, ...]:
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


def run(module: ModuleType, parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[int, str]:
    """Parses and runs; a stage that wants several ranks is launched again under torchrun's agent."""
    options = parser.parse_args(arguments)
    if not launch.is_rank():
        outputs.check_options(parser, options)
    deadline = getattr(options, "deadline_min", None)
    if deadline is not None and "PIPESTILL_DEADLINE" not in os.environ:
        import time

        os.environ["PIPESTILL_DEADLINE"] = str(time.time() + 60 * deadline)
    if parser.prog.split()[-1] in _stages() and not launch.is_rank():
        slurm.note_job()
    if hasattr(module, "spread") and not launch.is_rank():
        command = [parser.prog.split()[-1], *arguments]
        spread: launch.Spread = module.spread(options)
        if spread.ranks > 1:
            return launch.start(spread, command, entry=getattr(options, "name", None))
        if spread.image is not None:
            launch.within(spread.image, command)
    code = module.main(options)
    return int(code or 0), ""


def _parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"pipestill {name}",
        description=(module.__doc__ or COMMANDS[name]).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    grammar = f"\n{GRAMMAR}" if any(action.dest == "overrides" for action in parser._actions) else ""
    parser.epilog = f"examples:\n{module.EXAMPLES.rstrip()}\n{grammar}\n{EXIT_CODES}"
    return parser


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
