"""The averages of several ranks: how far they drift apart is measured, and the leader's is copied where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_leader_alone import over_two_ranks
from test_train import arguments

OFF = 0.25  # what the second rank's average is off by, from the second update on
DECAY = 0.5
DRIFTS = """
import os, sys
from pipestill import cli
from pipestill.training.ema import Ema
whole, calls = Ema.update, []
def update(self, module, decay):
    whole(self, module, decay)
    calls.append(decay)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        self.tensors["conv_in.bias"][0] += {off}
Ema.update = update
sys.exit(cli.main(sys.argv[1:]))
"""


def test_drift_is_measured_named_and_mended(tmp_path: Path, digits: Path) -> None:
    training = {"iterations": 6, "batch": 16, "validate_every": 1}
    found: dict[int, list[tuple[int, float]]] = {}
    for every in (0, 4):
        changes = {"teachers.teacher.training": training | {"ema": {"decay": DECAY, "sync_every": every}}}
        runs = tmp_path / f"runs-{every}"
        command = arguments(tmp_path, digits, f"m-{every}", operation={"save_every": 1000.0}, **changes)
        done = over_two_ranks(tmp_path / "drifts.py", DRIFTS.format(off=OFF), command, runs)
        assert done.returncode == 0, done.stderr
        (log,) = runs.glob("train/*/log.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found[every] = [(row["step"], row["ema_drift"]) for row in rows if "ema_drift" in row]
        says = "after update 4 the ranks' averages differ by up to 0.0625: "
        assert says + ("all take the first rank's" if every else "the first rank's is saved") in done.stderr
    free = [0.0, *(OFF / 2**updates for updates in range(5))]
    assert found[0] == [(step, pytest.approx(drift, abs=1e-6)) for step, drift in enumerate(free, 1)]
    mended = [*enumerate(free[:4], 1), (4, free[3]), (5, 0.0), (6, 0.0)]  # the fourth is measured, then copied
    assert found[4] == [(step, pytest.approx(drift, abs=1e-6)) for step, drift in mended]
