"""Ranks under torchrun: what one rank does alone never runs against a collective's time limit; all see one state.

The replaced systems hung here: rank 0 drew its previews while the others stood in a collective until it timed out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from commands import payload, run
from test_train import arguments

LIMIT, ALONE = 4.0, 7.0  # seconds that a collective may take, and that the leader works alone
SLOW = """
import os, sys, time
from pipestill import cli
from pipestill.sampling.preview import Previews
from pipestill.training import state
for owner, name in ((Previews, "_sampled"), (Previews, "_estimate"), (state, "save")):
    whole = getattr(owner, name)
    def slowly(*words, whole=whole, **named):
        time.sleep({alone} if os.environ["RANK"] == "0" else 0)
        return whole(*words, **named)
    setattr(owner, name, slowly)
sys.exit(cli.main(sys.argv[1:]))
"""


APART = """
import os, sys
from pipestill import cli
os.environ["PIPESTILL_RUNS"] += os.environ["RANK"]
sys.exit(cli.main(sys.argv[1:]))
"""


def over_two_ranks(script: Path, text: str, command: list[object], runs: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command line as `text` starts it, over two ranks of torchrun's."""
    script.write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*launcher, *map(str, command)],
        env=os.environ | {"PIPESTILL_RUNS": str(runs)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_ranks_that_do_not_see_the_same_states_say_so(tmp_path: Path, digits: Path) -> None:
    command = arguments(tmp_path, digits, "m", operation={"log_every": 1, "save_every": 0.001})
    done = over_two_ranks(tmp_path / "apart.py", APART, [*command, "--deadline-min", 0], tmp_path / "runs")
    assert "stopped by its time limit after update 1 of" in done.stderr
    done = over_two_ranks(tmp_path / "apart.py", APART, command, tmp_path / "runs")
    assert "ranks see different states ([1, 0]): is " in done.stderr
    assert not (tmp_path / "m").exists()


def test_an_estimate_a_preview_and_a_state_that_take_longer_than_a_collective_may(tmp_path: Path, digits: Path) -> None:
    training = {"teachers.teacher.training": {"iterations": 4, "batch": 16, "validate_every": 0, "accumulation": 2}}
    slow = {"preview": {"every": 3, "share": 0.99}, "save_every": ALONE - 0.5, "log_every": 1, "timeout": LIMIT}
    command = arguments(tmp_path, digits, "m", operation=slow, **training)
    done = over_two_ranks(tmp_path / "slow.py", SLOW.format(alone=ALONE), command, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (work,) = (tmp_path / "runs" / "train").iterdir()
    (shown,) = (tmp_path / "runs" / "previews").iterdir()
    assert (shown / "step-00000003.png").exists()
    for rank in (0, 1):
        assert len(list((shown / "step-00000003").glob(f"epoch_0000_rank_{rank}_sample_*.png"))) == 20
    assert (work / "saved.txt").read_text().split() == ["3"], "the preview made saving due, which took as long again"

    plain = arguments(tmp_path, digits, "plain", operation={"log_every": 1}, **training)
    code, output = run(*plain, "--ranks", 2, runs=tmp_path / "other")
    assert code == 0, output
    assert payload(tmp_path / "m") == payload(tmp_path / "plain"), "previews change no weight"
