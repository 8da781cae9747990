"""The small parts of training as values: averages, learning rates, losses, curves, states."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from pipestill.config import EmaParams, OperationParams, OptimizerParams
from pipestill.diffusion.conditions import NoCondition
from pipestill.distributed import World
from pipestill.errors import InputError, SurroundingsError
from pipestill.training import loop, optimizers, state
from pipestill.training.curves import Curves
from pipestill.training.ema import Ema, decay_at, initial_share, warnings
from pipestill.training.losses import denoising_loss
from pipestill.training.ranks import averaged, seed_torch
from pipestill.training.tracking import Silent
from pipestill.work import open_work


def test_ema_is_the_geometric_sum_of_the_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    values = [1.0, 4.0, -2.0]
    with torch.no_grad():
        module.weight.fill_(values[0])
    ema, expected = Ema(module), values[0]
    for value in values[1:]:
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(module, 0.9)
        expected = 0.9 * expected + 0.1 * value
    assert ema.tensors["weight"].item() == pytest.approx(expected)


def test_ema_half_life_halves_after_so_many_images_and_ramps_up() -> None:
    params = EmaParams(kind="half-life", half_life=1000, ramp_up=0)
    decay = decay_at(params, update=999, batch=10)
    assert decay**100 == pytest.approx(0.5)  # 100 updates of 10 images
    ramped = EmaParams(kind="half-life", half_life=1000, ramp_up=0.05)
    assert decay_at(ramped, update=19, batch=10) == pytest.approx(0.5 ** (10 / 10))  # 200 images seen
    assert decay_at(ramped, update=10**5, batch=10) == pytest.approx(decay)


def test_a_fixed_decay_warms_up_as_in_tensorflow_and_diffusers() -> None:
    params = EmaParams(decay=0.999)
    assert [decay_at(params, update=t, batch=7) for t in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert decay_at(params, update=8989, batch=7) < decay_at(params, update=8991, batch=7) == 0.999
    theirs = EMAModel([torch.zeros(1)], decay=0.999)
    for t in (1, 2, 50, 8000, 9000):
        assert decay_at(params, update=t, batch=7) == theirs.get_decay(t + 1)
    assert decay_at(EmaParams(decay=0.7, warmup=False), update=0, batch=1) == 0.7
    assert decay_at(EmaParams(decay=0.0), update=5, batch=1) == 0.0


SLOW = EmaParams(decay=0.999, warmup=False)


@pytest.mark.parametrize(
    ("params", "updates", "expected"),
    [
        (SLOW, 300, 0.999**300),  # 74%
        (SLOW, 5000, 0.0),  # 0.7%
        (EmaParams(decay=0.999), 2, 0.1 * 2 / 11),
        (EmaParams(decay=0.999), 300, 0.0),
        (EmaParams(kind="half-life", half_life=3000, ramp_up=0), 300, 0.5),
        (EmaParams(kind="half-life", half_life=3000), 300, 0.0),
        (EmaParams(decay=0.0, warmup=False), 1, 0.0),
        (SLOW, 0, 1.0),
    ],
)
def test_a_warning_names_what_the_average_still_holds_of_its_start(
    params: EmaParams, updates: int, expected: float
) -> None:
    """The share by the average itself: it starts at 1, and every later weight is 0."""
    assert initial_share(params, updates=updates, batch=10) == pytest.approx(expected)
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = Ema(module)
    nn.init.zeros_(module.weight)
    for update in range(updates):
        ema.update(module, decay_at(params, update=update, batch=10))
    share = ema.tensors["weight"].item()
    assert share == pytest.approx(expected, rel=1e-3) if expected else share < 0.01
    found = warnings(params, updates=updates, batch=10)
    start = (
        f"the averaged weights will still be {expected:.0%} initial weights after {updates} updates: train longer or "
    )
    assert [line.startswith(start) for line in found] == ([True] if expected else [])


def test_averaged_weights_are_put_back_whatever_happens() -> None:
    module = nn.Linear(2, 2)
    own = module.weight.detach().clone()
    ema = Ema(module)
    ema.tensors["weight"].zero_()
    with pytest.raises(RuntimeError), averaged(module, ema):
        assert not module.training
        assert module.weight.abs().sum() == 0
        raise RuntimeError
    assert torch.equal(module.weight, own)
    assert module.training


@pytest.mark.parametrize(
    ("schedule", "update", "expected"),
    [
        ("linear", 0, 1 / 11),
        ("linear", 9, 10 / 11),
        ("linear", 49, 1.0),
        ("linear", 50, 1.0),
        ("linear", 75, 0.5),
        ("linear", 99, 0.02),
        ("cosine", 75, 0.5),
        ("cosine", 62, 0.5 * (1 - math.cos(math.pi * 38 / 50))),
        ("constant", 99, 1.0),
    ],
)
def test_learning_rate(schedule: str, update: int, expected: float) -> None:
    params = OptimizerParams(warmup=10, schedule=schedule, decay_from=0.5)  # type: ignore[arg-type]
    assert optimizers.learning_rate(2.0, params, update, 100) == pytest.approx(2.0 * expected)


def test_step_clips_the_gradient_norm_and_reports_it_unclipped() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([30.0, 40.0])
    norm = optimizers.step(optimizer, 1.0, OptimizerParams(clip=5.0, warmup=0, schedule="constant"), 0, 10)
    assert norm.item() == pytest.approx(50.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0, -4.0]))
    assert parameter.grad is None


def test_denoising_loss_against_a_hand_made_denoiser() -> None:
    """D(x) = x/2 on x0 = 1, eps = 1: the error is (1 + s)/2 - 1."""
    sigma, weight = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    ones = torch.ones(2, 1, 2, 2)
    loss = denoising_loss(lambda x, s, c: x / 2, ones, sigma, ones, NoCondition(2), weight)
    assert loss.item() == pytest.approx((3 * 0.0**2 + 5 * 0.5**2) / 2)


def test_curves_are_window_means_and_survive_a_restart(tmp_path: Path) -> None:
    def walk(break_at: int | None) -> str:
        curves = Curves(800)  # windows of 4 updates
        for step in range(1, 801):
            curves.add(step, {"loss": 1.0 / step})
            if step == 400:
                curves.mark(step, {"validation": 0.125})
            if step == break_at:
                saved = curves.state()
                curves = Curves(800)
                curves.load(saved)
        curves.write(tmp_path / "curves.csv")
        return (tmp_path / "curves.csv").read_text()

    whole = walk(None)
    assert walk(5) == whole
    assert walk(402) == whole
    rows = list(csv.DictReader(whole.splitlines()))
    assert len(rows) == 201
    assert float(rows[0]["loss"]) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, rel=1e-5)
    assert [row["step"] for row in rows if row["validation"]] == ["400"]


def test_states_keep_the_newest_and_fall_back_from_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state.save(tmp_path, step, {"x": torch.tensor(step)}, key="k")
        state.prune(tmp_path, step, keep=2)
    assert [path.name for path in state.saved(tmp_path)] == ["state-000000002.pt", "state-000000003.pt"]
    newest = state.saved(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:50])
    found = state.load_newest(tmp_path, key="k", device=torch.device("cpu"))
    assert found is not None
    assert found[0] == 2
    assert found[1]["x"].item() == 2


def test_states_of_a_later_step_that_cannot_be_read_make_room(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"state-{step:09d}.pt").write_bytes(b"torn")
    for step in (10, 20, 30):
        state.save(tmp_path, step, {"x": torch.tensor(step)}, key="k")
        state.prune(tmp_path, step, keep=2)
    assert [path.name for path in state.saved(tmp_path)] == ["state-000000020.pt", "state-000000030.pt"]


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    state.save(tmp_path, 1, {}, key="these")
    with pytest.raises(InputError, match="belongs to other parameters"):
        state.load_newest(tmp_path, key="those", device=torch.device("cpu"))


class Growing:
    """A training whose one weight grows a billionfold with every update, until float32 holds it no more."""

    updates = 10

    def __init__(self) -> None:
        self.weight = torch.ones(())
        self.ema = Ema(nn.Linear(1, 1))
        self.warnings: list[str] = []

    def update(self, step: int) -> dict[str, torch.Tensor]:
        self.weight = self.weight * 1e9
        return {"loss": self.weight}

    def validate(self, step: int) -> dict[str, float]:
        return {}

    def warm_up(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """1e36 fits into float32, 1e45 does not: the fifth update is the first bad one, however seldom figures are read."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(loop, "SAVING_SHARE", 0)
    operation = OperationParams(save_every=1e-9, log_every=log_every)
    parameters: dict[str, Any] = {}
    world = World(0, 1, torch.device("cpu"))
    with open_work(
        kind="model", stage="train", version=1, parameters=parameters, inputs={}, output=tmp_path / "out"
    ) as work:
        for said in (r"loss became inf at update 5", r"loss became inf at update 5"):  # a second start goes on to it
            with pytest.raises(SurroundingsError, match=said):
                loop.run(Growing(), work=work, world=world, operation=operation, label="grow", tracker=Silent())
            found = state.load_newest(work.state, key=work.key, device=world.device)
            assert found is not None
            assert found[0] == 4
            assert found[1]["training"]["weight"].item() == pytest.approx(1e36)


def test_torchs_generator_is_a_function_of_seed_update_and_rank() -> None:
    def draw(*where: int) -> float:
        seed_torch(*where)
        return torch.rand(()).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(0, 5, 1), draw(1, 5, 1), draw(0, 6, 1), draw(0, 5, 0)}) == 4
