"""The command line's outcomes that belong to no single command."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from images import class_folders
from pipestill import cli
from pipestill.errors import denied


@pytest.mark.parametrize("arguments", [("config", "--docs"), ("config", "--schema")])
def test_a_reader_that_leaves_ends_it_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipestill", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    open_ones = {">&-": f"2>{said}", "2>&-": f">{said}", ">&- 2>&- <&-": ""}[closed]
    command = f"{sys.executable} -m pipestill config --print experiment=miniature {closed} {open_ones}"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    if closed == ">&-":
        assert said.read_text() == ""
    if closed == "2>&-":
        assert "title: Miniature" in said.read_text()


def test_a_reader_of_errors_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipestill", "config", "experiment=miniature"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writer, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stdout) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian", "--help"], "there is no command 'trian'; did you mean 'train'?"),
        (["foo"], "there is no command 'foo' (there are: example, fetch, dataset,"),
        (["config", "=3"], "'=3' is not KEY=VALUE"),
        (["config", "--check", "params.yaml"], "params.yaml cannot be read (it is not UTF-8 text)"),
        (["dataset", "--output", "file/x", "data.path=photos"], "file is no folder"),
        (["dataset", "--check", "photos", "--report", "file"], "file is not a folder: choose another path"),
        (["train", "--name", "teacher", "--dataset", "x", "--output", "y", "--deadline-min", "-5"], "0 or more"),
        (["config", "experiment=own", "data.path=x", "data.resolution=33"], "and 33 pixels cannot be"),
        (["config", "data.labels=false"], "data.labels=false leaves no classes: take classifier out of"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    class_folders(Path("photos"))
    if "params.yaml" in arguments:
        Path("params.yaml").write_bytes(b"\xff\xfe\x00")
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pipestill")]
    assert len(lines) == 1
    assert says in lines[0]
    assert Path("file").read_text() == "a file"


def test_a_work_folder_that_is_a_file_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    monkeypatch.setenv("PIPESTILL_RUNS", "file")
    assert cli.main(["example", "--name", "digits", "--output", "out"]) == 2
    assert "file/locks is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "closed", "flag", "says"),
    [
        ("there/new/file", "there", os.W_OK, "{tmp}/there belongs to {owner}, drwxr-xr-x): have it made writable"),
        ("there", "there", os.R_OK, "it belongs to {owner}, drwxr-xr-x): have it made readable"),
        ("there/old", "there/old", os.W_OK, "it belongs to {owner}, -rw-r--r--): have it made writable"),
        ("there/old", "there", os.W_OK, "{tmp}/there belongs to {owner}, drwxr-xr-x): have it made writable"),
        ("there/none", "there", os.X_OK, "{tmp}/there belongs to {owner}, drwxr-xr-x): have it made readable"),
        ("there/old", "elsewhere", os.W_OK, "{tmp}/there/old: permission denied"),
    ],
)
def test_a_denied_path_names_what_stands_in_the_way(
    path: str, closed: str, flag: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    (tmp_path / "there/old").touch(mode=0o644)
    monkeypatch.setattr(os, "access", lambda place, mode: not (mode & flag and Path(place) == tmp_path / closed))
    said = str(denied(tmp_path / path))
    assert said.startswith(f"{tmp_path / path}: permission denied")
    assert said.endswith(says.format(tmp=tmp_path, owner=pwd.getpwuid(os.getuid()).pw_name))


def test_a_deadline_that_is_no_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    class_folders(Path("photos"))
    monkeypatch.setenv("PIPESTILL_DEADLINE", "abc")
    assert cli.main(["dataset", "--output", "out", "data.path=photos"]) == 2
    assert "PIPESTILL_DEADLINE=abc is no time" in capsys.readouterr().err
