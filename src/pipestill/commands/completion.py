"""Print a completion script for a shell: commands, options, their choices, files and folders, choices of conf/.

It needs shtab, which comes with DVC.
"""

from __future__ import annotations

import argparse

from pipestill import cli, configure, running
from pipestill.errors import InputError
from pipestill.project import PATHS

EXAMPLES = """\
  pipestill completion bash > ~/.local/share/bash-completion/completions/pipestill
  pipestill completion zsh > ~/.zfunc/_pipestill      # a folder of $fpath
  pipestill completion fish > ~/.config/fish/completions/pipestill.fish
"""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="for which shell")


def main(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise InputError(f"completion needs shtab ({error}): pip install 'pipestill[workflow]'") from None
    print(shtab.complete(_whole_parser(shtab), options.shell))


def _whole_parser(shtab: object) -> argparse.ArgumentParser:
    """One parser for all subcommands, with what shtab has to know of paths and choices."""
    parser = argparse.ArgumentParser(prog="pipestill")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, text in cli.COMMANDS.items():
        command = commands.add_parser(name, help=text)
        running.add_arguments(command, running.module_of(name))
        for action in command._actions:
            if action.metavar in PATHS:
                action.complete = getattr(shtab, "DIRECTORY" if action.metavar == "DIR" else "FILE")  # type: ignore[attr-defined]
            if action.dest == "overrides" and name == "config":
                action.choices = _choices()
    return parser


def _choices() -> list[str]:
    """GROUP=CHOICE for every file of conf/."""
    return sorted(f"{file.parent.name}={file.stem}" for file in configure.conf_folder().glob("*/*.yaml"))
