"""The loop that every training runs in: resume, update, check, log, validate, save, stop.

What is trained is a `Training`; the loop knows nothing of it but this protocol, so teacher and student share it.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pipestill.config import OperationParams
from pipestill.distributed import World
from pipestill.errors import Stopped, SurroundingsError
from pipestill.progress import Bar, say, warn
from pipestill.training import following
from pipestill.training import state as states
from pipestill.training.curves import Curves
from pipestill.training.ema import Ema
from pipestill.training.tracking import Tracker
from pipestill.work import Work

if TYPE_CHECKING:
    from pipestill.sampling.preview import Previews

SAVING_SHARE = 20  # a state is saved at most so seldom that saving takes a twentieth of the time
SAVES_IN_MARGIN = 2  # so many times the longest saving so far, and the longest step, are left before a job's end


class Training(Protocol):
    """What the loop trains. Every method is called on every rank at the same step."""

    updates: int
    ema: Ema
    warnings: list[str]  # what a user should know before it begins

    def update(self, step: int) -> dict[str, Tensor]:
        """Does update `step` (from 0); returns its figures as scalars on the device."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Figures after `step` updates, the same on every rank; empty where none are due."""
        ...

    def epoch(self, step: int) -> int:
        """How often the data was gone through after `step` updates."""
        ...

    def warm_up(self) -> None:
        """Fixes whatever the first update would otherwise fix (DDP's buckets), changing no weight."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def run(
    training: Training,
    *,
    work: Work,
    world: World,
    operation: OperationParams,
    label: str,
    tracker: Tracker,
    preview: Previews | None = None,
) -> Curves:
    """Trains to the end, from the newest saved state if there is one; returns the curves.

    Raises Stopped (state saved) on request or at the deadline, SurroundingsError at the first update whose figures
    are not finite (the last good state is kept).
    """
    curves = Curves(training.updates)
    first = _resume(training, curves, work, world)
    training.warm_up()
    figures = _Figures(world, curves, tracker, first)
    bar = Bar(label, training.updates, done=first, unit="updates", show=world.leader)
    if preview is not None:
        if world.leader:
            preview.estimate()
        world.await_leader(f"{work.key}/estimated")
    last_saved = last_step = time.monotonic()
    pause = operation.save_every
    longest_save = longest_step = 0.0
    measured = first
    affordable = preview is not None and preview.unlimited  # the leader's word after the update before

    def drifted(step: int, *, mend: bool) -> None:
        """Measures the ranks' averages, once after an update whatever asks for it."""
        nonlocal measured
        if world.size == 1 or step == measured:
            return
        measured = step
        drift = training.ema.drift(world, mend=mend)
        tracker.log(step, {"ema_drift": drift})
        if drift != 0 and world.leader:
            done = (
                "all take the first rank's"
                if mend
                else "only the first rank's is kept, ema.sync_every makes them equal"
            )
            warn(f"after update {step} the ranks' averages differ by up to {drift:.3g}: {done}")

    def save(step: int) -> None:
        nonlocal last_saved, pause, longest_save
        begun = time.monotonic()
        figures.flush()
        drifted(step, mend=False)
        if world.leader:
            body = {"training": training.state(), "curves": curves.state()}
            states.save(work.state, step, body, key=work.key)
            following.note(work.folder, step)
            states.prune(work.state, step, keep=operation.keep_states)
        world.await_leader(f"{work.key}/saved/{step}")
        last_saved = time.monotonic()
        pause = max(operation.save_every, SAVING_SHARE * (last_saved - begun))
        longest_save = max(longest_save, last_saved - begun)

    with world.stop.at_steps(), closing(bar):
        for step in range(first, training.updates):
            figures.append(training.update(step))
            done = step + 1
            if done % operation.log_every == 0 or done == training.updates:
                bar.advance(0, **figures.flush())
            bar.advance()
            if training.ema.sync_every and done % training.ema.sync_every == 0:
                drifted(done, mend=True)
            marked = training.validate(done)
            if marked:  # every rank's average had its share in it
                drifted(done, mend=False)
                figures.flush()
                curves.mark(done, marked)
                tracker.log(done, marked)
                bar.advance(0, **marked)
            if preview is not None and preview.wanted(done, training.epoch(done), training.epoch(step)) and affordable:
                preview.make(done, training.epoch(done))
            longest_step = max(longest_step, time.monotonic() - last_step)
            last_step = time.monotonic()
            world.stop.margin = max(operation.margin, SAVES_IN_MARGIN * longest_save + longest_step)
            stop, due, affordable = world.agree(
                world.stop.requested(),
                world.leader and time.monotonic() - last_saved >= pause,
                world.leader and preview is not None and preview.affordable(),
            )
            if stop or (due and done < training.updates):
                save(done)
                last_step = time.monotonic()
            if stop:
                raise Stopped(
                    f"stopped by {world.stop.reason or 'another rank'} after update {done} of {training.updates}, "
                    "state saved: start it again to go on"
                )
    return curves


def _resume(training: Training, curves: Curves, work: Work, world: World) -> int:
    """Loads the newest state; every rank reads the step that the leader found. Returns the updates done."""
    found = states.load_newest(work.state, key=work.key, device=world.device)
    steps = world.gather(found[0] if found else 0)
    if len(set(steps)) > 1:
        raise SurroundingsError(f"ranks see different states ({steps}): is {work.state} on a shared file system?")
    if world.leader:
        following.note(work.folder, *map(states.step_of, states.saved(work.state)))
    if found is None:
        return 0
    step, body = found
    training.load(body["training"])
    curves.load(body["curves"])
    if world.leader:
        say(f"going on after update {step} of {training.updates}")
    return step


class _Figures:
    """Figures of updates, kept on the device until they are due, then averaged over ranks and checked."""

    def __init__(self, world: World, curves: Curves, tracker: Tracker, first: int) -> None:
        self._world, self._curves, self._tracker = world, curves, tracker
        self._waiting: list[dict[str, Tensor]] = []
        self._step = first

    def append(self, figures: dict[str, Tensor]) -> None:
        self._waiting.append(figures)

    def flush(self) -> dict[str, float]:
        """Takes the waiting figures to the host; returns the last update's."""
        last: dict[str, float] = {}
        if not self._waiting:
            return last
        flat = torch.stack([value.detach().float() for figures in self._waiting for value in figures.values()])
        # added in order of ranks: a reduction's own order would depend on how many figures happen to wait
        over_ranks = torch.tensor(self._world.gather(flat.tolist()), dtype=torch.float64)
        values = iter((over_ranks.sum(0) / self._world.size).tolist())
        for figures in self._waiting:
            self._step += 1
            last = {name: next(values) for name in figures}
            for name, value in last.items():
                if not math.isfinite(value):
                    raise SurroundingsError(
                        f"{name} became {value} at update {self._step}: the last good state is kept; "
                        "lower the learning rate or use fp32, which begins anew under the new parameters"
                    )
            self._curves.add(self._step, last)
            self._tracker.log(self._step, last)
        self._waiting = []
        return last
