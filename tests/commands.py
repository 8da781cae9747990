"""Running `pipestill` as its users do: as a command of its own, watched, stopped or killed."""

from __future__ import annotations

import copy
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import fork_server
import forked
from pipestill import cli
from pipestill.stopping import handlers_kept

SLOWLY = {fork_server.SECONDS_AN_UPDATE: "0.2"}  # variables of a forked training that gives a signal time to come
PATIENCE = 120.0  # seconds after which a command that should have ended or begun counts as hung


def write_params(path: Path, **changes: Any) -> Path:
    """The committed parameters with changes at dotted names, as a file of its own."""
    body = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
    for name, value in changes.items():
        node = body
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = copy.deepcopy(value)
    path.write_text(yaml.safe_dump(body))
    return path


def can_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode == 0


class Command:
    """One running `pipestill` command in a process group of its own.

    It is forked from a process that has imported what commands need (forked.py); `fresh` starts an interpreter instead,
    as users do: for tests of what happens while one starts, and of ranks that lose their launcher.
    """

    def __init__(
        self, *arguments: object, runs: Path, environment: Mapping[str, str] | None = None, fresh: bool = False
    ) -> None:
        self.log = runs.parent / f"{runs.name}-{time.monotonic_ns()}.log"
        variables = os.environ | {"PIPESTILL_RUNS": str(runs), "OMP_NUM_THREADS": "1"} | dict(environment or {})
        words = [str(word) for word in arguments]
        with self.log.open("wb") as output:
            own = None if fresh else forked.start("pipestill", words, variables, output=output)
            if own is None and fork_server.SECONDS_AN_UPDATE in variables:
                pytest.skip("only forked trainings can be slowed down")
            self.process: forked.Process | subprocess.Popen[bytes] = own or subprocess.Popen(
                [sys.executable, "-m", "pipestill", *words],
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code; a command that hangs is ended and fails the test with its output."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {PATIENCE} s:\n{self.output}") from None

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true while the command ran."""
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if condition():
                return True
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
                return condition()
        self.kill_all()
        raise AssertionError(f"nothing happened in {PATIENCE} s:\n{self.output}")

    def kill_all(self) -> bool:
        """SIGKILL to the whole process group, as a power cut would; whether the command ran until then."""
        ranks = self.children()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        wait_for_end(ranks)
        return code == -signal.SIGKILL

    def children(self) -> list[int]:
        """Process ids of its ranks, in order of rank."""
        ranks = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                variables = forked.variables_of(int(entry.name))
                mine = self.process.pid in (os.getpgid(int(entry.name)), forked.starter_of(int(entry.name)))
            except (OSError, ValueError):
                continue
            if "LOCAL_RANK" in variables and mine:
                ranks.append((int(variables["LOCAL_RANK"]), int(entry.name)))
        return [pid for _, pid in sorted(ranks)]


def wait_for_end(pids: Iterable[int], seconds: float = 10.0) -> None:
    """Waits until processes have ended with all their threads, which hold locks for longer than /proc shows them."""
    limit = time.monotonic() + seconds
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))
        os.close(descriptor)
        assert ended, f"process {pid} still runs after {seconds} s"


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def run(
    *arguments: object, runs: Path, environment: Mapping[str, str] | None = None, fresh: bool = False
) -> tuple[int, str]:
    """Runs a command to its end: exit code and everything that it printed. `fresh` as for Command."""
    command = Command(*arguments, runs=runs, environment=environment, fresh=fresh)
    return command.wait(), command.output


def here(*arguments: object, runs: Path, code: int = 0) -> None:
    """Runs a command that must end with `code` in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch, handlers_kept(), forked.children_forked():
        patch.setenv("PIPESTILL_RUNS", str(runs))
        patch.setenv("PIPESTILL_DEADLINE", "")  # what the command sets it to goes with it
        patch.delenv("PIPESTILL_DEADLINE")
        assert cli.main([str(word) for word in arguments]) == code


def finish(*arguments: object, runs: Path) -> None:
    """Runs a command that must succeed: here, or as processes of its own where it asks for several ranks."""
    if "--ranks" in arguments and arguments[arguments.index("--ranks") + 1] != 1:
        code, output = run(*arguments, runs=runs)
        assert code == 0, output
    else:
        here(*arguments, runs=runs)


def payload(artifact: Path) -> str:
    """The payload digest that an artefact's manifest states."""
    return str(json.loads((artifact / "manifest.json").read_text())["payload"])


def steps_logged(runs: Path) -> int:
    """The furthest update in any log below a runs folder; 0 where none is."""
    last = 0
    for log in runs.glob("*/*/log.jsonl"):
        for line in log.read_text().splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError):
                continue  # a line that a kill cut short
    return last


def saved_states(runs: Path) -> int:
    """The number of whole states below a runs folder."""
    return len([*runs.glob("*/*/state/state-*.pt")])


def kill_and_resume(
    command: Sequence[object],
    folder: Path,
    *,
    kills: int,
    updates: int,
    chance: random.Random,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Kills a training that writes `folder/m` at random updates, then lets it end; returns the payload digest.

    At least one kill must have come while it trained: of few kills, `SLOWLY` makes sure.
    """
    runs, landed = folder / "runs", 0
    for left in range(kills, 0, -1):
        target = steps_logged(runs) + chance.randint(1, updates // 2)

        def far_enough(target: int = target, last: bool = left == 1) -> bool:
            return steps_logged(runs) >= target and not (last and saved_states(runs) == 0)

        attempt = Command(*command, runs=runs, environment=environment)
        if attempt.wait_until(far_enough):
            landed += attempt.kill_all()
        if (folder / "m" / "manifest.json").exists():
            break
    assert landed, "it ended before any kill"
    finish(*command, runs=runs)
    return payload(folder / "m")
