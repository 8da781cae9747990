"""Running one subcommand: its parser, where it is run, and its outcome as an exit code and one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType

from pipestill import cli, launch, logs, outputs, project, slurm, started, surroundings
from pipestill.arguments import GRAMMAR, Parser
from pipestill.errors import InputError, PipestillError, Stopped, SurroundingsError, denied
from pipestill.progress import quiet
from pipestill.stopping import STOPPED, StopRequest

MISPLACED = (FileExistsError, NotADirectoryError, IsADirectoryError)
LOST_PEER = ("onnection closed by peer", "onnection reset by peer")  # in what gloo raises


def main(name: str, arguments: list[str]) -> int:
    """Runs the subcommand; returns its exit code."""
    surroundings.prepare()
    if launch.is_rank():
        launch.die_with_launcher()
        launch.watch_siblings()
        logs.keep_own(int(os.environ["RANK"]))
    return _leave(name, *_guarded(name, arguments))


def _leave(name: str, code: int, message: str) -> int:
    """Says how the command ended to whoever wants to know."""
    if message and not launch.is_collected():
        logs.say_outcome(f"pipestill {name}: {message}", wrong=code == InputError.exit_code)
    if code == Stopped.exit_code and STOPPED in os.environ:
        Path(os.environ[STOPPED]).touch()
    launch.leave_outcome(code, message)
    return code


def _guarded(name: str, arguments: list[str]) -> tuple[int, str]:
    """Runs the subcommand and turns what it raises into a code and one line; a bug shows its traceback."""

    def leave(reason: str) -> None:
        os._exit(_leave(name, Stopped.exit_code, f"stopped by {reason}: start it again"))

    try:
        with StopRequest().listening(leave=leave):
            return _chosen(name, arguments)
    except PipestillError as error:
        return error.exit_code, str(error)
    except OSError as error:
        if error.errno == errno.EPIPE and (left := [number for number in (1, 2) if _reader_left(number)]):
            for number in left:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # what is still buffered goes there
            return 128 + signal.SIGPIPE, ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            where = f" ({error.filename})" if error.filename else ""
            return (
                SurroundingsError.exit_code,
                f"{error.strerror}{where}: free some space or repair the disk, then go on",
            )
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


def _chosen(name: str, arguments: list[str]) -> tuple[int, str]:
    module = module_of(name)
    parser = parser_of(name, module)
    held = started.by_dvc() if name in cli.stages() and not launch.is_rank() else None
    outcome = _run(module, parser, arguments)
    if held is not None and outcome[0] == 0:
        held.check(ended=True)
    sys.stdout.flush()
    return outcome


def _reader_left(number: int) -> bool:
    """Whether whoever read the standard output (1) or errors (2) has closed it, as `| head` does."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(module: ModuleType, parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[int, str]:
    """Parses and runs, at the project's root."""
    options = parser.parse_args(arguments)
    stood = project.here()
    root = project.root_of(stood)
    options.stood = stood
    if root != stood:
        project.from_root(parser, options, stood, root)
        arguments = project.words_of(parser, options)
    with contextlib.chdir(root), quiet(options.quiet):
        return _run_at_root(module, parser, options, arguments)


def _run_at_root(
    module: ModuleType, parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str]
) -> tuple[int, str]:
    """A stage that wants several ranks is launched again under torchrun's agent."""
    if not launch.is_rank():
        outputs.check_options(parser, options)
    deadline = getattr(options, "deadline_min", None)
    if deadline is not None and "PIPESTILL_DEADLINE" not in os.environ:
        import time

        os.environ["PIPESTILL_DEADLINE"] = str(time.time() + 60 * deadline)
    if parser.prog.split()[-1] in cli.stages() and not launch.is_rank():
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


def module_of(name: str) -> ModuleType:
    """The module of a subcommand."""
    return importlib.import_module(f"pipestill.{'stages' if name in cli.stages() else 'commands'}.{name}")


def add_arguments(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Adds a subcommand's own arguments, and those of every subcommand."""
    module.add_arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print only warnings and errors")


def parser_of(name: str, module: ModuleType) -> Parser:
    """The parser of a subcommand."""
    parser = Parser(
        prog=f"pipestill {name}",
        description=(module.__doc__ or cli.COMMANDS[name]).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, module)
    grammar = f"\n{GRAMMAR}" if any(action.dest == "overrides" for action in parser._actions) else ""
    parser.epilog = f"examples:\n{module.EXAMPLES.rstrip()}\n{grammar}\n{cli.EXIT_CODES}"
    return parser
