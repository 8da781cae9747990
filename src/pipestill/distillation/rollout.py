"""Backward simulation: the student walks from fresh noise with the sampler's own step function, without gradient.

What a rollout leaves are the inputs of student steps: the states at which the student is then trained. Three sources
of them differ in what a state costs: `Fresh`, `EveryStep` and `Pool`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipestill import counter
from pipestill.config import StudentParams
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise
from pipestill.diffusion.samplers import Transition, start, walk
from pipestill.distributed import World
from pipestill.errors import InputError


@dataclass(frozen=True)
class States:
    """Inputs of student steps: x [N, C, H, W] at noise levels sigma [N], with their conditions.

    `outputs` are the student's x0 there where the rollout computed them on its way, else None.
    """

    x: Tensor
    sigma: Tensor
    condition: Condition
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """Where a rollout begins: items with their conditions, and the schedule that they walk."""

    items: Tensor  # [N] int64, on the device of the student
    condition: Condition
    sigmas: Tensor  # [steps + 1], the last 0
    transition: Transition
    seed: int
    purpose: str
    shape: tuple[int, ...]  # C, H, W

    def latent(self) -> Tensor:
        """Where sampling starts, by item, [N, C, H, W]."""
        return start(counter.normal(self.seed, f"{self.purpose}/latent", self.items, self.shape), float(self.sigmas[0]))

    def noise(self, step: int) -> Tensor:
        """The fresh noise of a renoising step, by item."""
        return counter.normal(self.seed, f"{self.purpose}/step", self.items, self.shape, draw=step)


@torch.no_grad()
def fresh(denoise: Denoise, start: Start, stop: int) -> States:
    """Walks every item to step `stop`, one stop for the whole batch, as published (DMD2, section 4.5)."""
    x = walk(denoise, start.latent(), start.sigmas, start.condition, start.noise, start.transition, steps=stop)
    return States(x, x.new_full((len(x),), float(start.sigmas[stop])), start.condition)


@torch.no_grad()
def every_step(denoise: Denoise, start: Start) -> States:
    """Walks every item to the end and keeps the input of each step: steps × items states, with their outputs.

    Step by step, all items of a step together. Equal shares of all steps at one student forward a state, where
    `fresh` spends (steps + 1) / 2.
    """
    inputs, outputs, levels = [], [], []

    def recording(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        x0 = denoise(x, sigma, condition)
        inputs.append(x)
        outputs.append(x0)
        levels.append(sigma)
        return x0

    walk(recording, start.latent(), start.sigmas, start.condition, start.noise, start.transition)
    order = torch.arange(len(start.items), device=start.items.device).repeat(len(levels))
    return States(torch.cat(inputs), torch.cat(levels), start.condition.select(order), torch.cat(outputs))


@dataclass(frozen=True)
class Walkers:
    """What every source walks with: the student, its schedule and where conditions of items come from."""

    student: Denoise
    condition: Callable[[Tensor], Condition]  # of items [N], on their device
    sigmas: Tensor
    transition: Transition
    seed: int
    shape: tuple[int, ...]
    world: World

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def start(self, items: Tensor) -> Start:
        """The start of items [N] int64."""
        return Start(items, self.condition(items), self.sigmas, self.transition, self.seed, "distill", self.shape)


class Source(Protocol):
    """Where the student inputs of a turn come from: the same ones together for any number of ranks."""

    states: int  # in a turn, over all ranks
    share: float  # this rank's states by an even share: DDP takes the mean over ranks, so each counts by its own

    def take(self, turn: int) -> tuple[States, Tensor]:
        """This rank's inputs of a turn, and for each the number [N] int64 that its further noise belongs to."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def source(params: StudentParams, walkers: Walkers) -> Source:
    """The source that `params.rollout` names. Raises InputError where there are more ranks than trajectories."""
    if params.rollout == "fresh":
        return Fresh(walkers, params.batch)
    if params.rollout == "every_step":
        return EveryStep(walkers, params.batch)
    turns = params.pool.updates * params.update_ratio
    return Pool(walkers, params.batch, turns=turns, uses=params.pool.uses)


class Fresh:
    """As published (DMD2, section 4.5): every trajectory of a turn is walked to one step, drawn for the turn."""

    def __init__(self, walkers: Walkers, batch: int) -> None:
        self._walkers, self.states = walkers, batch
        self._own, self.share = _shared(batch, batch, walkers)

    def take(self, turn: int) -> tuple[States, Tensor]:
        steps, items = self._walkers.steps, _items(self._own, turn * self.states, self._walkers)
        stop = int(counter.integers(self._walkers.seed, "distill/stop", torch.tensor([turn]), steps))
        return fresh(self._walkers.student, self._walkers.start(items), stop), items * steps + stop

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class EveryStep:
    """Fewer trajectories, walked to the end: every step of each is a state, so `batch` is rounded up to whole ones."""

    def __init__(self, walkers: Walkers, batch: int) -> None:
        self._walkers, self._count = walkers, math.ceil(batch / walkers.steps)
        self._own, self.share = _shared(self._count, batch, walkers)
        self.states = self._count * walkers.steps

    def take(self, turn: int) -> tuple[States, Tensor]:
        steps, items = self._walkers.steps, _items(self._own, turn * self._count, self._walkers)
        numbers = items * steps + torch.arange(steps, device=items.device)[:, None]
        return every_step(self._walkers.student, self._walkers.start(items)), numbers.flatten()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Pool:
    """One rollout of many trajectories serves several turns: their inputs wait in a pool, outputs never do.

    Each input is taken `uses` times and is at most `turns` turns old; then the pool is filled anew. A turn holds equal
    shares of all steps (by one at most), mostly of different trajectories. A state costs 1 + 1/uses student
    forwards; the rollout runs turns/(steps·uses) times a turn's batch of trajectories, a turn's batch at once.
    """

    def __init__(self, walkers: Walkers, batch: int, *, turns: int, uses: int) -> None:
        self._walkers, self.states, self._turns, self._uses = walkers, batch, turns, uses
        self._count = math.ceil(turns * batch / (walkers.steps * uses))
        self._own, _ = _shared(self._count, batch, walkers)
        self._slots, self.share = _shared(batch, batch, walkers)
        self._filled = -1  # which filling the inputs are of
        self._inputs = torch.empty(0)  # [trajectories, steps, C, H, W], of all ranks

    def take(self, turn: int) -> tuple[States, Tensor]:
        filling, age = divmod(turn, self._turns)
        if filling != self._filled:
            self._fill(filling)
        device = self._walkers.world.device
        first, last = (age * self.states + slot for slot in self._slots)
        trajectories, steps = (column[first:last].to(device) for column in self._order(filling))
        condition = self._walkers.condition(trajectories + filling * self._count)
        levels = self._walkers.sigmas.float().to(device)[steps]
        numbers = torch.arange(*self._slots, device=device) + turn * self.states
        return States(self._inputs[trajectories, steps], levels, condition), numbers

    def _fill(self, filling: int) -> None:
        walkers = self._walkers
        own = []
        for items in _items(self._own, filling * self._count, walkers).split(self._slots[1] - self._slots[0]):
            walked = every_step(walkers.student, walkers.start(items))
            own.append(walked.x.unflatten(0, (walkers.steps, -1)).transpose(0, 1))
        self._inputs, self._filled = walkers.world.rows(torch.cat(own)), filling

    def _order(self, filling: int) -> tuple[Tensor, Tensor]:
        """Trajectory and step of each state of a filling, in the order in which turns take them."""
        shape = (self._uses, self._walkers.steps, self._count)
        size = math.prod(shape)
        keys = counter.uniform(self._walkers.seed, "distill/pool", torch.arange(size) + filling * size)
        trajectories = keys.view(shape).argsort(dim=2, stable=True).transpose(1, 2)
        return trajectories.flatten(), torch.arange(self._walkers.steps).expand(trajectories.shape).flatten()

    def state(self) -> dict[str, Any]:
        return {"filled": self._filled, "inputs": self._inputs}

    def load(self, state: dict[str, Any]) -> None:
        self._filled, self._inputs = state["filled"], state["inputs"]


def _shared(count: int, batch: int, walkers: Walkers) -> tuple[tuple[int, int], float]:
    """This rank's range of `count` trajectories or states, and its size by that of an even share."""
    rank, size = walkers.world.rank, walkers.world.size
    if count < size:
        raise InputError(
            f"batch={batch} gives {count} trajectories of {walkers.steps} steps, too few for {size} ranks: "
            "raise batch, or use fewer ranks"
        )
    first, last = rank * count // size, (rank + 1) * count // size
    return (first, last), (last - first) * size / count


def _items(own: tuple[int, int], offset: int, walkers: Walkers) -> Tensor:
    return torch.arange(*own, device=walkers.world.device) + offset
