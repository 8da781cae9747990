"""scripts/environment.py: what it does again, and that what was killed on the way is made whole. No package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import environment


class Killed(Exception):
    """Stands for the end of the process."""


class Commands:
    """Records the commands, runs those that make the environment itself, and is killed before the n-th `pip`."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.made = 0
        self.installed: list[str] = []
        self._killed_at = killed_at

    def __call__(self, *command: str) -> None:
        if command[1:3] == ("-m", "venv"):
            self.made += 1
            subprocess.run(command, check=True)
            return
        assert command[1:3] == ("-m", "pip")
        if len(self.installed) + 1 == self._killed_at:
            raise Killed
        self.installed.append(command[-1])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without an environment."""
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text(f"# {name}\n")
    venv = tmp_path / ".venv"
    monkeypatch.setattr(environment, "ROOT", str(tmp_path))
    monkeypatch.setattr(environment, "VENV", str(venv))
    monkeypatch.setattr(environment, "STAMP", str(venv / "requirements.digest"))
    return tmp_path


def installs(monkeypatch: pytest.MonkeyPatch, killed_at: int | None = None) -> Commands:
    """What `install` does, until it is killed."""
    commands = Commands(killed_at)
    monkeypatch.setattr(environment, "run", commands)
    if killed_at is None:
        environment.install()
    else:
        with pytest.raises(Killed):
            environment.install()
    return commands


def test_a_set_up_killed_in_venv_is_made_whole(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First with a Python and no pip, as between venv's two steps; then with a pip that is half unpacked."""
    venv = project / ".venv"
    python = venv / "bin" / "python"
    assert not environment.has_pip(str(python))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    assert python.exists()
    assert not environment.has_pip(str(python))
    commands = installs(monkeypatch)
    assert (commands.made, commands.installed) == (1, ["requirements.txt", "."])
    assert environment.has_pip(str(python))
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    assert environment.is_made()

    (record,) = venv.glob("lib/*/site-packages/pip-*.dist-info/RECORD")
    record.unlink()
    assert not environment.has_pip(str(python))
    python.unlink()
    python.write_text("no program\n")
    assert not environment.has_pip(str(python))


def test_what_was_killed_while_installing_is_installed_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the environment that is there, and though an older stamp fits the older requirements."""
    monkeypatch.setattr(environment, "has_pip", lambda python: True)
    (project / ".venv").mkdir()
    installs(monkeypatch)
    assert environment.is_made()
    before = (project / "requirements.txt").read_bytes()
    (project / "requirements.txt").write_bytes(before + b"more==1\n")
    for killed_at in (1, 2):
        assert installs(monkeypatch, killed_at).made == 0
        assert not environment.is_made()
    (project / "requirements.txt").write_bytes(before)
    assert not environment.is_made(), "some of the newer packages may be there"
    assert installs(monkeypatch).installed == ["requirements.txt", "."]
    assert environment.is_made()


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_what_decides_the_packages_decides_whether_to_install(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(environment, "has_pip", lambda python: True)
    (project / ".venv").mkdir()
    assert not environment.is_made()
    installs(monkeypatch)
    assert environment.is_made()
    (project / name).write_text("changed\n")
    assert not environment.is_made()


def test_a_command_that_fails_is_named_and_leaves_no_stamp(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_pip", lambda python: True)
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: 7)
    (project / ".venv").mkdir()
    with pytest.raises(SystemExit, match=r"^make: '.*--requirement requirements\.txt' ended with 7: see above"):
        environment.install()
    assert not environment.is_made()
