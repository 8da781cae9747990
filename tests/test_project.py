"""Commands in subfolders of a project, which parameters apply, and what is printed: quiet, colours, completions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipestill import cli, config, launch, progress, project, running, terminal
from pipestill.commands import completion, doctor, status
from pipestill.config import Params
from pipestill.config.fields import PathText
from test_sampling_command import arguments
from tiny_models import make_model
from workflow_project import Project

OURS = "stages: {dataset: {cmd: pipestill dataset --output artifacts/dataset}}\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with parameters, and somebody who stands in `root/deep/er`."""
    place = tmp_path / "project"
    (place / "deep" / "er").mkdir(parents=True)
    (place / "dvc.yaml").write_text(OURS)
    monkeypatch.delenv("PIPESTILL_RUNS", raising=False)
    monkeypatch.chdir(place / "deep" / "er")
    return place


def lines(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    """What a command prints on standard error."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    return capsys.readouterr().err.splitlines()


def test_the_root_is_the_nearest_project_of_ours(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    assert project.root_of(inner) == inner
    (tmp_path / "params.yaml").write_text("other: 1\n")  # another tool's
    (tmp_path / "dvc.yaml").write_text("stages: {train: {cmd: python train.py}}\n")
    assert project.root_of(inner) == inner
    (tmp_path / "a" / "dvc.yaml").write_text(OURS)
    assert project.root_of(inner) == tmp_path / "a"
    (tmp_path / "a" / "b" / "params.yaml").write_text("# Written by: pipestill config\n")
    assert project.root_of(inner) == tmp_path / "a" / "b"
    (inner / "params.yaml").write_text("data: {}\n")  # of whatever kind: it lies where one stands
    assert project.root_of(inner) == inner


def test_typed_paths_are_relative_to_where_one_stands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, "config", "experiment=own", "data.path=../my photos", "data.resolution=8")
    assert said[0].startswith("wrote ../../params.yaml: ")
    assert config.load(root / "params.yaml").data.path == "deep/my photos"
    assert cli.main(["config", "experiment=own", "data.path=/elsewhere", "--output", "here.yaml"]) == 0
    assert config.load(root / "deep" / "er" / "here.yaml").data.path == "/elsewhere"
    assert Path.cwd() == root / "deep" / "er"


def test_a_stage_in_a_subfolder_makes_what_it_makes_at_the_root(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(root / "deep" / "model")
    arguments(root, root, images=8)  # writes params.yaml
    words = ["sample", "--name", "run", "--model", "../model", "--output", "samples"]
    said = lines(capsys, *words, "operation.device=cpu")
    assert not any("packaged" in line for line in said)
    assert (root / "deep" / "er" / "samples" / "manifest.json").exists()
    assert {path.name for path in root.iterdir()} == {"deep", "dvc.yaml", "params.yaml", "runs"}
    record = json.loads(next(root.glob("runs/sample/*/record.json")).read_text())
    assert record["output"] == str(root / "deep" / "er" / "samples")


def test_ranks_get_the_paths_as_seen_from_the_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments(root, root, images=8)
    started = []

    def start(spread: launch.Spread, argv: Sequence[str], **named: object) -> tuple[int, str]:
        started.append((Path.cwd(), list(argv)))
        return 0, ""

    monkeypatch.setattr(launch, "start", start)
    words = ["sample", "operation.container=null", "--name", "run", "--model", "../model", "--output", "samples"]
    assert cli.main([*words, "--ranks", "2"]) == 0
    ((folder, argv),) = started
    found = running.parser_of("sample", running.module_of("sample")).parse_args(argv[1:])
    assert (folder, argv[0]) == (root, "sample")
    assert (found.model, found.output, found.ranks) == (Path("deep/model"), Path("deep/er/samples"), 2)
    assert found.overrides == ["operation.container=null"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample", "a=1 --name x --model m --sigmas s --output=y --ranks 2 --deadline-min 1.5 -q ~b.c"),
        ("evaluate", "--name x --samples s --reference r --output o --metrics m.json k=v"),
        ("bench", "--name t --dataset d --output o --ranks 1,4"),
        ("status", "--watch"),
        ("repro", "--attempts 3 -- train@t --force"),
        ("trace", "metrics/x.json --verify"),
    ],
)
def test_a_command_line_can_be_made_from_its_options(command: str, words: str) -> None:
    parser = running.parser_of(command, running.module_of(command))
    options = parser.parse_args(words.split())
    assert parser.parse_args(project.words_of(parser, options)) == options


def paths_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full names of parameters that hold a path, outside lists and named entries."""
    marks = PathText.__metadata__  # type: ignore[attr-defined]
    for name, field in section.model_fields.items():
        inner = field.annotation
        parts = (field, *getattr(inner, "__args__", ()))
        if any(marks[-1] in getattr(part, "metadata", getattr(part, "__metadata__", ())) for part in parts):
            yield prefix + name
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from paths_of(inner, f"{prefix}{name}.")


def test_every_parameter_with_a_path_is_known_to_be_one() -> None:
    assert set(paths_of(Params)) == set(project.PARAMETERS)


def test_commands_of_the_pipeline_work_in_its_subfolders(
    tiny: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.root / "conf")
    for name in [name for name in os.environ if name.startswith(("PIPESTILL_", "DVC_"))]:
        monkeypatch.delenv(name)
    assert cli.main(["trace", "../metrics/student-4.json"]) == 0
    assert "digits" in capsys.readouterr().out
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("done")


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["config"]) == 2
    assert said.getvalue() == ("pipestill config: the working folder does not exist any more: change to another one\n")


# --- which parameters apply ----------------------------------------------------------------------------------------


def test_packaged_parameters_are_said_to_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--name", "teacher", "--dataset", "nowhere", "--output", "out"]
    said = lines(capsys, *words, code=2)
    told = f"no params.yaml in {tmp_path} or above: using the packaged parameters (experiment=digits); "
    assert said[0] == told + "write your own with pipestill config"
    assert len(said) == 2
    assert "(experiment=miniature)" in lines(capsys, *words, "experiment=miniature", code=2)[0]
    assert len(lines(capsys, *words, "--quiet", code=2)) == 1
    assert cli.main(["config", "experiment=digits"]) == 0
    assert len(lines(capsys, *words, code=2)) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert len(lines(capsys, *words, "--params", "params.yaml", code=2)) == 1


# --- quiet, colour, completion -------------------------------------------------------------------------------------


def test_quiet_leaves_warnings_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines(capsys, "config", "experiment=own", "data.path=photos", "-q") == ["data.path=photos is not there yet"]
    words = ["example", "--name", "digits", "--output", "digits", "experiment=digits"]
    (tmp_path / "params.yaml").unlink()
    assert lines(capsys, *words, "--quiet") == []
    shutil.rmtree(tmp_path / "digits")
    assert len(lines(capsys, *words)) > 1
    assert progress.QUIET not in os.environ


def test_a_quiet_bar_still_knows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.quiet(True):
        bar = progress.Bar("label", 10)
        bar.advance(4)
        bar.close()
        progress.say("something")
    assert capsys.readouterr().err == ""
    facts = progress.current()
    assert facts is not None
    assert (facts["done"], facts["total"]) == (4, 10)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_quiet(name: str) -> None:
    assert "--quiet" in running.parser_of(name, running.module_of(name)).format_help()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert terminal.coloured("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert terminal.coloured("x", None, Terminal()) == "x"
    assert terminal.coloured("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.coloured("x", "red", Terminal()) == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.coloured("x", "red", Terminal()) == "x"
    rows = [status.Row("train@t", "failed"), status.Row("report", "done")]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert list(status.lines(rows, Path.cwd()))[:2] == [
        "train@t  \x1b[31mfailed\x1b[0m",
        "report   \x1b[32mdone  \x1b[0m",
    ]
    assert set(doctor.COLOURS) == {"ok", "warn", "fail"}


@pytest.mark.parametrize(("variables", "wanted"), [({}, "\x1b[31m{}\x1b[0m\r\n"), ({"NO_COLOR": "1"}, "{}\r\n")])
def test_errors_are_red_on_a_terminal(variables: dict[str, str], wanted: str) -> None:
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "pipestill", "trian"]
    done = subprocess.run(command, stderr=theirs, env=plain | variables, check=False)
    os.close(theirs)
    assert done.returncode == 2
    assert os.read(ours, 1000).decode() == wanted.format(
        "pipestill: there is no command 'trian'; did you mean 'train'?"
    )
    os.close(ours)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completions_name_commands_options_and_choices(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (
        *cli.COMMANDS,
        "deadline-min",
        "validation",
        "experiment=digits",
    ):
        assert word in script, word
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("pipestill di", {"distill"}),
        ("pipestill sample --na", {"--name"}),
        ("pipestill config experiment=textures", {"experiment=textures", "experiment=textures_ddpm"}),
    ],
)
def test_bash_completes(words: str, wanted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = (
        f"source {tmp_path}/script; COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); "
        "_shtab_pipestill; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == wanted


def test_completion_imports_no_torch() -> None:
    script = (
        "import sys, io, contextlib; from pipestill import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()): code = cli.main(['completion', 'bash'])\n"
        "print(code, *({'torch', 'numpy', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
