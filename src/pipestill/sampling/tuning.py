"""The choice of a sampler's sigma range: of all candidates, the one whose samples lie nearest the validation part.

Each candidate is a small piece of work of its own, kept as soon as it is measured. It may touch the state folder alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipestill.config import TuneParams
from pipestill.diffusion import samplers
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.diffusion.schedules import karras
from pipestill.distributed import World
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.networks.model import ModelCard
from pipestill.progress import Bar, say
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.recipe import solver_key
from pipestill.work import write_atomic

TABLE = ("solver", "sampler", "steps", "evaluations", "sigma_max", "sigma_min", "distance")


@dataclass(frozen=True)
class Candidate:
    """A sampler with its steps and one sigma range."""

    sampler: str
    steps: int
    sigma_max: float
    sigma_min: float

    @property
    def solver(self) -> str:
        return solver_key(self.sampler, self.steps)

    @property
    def name(self) -> str:
        return f"{self.solver}-{self.sigma_max!r}-{self.sigma_min!r}"


def candidates(params: TuneParams, lowest: float, highest: float) -> list[Candidate]:
    """Every candidate, those of one sigma_max together; one step has no sigma_min to choose.

    Noise levels beyond the model's, `lowest` to `highest`, become these. Raises InputError where no range is left.
    """
    highs = dict.fromkeys(min(high, highest) for high in params.sigma_max)
    lows = dict.fromkeys(max(low, lowest) for low in params.sigma_min)
    ranges = [(high, low) for high in highs for low in lows if low < high]
    if not ranges:
        raise InputError(f"sigma_max={list(params.sigma_max)} and sigma_min={list(params.sigma_min)} make no range")
    named: dict[tuple[str, float, float | None], Candidate] = {}
    for high, low in ranges:
        for solver in params.solvers:
            candidate = Candidate(solver.sampler, solver.steps, high, low)
            named.setdefault((candidate.solver, high, None if solver.steps == 1 else low), candidate)
    return list(named.values())


def measure_all(
    wanted: Sequence[Candidate],
    denoise: Denoise,
    card: ModelCard,
    params: TuneParams,
    *,
    features: Callable[[Tensor], Tensor],
    target: Moments,
    labels: Tensor,
    state: Path,
    world: World,
) -> dict[Candidate, float]:
    """The Fréchet distance of each candidate's `params.images` samples to `target`, in the space of `features`.

    `labels` [params.images] are the classes of the samples. Candidates already in `state` are not measured again.

    Raises Stopped on request and SurroundingsError for samples that are not finite.
    """
    distances = {}
    shared: dict[tuple[float, int], Tensor] = {}
    there = sum((state / f"{candidate.name}.json").exists() for candidate in wanted)
    if there:
        say(f"going on: {there} of {len(wanted)} candidates are measured")
    bar = Bar("tune", len(wanted) * params.images, unit="images", show=world.leader)
    with world.stop.at_steps(), closing(bar):
        for candidate in wanted:
            file = state / f"{candidate.name}.json"
            if file.exists():
                distances[candidate] = float(json.loads(file.read_text(encoding="utf-8")))
                bar.advance(params.images)
                continue
            for key in [key for key in shared if key[0] != candidate.sigma_max]:
                del shared[key]
            table = []
            for first in range(0, params.images, params.micro_batch):
                if world.stop.requested():
                    raise Stopped(
                        f"stopped by {world.stop.reason} after {len(distances)} of {len(wanted)} candidates, all "
                        "kept: start it again to go on"
                    )
                items = torch.arange(first, min(first + params.micro_batch, params.images))
                x0 = _sample(candidate, denoise, card, params, items, labels[items], shared, world.device)
                if not bool(torch.isfinite(x0).all()):
                    raise SurroundingsError(f"{candidate.name}: samples are not finite; train the model anew")
                table.append(features(to_uint8(x0)))
                bar.advance(len(items))
            distances[candidate] = frechet_distance(Moments.of(torch.cat(table)), target)
            write_atomic(file, json.dumps(distances[candidate]))
    return distances


def _sample(
    candidate: Candidate,
    denoise: Denoise,
    card: ModelCard,
    params: TuneParams,
    items: Tensor,
    labels: Tensor,
    shared: dict[tuple[float, int], Tensor],
    device: torch.device,
) -> Tensor:
    """x0 of some items; their first evaluation, which all candidates of one sigma_max share, is done once."""
    key, started = (candidate.sigma_max, int(items[0])), False

    def first_once(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        nonlocal started
        if started:
            return denoise(x, sigma, condition)
        started = True
        if key not in shared:
            shared[key] = denoise(x, sigma, condition)
        return shared[key]

    return sample_items(
        first_once,
        sampler=SAMPLERS[candidate.sampler],
        sigmas=karras(candidate.steps, candidate.sigma_min, candidate.sigma_max, params.rho),
        condition=card.condition(labels.to(device)),
        seed=params.seed,
        items=items,
        shape=(card.channels, card.resolution, card.resolution),
        device=device,
    )


def choose(distances: dict[Candidate, float], rho: float) -> dict[str, Any]:
    """For each solver the range with the least distance, the first of equals, with the table it was chosen from."""
    chosen: dict[str, Any] = {}
    for candidate, distance in distances.items():
        row = {"sigma_max": candidate.sigma_max, "sigma_min": candidate.sigma_min, "distance": distance}
        entry = chosen.setdefault(
            candidate.solver, {"sampler": candidate.sampler, "steps": candidate.steps, "rho": rho, "table": []} | row
        )
        entry["table"].append(row)
        if distance < entry["distance"]:
            entry |= row
    return chosen


def as_csv(distances: dict[Candidate, float]) -> str:
    """Every candidate, one row each, columns as in `TABLE`, solver by solver."""
    lines = [",".join(TABLE)]
    solvers = list(dict.fromkeys(candidate.solver for candidate in distances))
    for candidate, distance in sorted(distances.items(), key=lambda pair: solvers.index(pair[0].solver)):
        row = asdict(candidate) | {
            "solver": candidate.solver,
            "evaluations": samplers.evaluations(candidate.sampler, candidate.steps),
            "distance": distance,
        }
        lines.append(",".join(str(row[column]) for column in TABLE))
    return "\n".join(lines) + "\n"
