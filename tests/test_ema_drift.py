"""The averages of several ranks: how far they drift apart is measured, and the leader's is copied where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipestill.distributed import World
from pipestill.training import ema
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


class Behind(World):
    """A rank whose leader is ahead by one, everywhere."""

    def from_leader(self, tensor: Tensor) -> Tensor:
        return tensor + 1


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_tensors_of_every_type_and_shape_are_compared_and_copied(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema, "BUCKET", together)
    module = nn.Module()
    values = {
        "weight": torch.arange(6.0).view(2, 3),
        "brief": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.empty(0),
        "bias": torch.zeros(4),
        "last": torch.full((1, 2), 0.5),
    }
    for name, tensor in values.items():
        module.register_buffer(name, tensor)
    average, world = ema.Ema(module), Behind(1, 2, torch.device("cpu"))
    world.gather = lambda value: [value]  # type: ignore[method-assign]
    assert average.drift(world, mend=False) == 1
    assert all(torch.equal(average.tensors[name], tensor) for name, tensor in values.items())
    assert average.drift(world, mend=True) == 1
    for name, tensor in values.items():
        assert average.tensors[name].dtype == tensor.dtype
        assert torch.equal(average.tensors[name], tensor + 1)


def test_drift_is_measured_named_and_mended(tmp_path: Path, digits: Path) -> None:
    training = {"iterations": 6, "batch": 16, "validate_every": 1}
    found: dict[int, list[tuple[int, float]]] = {}
    for every in (0, 4):
        changes = {
            "teachers.teacher.training": training | {"ema": {"decay": DECAY, "warmup": False, "sync_every": every}}
        }
        runs = tmp_path / f"runs-{every}"
        command = arguments(tmp_path, digits, f"m-{every}", operation={"save_every": 1000.0}, **changes)
        done = over_two_ranks(tmp_path / "drifts.py", DRIFTS.format(off=OFF), command, runs)
        assert done.returncode == 0, done.stderr
        (log,) = runs.glob("train/*/log.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found[every] = [(row["step"], row["ema_drift"]) for row in rows if "ema_drift" in row]
        says = "after update 4 the ranks' averages differ by up to 0.0625: "
        assert says + ("all take the first rank's" if every else "only the first rank's is kept") in done.stderr
    free = [0.0, *(OFF / 2**updates for updates in range(5))]
    assert found[0] == [(step, pytest.approx(drift, abs=1e-6)) for step, drift in enumerate(free, 1)]
    mended = [*enumerate(free[:4], 1), (5, 0.0), (6, 0.0)]  # the fourth is measured and copied
    assert found[4] == [(step, pytest.approx(drift, abs=1e-6)) for step, drift in mended]
