"""How a run samples: sampler, noise levels, guidance and condition, settled from parameters, model and tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.config import ChurnParams, RunParams, denoiser_params
from pipestill.diffusion import samplers
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise, Denoiser, clipped
from pipestill.diffusion.guidance import branches, guided
from pipestill.diffusion.samplers import SAMPLERS, Sample
from pipestill.diffusion.schedules import karras, linear_alpha_sigmas
from pipestill.diffusion.vp import VP
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard, NativeSchedule, wrap
from pipestill.sampling.items import sample_items
from pipestill.sampling.plan import UNCONDITIONAL

LINEAR_ALPHA = "ddim-linear-alpha"  # schedules.linear_alpha_sigmas says what that is


@dataclass(frozen=True)
class Recipe:
    """One way to sample a model; `sigmas` [steps + 1] float64 end in 0."""

    sampler: str
    sigmas: Tensor
    guidance: float
    card: ModelCard
    churn: ChurnParams | None = None
    clip: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def evaluations(self) -> int:
        """Network calls an image, both guidance branches counted."""
        pure = math.isinf(float(self.sigmas[0]))
        return samplers.evaluations(self.sampler, self.steps, pure=pure) * branches(self.guidance)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.card.channels, self.card.resolution, self.card.resolution)

    def solver(self) -> Sample:
        if self.churn is not None:
            churn = self.churn
            return samplers.StochasticHeun(churn.churn, churn.s_min, churn.s_max, churn.noise)
        return SAMPLERS["euler" if self.sampler == LINEAR_ALPHA else self.sampler]

    def denoise(self, denoiser: Denoiser) -> Denoise:
        """The denoiser as this run asks it: guided, its x0 clipped."""
        if self.sampler == LINEAR_ALPHA:
            assert isinstance(denoiser, VP)  # settled so
            denoiser = VP(denoiser.network, sigmas=linear_alpha_sigmas(), autocast=denoiser.autocast)
        denoise = guided(denoiser, self.guidance)
        return clipped(denoise) if self.clip else denoise

    def condition(self, labels: Tensor, device: torch.device) -> Condition:
        """Labels [N] int64 on the host, as the model takes them on `device`; -1 asks for no class."""
        condition = self.card.condition(labels.clamp(min=0).to(device))
        without = labels == UNCONDITIONAL
        return condition.dropped(without.to(device)) if bool(without.any()) else condition

    @torch.inference_mode()
    def sample(self, denoiser: Denoiser, *, seed: int, items: Tensor, labels: Tensor, device: torch.device) -> Tensor:
        """x0 [N, C, H, W] float32 of items [N] with labels [N] (both on the host)."""
        return sample_items(
            self.denoise(denoiser),
            sampler=self.solver(),
            sigmas=self.sigmas,
            condition=self.condition(labels, device),
            seed=seed,
            items=items,
            shape=self.shape,
            device=device,
        )


def settle(run: RunParams, card: ModelCard, tuned: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a run; `tuned` is the content of `tuned.json` where the run takes its range from there.

    Raises InputError where the run asks for what the model cannot do.
    """
    _check_classes(run, card)
    adapter = wrap(nn.Identity(), denoiser_params(card.denoiser))
    if run.sampler == "native":
        native = _native(run, card)
        return Recipe(native.transition, native.sigmas(adapter), run.guidance, card, clip=run.clip)
    return Recipe(run.sampler, _sigmas(run, adapter, tuned), run.guidance, card, run.churn, run.clip)


def _sigmas(run: RunParams, adapter: Denoiser, tuned: Mapping[str, Any] | None) -> Tensor:
    """The noise levels of a run that names its sampler: [steps + 1] float64, ending in 0."""
    assert run.steps is not None  # RunParams sees to it
    if run.sampler == LINEAR_ALPHA:
        return _linear_alpha(run, run.steps, adapter)
    if run.spacing != "karras":
        try:
            return adapter.spaced(run.steps, run.spacing)
        except ValueError as error:
            raise InputError(f"model {run.model}: {error}") from error
    sigma_max, sigma_min = _range(run, adapter, tuned)
    if math.isinf(sigma_max):
        raise InputError(
            f"model {run.model} begins with pure noise, and Karras's noise levels are finite: give sigma_max, or "
            "spacing=trailing"
        )
    if sigma_min > sigma_max:
        raise InputError(f"the sigma range of run.model={run.model} is empty: sigma_min={sigma_min} > {sigma_max}")
    return karras(run.steps, sigma_min, sigma_max, run.rho)


def _linear_alpha(run: RunParams, steps: int, adapter: Denoiser) -> Tensor:
    """The formula's noise levels from step 999 to 0. Raises InputError for a model that predicts no eps."""
    if not isinstance(adapter, VP) or adapter.prediction != "epsilon":
        raise InputError(f"sampler={run.sampler} takes a network's output for eps: model {run.model} predicts another")
    levels = VP(nn.Identity(), sigmas=linear_alpha_sigmas())
    return levels.spaced(steps, "linspace")


def _check_classes(run: RunParams, card: ModelCard) -> None:
    if not card.classes and run.plan != "none":
        raise InputError(f"plan={run.plan}, but model {run.model} has no classes: use plan=none")
    if run.plan == "none" and card.classes and not card.unconditional_branch:
        raise InputError(f"plan=none, but model {run.model} was not trained without a class: use plan=balanced")
    if run.guidance == 1:
        return
    if not card.unconditional_branch:
        raise InputError(
            f"guidance={run.guidance}, but model {run.model} has no unconditional branch: use guidance=1, or train it "
            "with label_dropout above 0"
        )
    if run.plan == "none":
        raise InputError(f"guidance={run.guidance} has nothing to guide by under plan=none: use guidance=1")


def _native(run: RunParams, card: ModelCard) -> NativeSchedule:
    native = card.native
    if native is None:
        raise InputError(
            f"sampler=native, but model {run.model} is a {card.role} without a schedule of its own: "
            "name a sampler and steps"
        )
    if run.steps is not None and run.steps != native.steps:
        raise InputError(
            f"steps={run.steps}, but model {run.model} was distilled for {native.steps} steps: "
            "leave steps out, or name a sampler other than native"
        )
    given = [name for name in ("sigma_max", "sigma_min") if getattr(run, name) is not None]
    if given:
        raise InputError(f"{given[0]} is given, but sampler=native takes the model's own range: leave it out")
    return native


def _range(run: RunParams, adapter: Denoiser, tuned: Mapping[str, Any] | None) -> tuple[float, float]:
    """sigma_max and sigma_min, each: as the run says, else as tuned, else the denoiser's own."""
    sigma_max, sigma_min = adapter.sigma_max, adapter.sigma_min
    if tuned is not None:
        key = solver_key(run.sampler, run.steps or 0)
        if key not in tuned:
            raise InputError(f"sigmas={run.sigmas} holds no {key} (it holds {', '.join(tuned)}): tune it too")
        entry = tuned[key]
        if entry["rho"] != run.rho:
            raise InputError(
                f"rho={run.rho}, but sigmas={run.sigmas} was tuned with rho={entry['rho']}: make them agree"
            )
        sigma_max, sigma_min = entry["sigma_max"], entry["sigma_min"]
    for field in ("sigma_max", "sigma_min"):
        given = getattr(run, field)
        if given is not None and isinstance(adapter, VP) and not adapter.sigma_min <= given <= adapter.sigma_max:
            raise InputError(
                f"{field}={given}, but the schedule of model {run.model} reaches from {adapter.sigma_min:.3g} to "
                f"{adapter.sigma_max:.4g}: stay within"
            )
    return run.sigma_max or sigma_max, run.sigma_min or sigma_min


def solver_key(sampler: str, steps: int) -> str:
    """The name of a sampler with its steps in a tuned artefact: `euler-10`."""
    return f"{sampler}-{steps}"
