"""Measuring a training on its ranks: updates timed whole, then by phase with and without collectives.

The weights that come of it are worth nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipestill.distributed import World
from pipestill.errors import Stopped
from pipestill.progress import Bar
from pipestill.training.clock import PHASES, Clock
from pipestill.training.teacher import TeacherTraining

if TYPE_CHECKING:
    from pipestill.sampling.preview import Previews

WARM_UP = 3  # updates before the first that counts
ROUNDS = 5  # the updates are measured in so many turns, each way of measuring in each turn


@dataclass(frozen=True)
class Measurement:
    """What a group of ranks did; seconds are medians over rounds, of the rank that took longest."""

    ranks: int
    batch: int  # images an update, over all ranks
    seconds: float  # an update
    phases: dict[str, float]  # seconds an update, by phase; `collectives` is what backward takes longer with them
    preview: float  # seconds of one preview
    preview_items: int
    sync: float  # seconds of one copy of the leader's average to all ranks
    spread: float  # the largest seconds an update of a round over the least

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds


def measure(
    training: TeacherTraining, previews: Previews, world: World, *, label: str, batch: int, updates: int
) -> Measurement:
    """Makes so many updates a way and round; the same result on every rank. Raises Stopped where asked to."""
    step = 0
    ways = 2 if world.size == 1 else 3
    bar = Bar(f"measure {label}", WARM_UP + ROUNDS * ways * updates, unit="updates", show=world.leader)

    def make(count: int) -> None:
        nonlocal step
        with world.stop.at_steps():
            for _ in range(count):
                (stop,) = world.agree(world.stop.requested())  # as a training asks, after every update
                if stop:
                    raise Stopped(f"measuring was stopped by {world.stop.reason or 'another rank'}, nothing is kept")
                training.update(step)
                step += 1
                bar.advance()

    def by_phase(apart: bool) -> dict[str, float]:
        training.clock, training.apart = Clock(world.device), apart
        make(updates)
        seconds = training.clock.taken()
        training.clock, training.apart = None, False
        return {name: seconds.get(name, 0.0) / updates for name in PHASES}

    make(WARM_UP)
    whole: list[float] = []
    together: list[dict[str, float]] = []
    apart: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        whole.append(seconds_of(world, lambda: make(updates)) / updates)
        together.append(by_phase(apart=False))
        apart.append(by_phase(apart=True) if world.size > 1 else together[-1])
    bar.close()
    phases = {name: statistics.median(row[name] for row in together) for name in PHASES}
    backward = min(phases["backward"], statistics.median(row["backward"] for row in apart))
    phases |= {"backward": backward, "collectives": phases["backward"] - backward}
    previews.make(0, 0)  # the first may compile, and makes folders
    own = Measurement(
        ranks=world.size,
        batch=batch,
        seconds=statistics.median(whole),
        phases=phases,
        preview=seconds_of(world, lambda: previews.make(1, 0)),
        preview_items=previews.count,
        sync=seconds_of(world, lambda: training.ema.drift(world, mend=True)),
        spread=max(whole) / min(whole),
    )
    return max(world.gather(own), key=lambda each: each.seconds)


def seconds_of(world: World, work: Callable[[], object]) -> float:
    """How long a piece of work takes that all ranks begin together."""
    world.barrier()
    clock = Clock(world.device)
    with clock.phase("work"):
        work()
    return clock.taken()["work"]
