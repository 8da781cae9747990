"""The tests' own fork server: a forked command is what a new interpreter would have been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import fork_server
import forked
from commands import Command, alive, payload, run, wait_for_end, write_params
from forked import Process
from pipestill import tools
from pipestill.errors import SurroundingsError

pytestmark = pytest.mark.skipif(os.environ.get(forked.SERVERS) == "off", reason="fork servers are off")
TINY = {
    "teachers.teacher.network": {"channels": [8], "layers": 1, "attention": [False], "norm_groups": 4},
    "teachers.teacher.training": {"iterations": 3, "batch": 16, "validate_every": 3},
}
PROBE = """
import json, os, resource, signal, sys, threading
said = {
    "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgid(0), "folder": os.getcwd(), "files": [],
    "umask": os.umask(0), "arguments": sys.argv[1:], "variables": dict(os.environ),
    "threads": len(os.listdir("/proc/self/task")), "input": sys.stdin.read(),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "terminate": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "hash": hash("a word"), "path": [entry for entry in sys.path if "tests" in entry],
}
for name in os.listdir("/proc/self/fd"):
    try:
        os.stat(f"/proc/self/fd/{name}")
        said["files"].append(int(name))
    except OSError:
        pass  # the listing itself
print(json.dumps(said))
print("to the end", file=sys.stderr)
import atexit
atexit.register(print, "at exit")
thread = threading.Timer(0.05, print, ["the last thread"])
thread.start()
raise SystemExit(int(sys.argv[1]))
"""


def forks(tmp_path: Path, *arguments: str, text: str = PROBE, output: str = "output", **variables: str) -> Process:
    """A forked process that runs a program with this text."""
    program = tmp_path / "program.py"
    program.write_text(text)
    with (tmp_path / output).open("wb") as file:
        found = forked.start(str(program), arguments, os.environ | variables, output=file, folder=tmp_path)
    assert found is not None, "refused"
    return found


def test_a_forked_process_is_as_a_new_one_would_be(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        process = forks(tmp_path, "7", "ü", PIPESTILL_WORD="x y")
    finally:
        os.umask(umask)
    assert process.wait(60) == process.poll() == process.returncode == 7
    first, *others = (tmp_path / "output").read_text().splitlines()
    said = json.loads(first)
    assert said["pid"] == said["session"] == said["group"] == process.pid
    assert said["folder"] == str(tmp_path)
    assert said["umask"] == 0o027
    assert said["arguments"] == ["7", "ü"]
    assert said["variables"] == os.environ | {"PIPESTILL_WORD": "x y"}
    assert said["threads"] == 1
    assert said["input"] == ""
    assert said["interrupt"]
    assert said["terminate"]
    assert said["blocked"] == said["path"] == []
    assert set(said["files"]) == {0, 1, 2}
    assert sorted(others) == ["at exit", "the last thread", "to the end"]


def test_two_commands_in_a_row_differ_in_their_hashes(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        assert forks(tmp_path, "0").wait(60) == 0
        said.append(json.loads((tmp_path / "output").read_text().splitlines()[0])["hash"])
    assert len(set(said)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_its_end_and_its_number_stays_taken_until_it_is_waited_for(tmp_path: Path, number: int) -> None:
    process = forks(tmp_path, text="import signal\nprint('ready', flush=True)\nsignal.pause()")
    while "ready" not in (tmp_path / "output").read_text():
        time.sleep(0.01)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, number)
    wait_for_end([process.pid])
    assert not alive(process.pid)
    os.kill(process.pid, 0)  # a zombie: another process cannot have got the number
    assert process.wait(60) == -number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_what_escapes_is_a_traceback(tmp_path: Path) -> None:
    assert forks(tmp_path, text="raise ValueError('so')").wait(60) == 1
    assert (tmp_path / "output").read_text().endswith("ValueError: so\n")


def test_what_imports_read_needs_an_interpreter_of_its_own(tmp_path: Path) -> None:
    threads = dict.fromkeys(fork_server.THREADS, "1")  # Snakemake sets them for a job of one thread
    others = (
        {"OMP_NUM_THREADS": "2"},
        {"MKL_NUM_THREADS": "2"},
        {"LC_ALL": "C"},
        {"HOME": "/"},
        {"PYTHONHASHSEED": "0"},
    )
    with (tmp_path / "output").open("wb") as file:
        for variables in others:
            assert forked.start("pipestill", ["--version"], os.environ | variables, output=file) is None, variables
        process = forked.start("pipestill", ["--version"], os.environ | threads, output=file)
        assert process is not None
        assert process.wait(60) == 0


def test_a_tied_process_ends_with_the_one_that_asked_for_it(tmp_path: Path) -> None:
    waits = tmp_path / "waits.py"
    waits.write_text("import signal\nsignal.pause()")
    server = Path(os.environ[forked.SERVERS], "stages-0")
    assert [forks(tmp_path, "0").wait(60) for _ in range(forked.SEEDS)] == [0] * forked.SEEDS  # all servers run
    asks = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(forked.__file__).parent)!r})
import forked
from pathlib import Path
process = forked.ask(Path({str(server)!r}), {str(waits)!r}, [], dict(os.environ) | {{"LOCAL_RANK": "1"}}, tied=True)
print(process.pid, flush=True)
signal.pause()
"""
    asker = subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    pid = int(asker.stdout.readline())
    assert forked.variables_of(pid)["LOCAL_RANK"] == "1"
    assert forked.starter_of(pid) == asker.pid
    asker.kill()
    asker.wait()
    wait_for_end([pid])


def test_a_training_is_the_same_in_a_forked_process_and_in_a_new_one(tmp_path: Path, digits: Path) -> None:
    params = write_params(tmp_path / "params.yaml", **TINY)
    made = []
    for name, fresh in (("forked", False), ("fresh", True)):
        words = ("train", "--name", "teacher", "--dataset", digits, "--output", tmp_path / name, "--params", params)
        code, output = run(*words, runs=tmp_path / f"{name}-runs", fresh=fresh)
        assert code == 0, output
        made.append(payload(tmp_path / name))
    assert made[0] == made[1]


def test_commands_are_forked_where_nothing_forbids_it(tmp_path: Path) -> None:
    command = Command("--version", runs=tmp_path / "runs")
    assert isinstance(command.process, Process)
    assert command.wait() == 0
    assert re.fullmatch(r"pipestill \d+\.\d+\.\d+\n", command.output)
    assert run("--version", runs=tmp_path / "runs", fresh=True) == (0, command.output)


def stood_in(tmp_path: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A program, found on a search path that begins with the stand-ins."""
    folder = forked.stand_in()
    assert folder is not None
    assert shutil.which(program, path=f"{folder}:{Path(sys.executable).parent}") == str(folder / program)
    with (tmp_path / "output").open("wb") as file:
        return subprocess.Popen([folder / program, *arguments], stdout=file, stderr=file, cwd=tmp_path)


@pytest.mark.parametrize("program", forked.KINDS)
def test_the_stand_in_is_the_program(tmp_path: Path, program: str) -> None:
    for arguments in (["--version"], ["--unknown"]):
        own = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert stood_in(tmp_path, program, *arguments).wait(60) == own.returncode
        said = (tmp_path / "output").read_text()
        assert sorted(re.findall(r"\w+", said)) == sorted(re.findall(r"\w+", own.stdout)), "sets have any order"


@pytest.mark.parametrize("text", ["params: [1", "stages: {a: {cmd: echo}}"])
def test_tools_that_a_command_here_starts_are_forked_and_end_as_their_own_would(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").write_text(text)
    started = mock.Mock(wraps=subprocess.Popen)
    monkeypatch.setattr(subprocess, "Popen", started)
    said = []
    with forked.children_forked(), pytest.raises(SurroundingsError) as error:
        tools.dvc(tmp_path, "status")
    said.append(str(error.value))
    with pytest.raises(SurroundingsError) as error:
        tools.dvc(tmp_path, "status")
    said.append(str(error.value))
    assert said[0] == said[1]
    programs = [Path(call.args[0][0]) for call in started.call_args_list if call.args[0][1:3] == ["-m", "dvc"]]
    assert programs == [forked.stand_in() / "python", Path(sys.executable)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("receiver", ["stand-in", "forked"])
def test_signals_reach_what_the_stand_in_stands_for_and_its_end_is_the_stand_ins(
    tmp_path: Path, digits: Path, number: int, code: int, receiver: str
) -> None:
    params = write_params(tmp_path / "params.yaml", **(TINY | {"teachers.teacher.training.iterations": 10_000}))
    runs = tmp_path / "runs"
    stage = stood_in(
        *(tmp_path, "pipestill", "train", "--name", "teacher", "--dataset", str(digits)),
        *("--output", "m", "--params", str(params)),
    )
    notes = []
    while not notes and stage.poll() is None:
        notes = [*runs.glob("train/*/status.json")]
    pid = json.loads(notes[0].read_text())["pid"]
    assert forked.starter_of(pid) == stage.pid
    os.kill(stage.pid if receiver == "stand-in" else pid, number)
    assert stage.wait(60) == code, (tmp_path / "output").read_text()
    wait_for_end([pid])
