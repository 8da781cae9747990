"""Ranks that fail together, and the one outcome that the launcher makes of theirs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commands import payload, run, write_params
from pipestill import cli, launch
from pipestill.errors import SurroundingsError

LIMIT, ALONE = 8.0, 10.0  # seconds in which ranks meet, however long their imports take, and that a leader works alone
BUSY = """
import time
from pipestill import launch
launch.watch_siblings()
print("ready", flush=True)
time.sleep({seconds})  # a rank that waits for something else than its peers
launch.leave_outcome({code}, "")
"""


def start(folder: Path, rank: int, *, seconds: float = 120, code: int = 0) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(seconds=seconds, code=code)],
        env=os.environ | variables | {launch.OUTCOME: str(folder), "TORCHELASTIC_RUN_ID": "test"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_busy_rank_ends_soon_after_another_was_killed(tmp_path: Path) -> None:
    first, second = start(tmp_path, 0), start(tmp_path, 1)
    second.kill()
    second.wait()
    assert first.wait(60) == SurroundingsError.exit_code


@pytest.mark.parametrize(("code", "ends"), [(0, False), (75, False), (3, True)])
def test_a_rank_that_has_done_its_work_or_stopped_takes_nobody_along(tmp_path: Path, code: int, ends: bool) -> None:
    assert start(tmp_path, 1, seconds=0.1, code=code).wait(60) == 0  # the other sees its outcome from the beginning
    first = start(tmp_path, 0, seconds=120 if ends else launch.GRACE + 4)
    assert first.wait(60) == (SurroundingsError.exit_code if ends else 0)


def test_under_another_launcher_there_is_nothing_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.OUTCOME, raising=False)
    launch.watch_siblings()


def leave(folder: Path, rank: int, moment: float, code: int, message: str) -> None:
    (folder / str(rank)).write_text(f"{moment}\n{code}\n{message}")


def test_the_first_cause_is_named(tmp_path: Path) -> None:
    killed = {1: -signal.SIGKILL}
    leave(tmp_path, 0, 5.0, 3, "lost another rank")
    assert launch._outcome(tmp_path, killed)[1].startswith("rank 1 was ended by SIGKILL")
    both = {0: -signal.SIGABRT, 1: -signal.SIGKILL}
    (tmp_path / "0").unlink()
    assert launch._outcome(tmp_path, both)[1].startswith("rank 1 was ended by SIGKILL")
    assert launch._outcome(tmp_path, {0: -signal.SIGABRT})[1].startswith("rank 0 was ended by SIGABRT")
    leave(tmp_path, 2, 4.0, 3, "the loss became nan")
    assert launch._outcome(tmp_path, {0: -signal.SIGTERM}) == (3, "the loss became nan")
    assert launch._outcome(tmp_path, {}) == (3, "the loss became nan")
    leave(tmp_path, 3, 9.0, 2, "the batch cannot be shared")
    assert launch._outcome(tmp_path, killed) == (2, "the batch cannot be shared")


def test_a_rank_that_stopped_outweighs_those_that_lost_it(tmp_path: Path) -> None:
    leave(tmp_path, 0, 6.0, 75, "stopped by SIGTERM: start it again")
    leave(tmp_path, 1, 5.0, 3, launch.LOST_ANOTHER)
    assert launch._outcome(tmp_path, {}) == (75, "stopped by SIGTERM: start it again")
    leave(tmp_path, 2, 7.0, 3, "the loss became nan")
    assert launch._outcome(tmp_path, {})[0] == 3


def test_ranks_that_fail_are_one_line(tmp_path: Path) -> None:
    """torch's agent has lines of its own about them, which name no cause."""
    words = ["train", "--name", "teacher", "--dataset", tmp_path / "none", "--output", tmp_path / "out", "--ranks", 2]
    code, said = run(*words, "--params", write_params(tmp_path / "params.yaml"), runs=tmp_path / "runs")
    assert code == 2
    assert said.count("\n") == 1, said
    assert said.startswith(f"pipestill train: {tmp_path / 'none'}")


def test_ranks_that_left_no_word_are_said_to(tmp_path: Path) -> None:
    assert launch._outcome(tmp_path, {}) == (3, "a rank exited without reporting an error: see its output above")


def test_ranks_that_no_launcher_keeps_a_store_for_leave_in_peace(tmp_path: Path) -> None:
    """As srun starts them: the leader keeps the store, and whoever still asks it when it ends would fail."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pipestill import distributed\nwith distributed.world(device='cpu') as world:\n    world.barrier()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen([sys.executable, str(script)], env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    ends = [(rank.communicate(timeout=100)[1].decode(), rank.returncode) for rank in ranks]
    assert [code for _, code in ends] == [0, 0, 0], ends
    assert not any("Traceback" in said or "recvValue failed" in said for said, _ in ends), ends


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "--ranks", "4"], ["train", "--ranks", "4", "--ranks", "2", "--nodes", "1"]),
        (["train", "--", "-x", "a.b=1"], ["train", "--ranks", "2", "--nodes", "1", "--", "-x", "a.b=1"]),
    ],
)
def test_options_that_are_added_count_and_are_no_overrides(words: list[str], wanted: list[str]) -> None:
    assert launch._with_options(words, ranks=2, nodes=1) == wanted


def test_ranks_wait_for_a_leader_that_works_alone_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from pipestill import distributed\n"
        f"with distributed.world(device='cpu', timeout={LIMIT}) as world:\n"
        "    world.barrier()\n"
        "    if world.leader:\n"
        f"        time.sleep({ALONE})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_ranks_await_a_leader_in_the_midst_of_their_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from pipestill import distributed\n"
        f"with distributed.world(device='cpu', timeout={LIMIT}) as world:\n"
        "    for turn in range(2):\n"
        "        if world.leader:\n"
        f"            time.sleep({ALONE})\n"
        "        world.await_leader(f'turn/{turn}')\n"
        "        world.barrier()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_rows_of_all_ranks_come_together_in_their_order(tmp_path: Path) -> None:
    script = tmp_path / "rows.py"
    script.write_text(
        "import torch\n"
        "from pipestill.distributed import world\n"
        "with world() as group:\n"
        "    own = torch.arange(2 * (3 - group.rank)).reshape(-1, 2) + 100 * group.rank\n"  # 3 rows and 2
        f"    open(f'{tmp_path}/{{group.rank}}', 'w').write(str(group.rows(own).tolist()))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert found == ["[[0, 1], [2, 3], [4, 5], [100, 101], [102, 103]]"] * 2


APPTAINER = """#!/bin/sh
# Stands in for Apptainer, which no package of Debian's brings: says how it was called and starts what it was to start.
echo "apptainer $*" >> {calls}
while [ "$1" != pipestill ]; do shift; done
shift
exec {python} -m pipestill "$@"
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_start_in_an_image_once(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    program, calls = tmp_path / "apptainer", tmp_path / "calls"
    program.write_text(APPTAINER.format(calls=calls, python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    training = {"iterations": 2, "batch": 16, "validate_every": 0}
    changes = {"teachers.teacher.training": training, "operation": {"container": "still.sif"}}
    params = write_params(tmp_path / "params.yaml", **changes)
    words = ["train", "--name", "teacher", "--dataset", digits, "--params", params, "--ranks", ranks]
    code, output = run(*words, "--output", tmp_path / "m", runs=tmp_path / "runs")
    assert code == 0, output
    (call,) = calls.read_text().splitlines()
    assert call.startswith("apptainer exec --nv still.sif pipestill train --name teacher")
    assert f"{ranks} ranks" in output
    assert payload(tmp_path / "m")


def test_an_image_without_apptainer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(launch.CONTAINER, raising=False)
    params = write_params(tmp_path / "params.yaml", operation={"container": "still.sif"})
    words = ["train", "--name", "teacher", "--dataset", tmp_path, "--output", tmp_path / "m", "--params", params]
    assert cli.main([str(word) for word in words]) == 2
    assert "operation.container=still.sif needs apptainer" in capsys.readouterr().err
