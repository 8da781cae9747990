"""Shells, containers and folders that must make no difference: to a command's bytes, its ranks, its end."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from commands import Command, payload, run, write_params
from images import class_folders
from pipestill import surroundings, work
from test_sampling_command import arguments
from tiny_models import make_model
from workflow_project import Project

SHADOWS = ("dis.py", "queue.py", "random.py", "types.py", "yaml.py")  # a user's own files
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LEFTOVERS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
SITE = """
import os
if "TORCHELASTIC_RUN_ID" in os.environ:
    with open({folder!r} + "/rank-" + os.environ["RANK"], "w") as file:
        file.write(os.environ["MASTER_ADDR"] + " " + os.environ.get("GLOO_SOCKET_IFNAME", ""))
"""
NAMELESS = """
import os, socket, sys
socket.sethostname("no-such-host")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model, and the payload digest of its samples."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = make_model(folder / "model").path
    code, said = run(*arguments(folder, model, images=20), runs=folder / "runs")
    assert code == 0, said
    return model, payload(folder / "samples")


def can_rename_host() -> bool:
    return subprocess.run(["unshare", "-ru", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_rename_host(), reason="no mount namespace here")
def test_two_ranks_meet_where_no_name_resolves_among_files_that_shadow_modules(
    tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    model, wanted = undisturbed
    there = tmp_path / "there"
    (site := tmp_path / "site").mkdir()
    there.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(folder=str(tmp_path)))
    for name in SHADOWS:
        (there / name).write_text("raise SystemExit('a file of the working folder was imported')\n")
    program = str(Path(sys.executable).parent / "pipestill")
    words = [program, *map(str, arguments(tmp_path, model, images=20)), "--ranks", "2"]
    done = subprocess.run(
        ["unshare", "-ru", sys.executable, "-P", "-c", NAMELESS, *words],
        cwd=there,
        env=os.environ | LEFTOVERS | {"PYTHONPATH": str(site), "PIPESTILL_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert payload(tmp_path / "samples") == wanted
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["127.0.0.1 lo"] * 2
    assert list((tmp_path / "runs" / "scratch").iterdir()) == []


def test_left_over_variables_of_ranks_make_no_rank(tmp_path: Path, undisturbed: tuple[Path, str]) -> None:
    model, wanted = undisturbed
    code, said = run(*arguments(tmp_path, model, images=20), runs=tmp_path / "runs", environment=LEFTOVERS)
    assert code == 0, said
    assert payload(tmp_path / "samples") == wanted


def test_the_locale_changes_no_digest_and_no_message(tmp_path: Path) -> None:
    """From images in classes with umlauts to a teacher, in UTF-8 and in ASCII."""
    folder = tmp_path / "Früchte (neu)"
    class_folders(folder, each=12, channels=1)
    (folder / "a").rename(folder / "Äpfel")
    (folder / "b").rename(folder / "Birnen")
    digests = []
    for name, locale in (("utf8", {"LC_ALL": "C.UTF-8"}), ("ascii", ASCII)):
        place = tmp_path / name
        place.mkdir()
        params = write_params(
            place / "params.yaml",
            **{"data.path": str(folder), "teachers.teacher.training.iterations": 2, "operation.device": "cpu"},
            **{"teachers.teacher.network.channels": [8], "teachers.teacher.network.attention": [False]},
        )
        dataset = ["dataset", "--output", place / "dataset", "--params", params]
        train = ["train", "--name", "teacher", "--dataset", place / "dataset", "--output", place / "teacher"]
        for words in (dataset, [*train, "--params", params]):
            code, said = run(*words, runs=place / "runs", environment=locale)
            assert code == 0, said
        digests.append([payload(place / "dataset"), payload(place / "teacher")])
        code, said = run("dataset", "--check", folder / "Äpfel", runs=place / "runs", environment=locale)
        assert code == 2
        wanted = "Früchte (neu)/Äpfel"
        assert (wanted if name == "utf8" else wanted.encode("ascii", "backslashreplace").decode()) in said
    assert digests[0] == digests[1]


def test_isolated_python_in_another_locale_starts_once_more_and_no_oftener() -> None:
    """`-I` ignores PYTHONUTF8, so that variable alone would start it again for ever."""
    command = [sys.executable, "-I", "-m", "pipestill", "--version"]
    done = subprocess.run(command, env=os.environ | ASCII, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pipestill ")


def test_a_rank_keeps_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LEFTOVERS | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    surroundings.prepare()
    assert {name: os.environ.get(name) for name in LEFTOVERS} == LEFTOVERS
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    surroundings.prepare()
    assert not LEFTOVERS.keys() & os.environ.keys()


def test_a_uid_without_a_name_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker --user 4321` starts a process; torch asks for the user's name when it compiles."""

    def nobody(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    surroundings.prepare()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert os.environ["HOME"] == str(tmp_path / "runs" / "home")
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert f"uid-{os.getuid()}" in default_cache_dir()


@pytest.mark.skipif(not can_rename_host(), reason="no mount namespace here")
def test_commands_and_snakemake_run_under_a_uid_without_a_name(tiny: Project, tmp_path: Path) -> None:
    """Both look into DVC's repository, and DVC wants to know whose caches it uses there."""
    uid, home = 4321, str(tmp_path / "nowhere")
    nobody = {"HOME": home} | dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    project = tiny.copy(tmp_path / "project")
    python = ("unshare", f"--map-user={uid}", sys.executable)
    asked = project.run(*python, "-c", "import getpass; getpass.getuser()", code=1, **nobody)
    assert f"uid not found: {uid}" in asked
    said = project.run(*python, "-m", "pipestill", "record", **nobody)
    assert said == f"all {len(project.payloads())} finished stages are recorded\n"
    said = project.run(*python, "-m", "snakemake", "--profile", "local", "--dry-run", **nobody)
    assert "Nothing to be done (all requested files are present and up to date)." in said


def test_users_with_a_name_keep_their_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(tmp_path / "nowhere")
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("HOME", home)
    surroundings.prepare()
    assert os.environ["HOME"] == home


# --- what killed launches leave ------------------------------------------------------------------------------------


def test_scratch_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path))
    place = tmp_path / "scratch"
    long_ago = time.time() - 2 * work.YOUNG
    for name in ("dead", "alive", "young"):
        (place / name).mkdir(parents=True)
        (place / name / work.OWNER).touch()
        (place / name / "0").touch()
        if name != "young":
            os.utime(place / name, (long_ago, long_ago))
    with (place / "alive" / work.OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with work.scratch("ranks") as folder:
            assert {path.name for path in place.iterdir()} == {"alive", "young", folder.name}
        assert {path.name for path in place.iterdir()} == {"alive", "young"}


def test_killed_ranks_leave_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    model = make_model(tmp_path / "model").path
    words = [*arguments(tmp_path, model, images=100_000), "--ranks", "2"]
    command = Command(*words, runs=tmp_path / "runs", environment={"TMPDIR": str(temporary)})
    scratch = tmp_path / "runs" / "scratch"
    assert command.wait_until(lambda: len(list(scratch.glob("ranks-*/pid-*"))) == 2)
    command.kill_all()
    assert [path.name for path in temporary.iterdir() if "torch" in path.name or "pipestill" in path.name] == []
    (left,) = scratch.iterdir()
    os.utime(left, (0, 0))
    code, said = run(*words[:-1], "1", "--deadline-min", "0", runs=tmp_path / "runs")
    assert code == 75, said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
        with work.scratch("x") as folder:
            assert list(scratch.iterdir()) == [folder]
    assert json.loads((next(tmp_path.glob("runs/sample/*/status.json"))).read_text())["state"] == "stopped"
