"""Options of every subcommand: their order, what they expect, and unknown ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipestill import cli, outputs, running
from pipestill.arguments import Parser
from pipestill.errors import InputError


def parser_of(name: str) -> Parser:
    return running.parser_of(name, running.module_of(name))


def typed() -> Iterator[tuple[str, str]]:
    for name in cli.COMMANDS:
        for action in parser_of(name)._actions:
            if action.type not in (None, str, Path) and action.metavar not in outputs.PATHS:
                yield name, action.option_strings[-1]


@pytest.mark.parametrize(("name", "option"), sorted(typed()))
def test_every_typed_option_says_what_it_expects(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, option, "two"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pipestill {name}: argument {option}: expects ")
    assert said.count("\n") == 1
    for wrong in ("0.5", "nan", "-1", "", "²", "1e999"):
        with pytest.raises(InputError):
            parser_of(name).parse_args([f"{option}={wrong}", "--help"] if wrong != "0.5" else [option, "0.5.1"])


def test_overrides_stand_anywhere_among_options() -> None:
    needed = ["--name", "x", "--model", "m", "--sigmas=s"]
    words = ["a.b=1", *needed, "c.d=2", "~e.f", "--output", "y", "g=3", "--ranks", "2", "h=4"]
    found = parser_of("sample").parse_args(words)
    assert found.overrides == ["a.b=1", "c.d=2", "~e.f", "g=3", "h=4"]
    assert (found.name, found.model, found.output, found.ranks) == ("x", Path("m"), Path("y"), 2)
    assert parser_of("sample").parse_args([*needed, "--output", "y"]).overrides == []


def test_what_follows_two_dashes_is_no_option() -> None:
    found = parser_of("repro").parse_args(["train@t", "--attempts", "3", "--", "--force", "--", "-s"])
    assert (found.attempts, found.rest) == (3, ["train@t", "--force", "--", "-s"])
    assert parser_of("repro").parse_args(["--", "--dry"]).rest == ["--dry"]
    with pytest.raises(InputError, match="unrecognized arguments: x"):
        parser_of("sync").parse_args(["--", "x"])


def test_an_unknown_option_is_reported_before_a_missing_one() -> None:
    for words in (["--naem", "x"], ["--naem=x"], ["a=1", "--naem"]):
        with pytest.raises(InputError, match=r"^there is no option --naem; did you mean '--name'\? \(see pipestill"):
            parser_of("sample").parse_args(words)
    with pytest.raises(InputError, match="there is no option -x"):
        parser_of("sample").parse_args(["-x"])
    with pytest.raises(InputError, match="required: --name"):
        parser_of("sample").parse_args(["--mod", "x"])  # short forms that are clear stand


def test_status_watches_without_a_number() -> None:
    assert parser_of("status").parse_args(["--watch"]).watch == 10.0
    assert parser_of("status").parse_args(["--watch", "2.5"]).watch == 2.5
    assert parser_of("status").parse_args([]).watch is None


def test_help_shows_the_grammar_of_overrides() -> None:
    assert "KEY=VALUE sets a parameter" in parser_of("sample").format_help()
    assert "KEY=VALUE" not in parser_of("doctor").format_help()
    assert isinstance(parser_of("doctor"), Parser)


def test_help_of_the_whole_imports_nothing_else() -> None:
    script = (
        "import sys; from pipestill import cli; sys.stdout = open('/dev/null', 'w', encoding='utf-8')\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(*sorted(name for name in sys.modules if name.startswith('pipestill')), file=sys.stderr)\n"
        "print(*({'torch', 'numpy', 'pydantic', 'yaml', 'tqdm', 'ctypes'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True)
    own, foreign = done.stderr.split("\n")[:2]
    assert own.split() == ["pipestill", "pipestill.cli", "pipestill.errors", "pipestill.surroundings"]
    assert foreign == ""
