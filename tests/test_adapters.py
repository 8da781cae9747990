"""The adapters against each other: the same Gaussian data through every parametrisation, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from pipestill import counter
from pipestill.config import EdmParams, FlowParams, VpParams
from pipestill.diffusion.conditions import NoCondition
from pipestill.diffusion.denoiser import Denoiser, clipped, noised, per_sample
from pipestill.diffusion.samplers import SAMPLERS, ancestral, euler, heun, start
from pipestill.diffusion.schedules import karras, linear_alpha_sigmas, spaced_steps, vp_sigmas
from pipestill.diffusion.vp import VP
from pipestill.networks.model import wrap
from pipestill.networks.schedulers import ddpm_scheduler, training_sigmas

COUNT, SHAPE = 64, (1, 4, 4)
MEAN = torch.linspace(-0.6, 0.6, 16, dtype=torch.float64).view(SHAPE)
VARIANCE = torch.linspace(0.02, 0.5, 16, dtype=torch.float64).view(SHAPE)
NOTHING = NoCondition(COUNT)
SCHEDULES = {
    "linear": VpParams(kind="vp"),
    "scaled_linear": VpParams(kind="vp", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": VpParams(kind="vp", schedule="squaredcos_cap_v2"),
}
PURE = VpParams(
    kind="vp",
    schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction="v_prediction",
    zero_terminal_snr=True,
)


def of(params: VpParams, **changes: object) -> VpParams:
    return VpParams.model_validate(params.plain() | changes)


def draws(purpose: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return counter.normal(0, purpose, torch.arange(COUNT), SHAPE).to(dtype)


def data() -> Tensor:
    return MEAN + VARIANCE.sqrt() * draws("data")


class Optimal(nn.Module):
    """What a perfectly trained network predicts for the Gaussian, from its own inputs alone; computed in their type."""

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.predict = predict
        self.dtype_of = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert x.dtype == self.dtype_of.dtype
        return (self.predict(x, t),)


def posterior(x: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[eps | x] of x = signal·x0 + noise·eps, each by its own formula."""
    mean, variance = MEAN.to(x.dtype), VARIANCE.to(x.dtype)
    total = signal**2 * variance + noise**2
    off = (x - signal * mean) / total
    return mean + signal * variance * off, noise * off


def edm_network(dtype: torch.dtype, data_std: float = 0.5) -> nn.Module:
    def predict(x: Tensor, c_noise: Tensor) -> Tensor:
        """F = (x0 - c_skip·x)/c_out, its numerator written so that nothing cancels."""
        s = per_sample((4 * c_noise).exp(), x)
        x = x * (s**2 + data_std**2).sqrt()
        mean, variance = MEAN.to(x.dtype), VARIANCE.to(x.dtype)
        skipped = (variance - data_std**2) * x / (s**2 + data_std**2) + mean
        return skipped * s / (variance + s**2) * (s**2 + data_std**2).sqrt() / data_std

    return Optimal(predict, dtype)


def vp_network(params: VpParams, dtype: torch.dtype) -> nn.Module:
    sigmas = training_sigmas(params)
    abar = 1 / (1 + sigmas**2)
    rest = torch.where(sigmas.isinf(), torch.ones_like(abar), sigmas**2 / (1 + sigmas**2))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        step = t.round().long()
        assert bool(((t - step).abs() < 1e-3).all()), "the noise level is one of the schedule's"
        signal, noise = (per_sample(table[step].sqrt(), x) for table in (abar, rest))
        x0, eps = posterior(x, signal, noise)
        return eps if params.prediction == "epsilon" else signal * eps - noise * x0

    return Optimal(predict, dtype)


def flow_network(dtype: torch.dtype) -> nn.Module:
    def predict(x: Tensor, thousandths: Tensor) -> Tensor:
        t = per_sample(thousandths.to(x.dtype) / 1000, x)
        x0, eps = posterior(x, 1 - t, t)
        return eps - x0

    return Optimal(predict, dtype)


def closed_form(x: Tensor, sigma: float) -> Tensor:
    if math.isinf(sigma):
        return MEAN.expand_as(x)
    return MEAN + VARIANCE * (x - MEAN) / (VARIANCE + sigma**2)


def furthest(denoiser: Denoiser, levels: Tensor, dtype: torch.dtype) -> float:
    """The largest difference to the closed form over noise levels: the ends, and one in five between them."""
    found = 0.0
    for sigma in torch.cat([levels[:9], levels[9:-9:5], levels[-9:]]).tolist():
        sigmas = torch.full((COUNT,), sigma, dtype=dtype)
        x = noised(data().to(dtype), sigmas, draws("noise", dtype))
        got = denoiser(x, sigmas, NOTHING)
        assert got.dtype == dtype
        found = max(found, float((got.double() - closed_form(x.double(), sigma)).abs().max()))
    return found


@pytest.mark.parametrize("schedule", [*SCHEDULES, "pure"])
def test_v_agrees_with_the_closed_form_everywhere(schedule: str) -> None:
    params = PURE if schedule == "pure" else of(SCHEDULES[schedule], prediction="v_prediction")
    levels = training_sigmas(params)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert furthest(wrap(vp_network(params, dtype), params), levels, dtype) < bound


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eps_agrees_with_the_closed_form_as_far_as_its_arithmetic_reaches(schedule: str) -> None:
    params = SCHEDULES[schedule]
    levels = training_sigmas(params)
    exact = wrap(vp_network(params, torch.float64), params)
    assert furthest(exact, levels, torch.float64) < 1e-10 * max(1.0, exact.sigma_max)
    assert furthest(wrap(vp_network(params, torch.float32), params), levels[levels <= 10], torch.float32) < 1e-5


def test_flow_agrees_with_the_closed_form_everywhere() -> None:
    levels = torch.cat([karras(200, 0.002, 1e4)[:-1], torch.tensor([math.inf], dtype=torch.float64)])
    params = FlowParams(kind="flow")
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert furthest(wrap(flow_network(dtype), params), levels, dtype) < bound


def test_edm_agrees_with_the_closed_form() -> None:
    levels = karras(200, 0.002, 80.0)[:-1]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert furthest(wrap(edm_network(dtype), EdmParams()), levels, dtype) < bound


# --- the noise of a schedule


@pytest.mark.parametrize(("schedule", "last"), [("linear", 157.4), ("scaled_linear", 14.615), ("cosine", 20_291.0)])
def test_the_schedules_are_diffusers(schedule: str, last: float) -> None:
    params = SCHEDULES[schedule]
    sigmas = training_sigmas(params)
    alphas = ddpm_scheduler(params).alphas_cumprod.double()
    torch.testing.assert_close(1 / (1 + sigmas**2), alphas, rtol=3e-5, atol=1e-9)
    assert len(sigmas) == 1000
    assert float(sigmas[-1]) == pytest.approx(last, rel=1e-3)
    assert bool((sigmas.diff() > 0).all())


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    sigmas = training_sigmas(PURE)
    assert math.isinf(float(sigmas[-1]))
    assert bool(sigmas[:-1].isfinite().all())
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction=v_prediction"):
        of(PURE, prediction="epsilon")
    with pytest.raises(ValueError, match="needs v_prediction"):
        VP(nn.Identity(), sigmas=sigmas, prediction="epsilon")


def test_steps_between_two_of_the_schedule() -> None:
    sigmas = training_sigmas(SCHEDULES["linear"])
    fractional = VP(nn.Identity(), sigmas=sigmas)
    torch.testing.assert_close(fractional.step_of(sigmas.float()), torch.arange(1000.0), atol=2e-3, rtol=0)
    between = 0.25 * sigmas[400:900] + 0.75 * sigmas[401:901]
    t = fractional.step_of(between)
    assert bool(((t > torch.arange(400, 900)) & (t < torch.arange(401, 901))).all())
    snapped = VP(nn.Identity(), sigmas=sigmas, time="snapped")
    assert torch.equal(snapped.step_of(between), t.round())
    beyond = torch.tensor([1e-6, 1e6, math.inf], dtype=torch.float64)
    assert fractional.step_of(beyond).tolist() == [0.0, 999.0, 999.0]


def test_training_draws_every_step_alike() -> None:
    sigmas = training_sigmas(PURE)
    denoiser = VP(nn.Identity(), sigmas=sigmas, prediction="v_prediction")
    count = 200_000
    drawn = denoiser.training_sigma(counter.normal(0, "level", torch.arange(count)))
    steps = denoiser.step_of(drawn).round().long()
    assert torch.equal(drawn, sigmas.float()[steps])
    shares = torch.bincount(steps // 100, minlength=10) / count
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.003, rtol=0)
    assert bool(drawn.isinf().any())
    far = torch.tensor([-40.0, 40.0])
    assert denoiser.step_of(denoiser.training_sigma(far)).tolist() == [0.0, 999.0]


def test_weights_make_the_error_of_x0_that_of_the_prediction() -> None:
    """weight·|x0 error|² equals the squared error that a wrong prediction has, for every parametrisation."""
    sigma = torch.tensor([0.05, 0.7, 9.0], dtype=torch.float64)
    x, off = draws("x")[:3], draws("off")[:3]

    class Given(nn.Module):
        def __init__(self, output: Tensor) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.output = output

        def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.output,)

    v = of(SCHEDULES["linear"], prediction="v_prediction")
    for params in (SCHEDULES["linear"], v, FlowParams(kind="flow")):
        right, wrong = (wrap(Given(output), params) for output in (torch.zeros_like(off), off))
        error = (right(x, sigma, NoCondition(3)) - wrong(x, sigma, NoCondition(3))).square()
        for weight in (right.training_weight(sigma), right.fake_score_weight(sigma)):
            torch.testing.assert_close(per_sample(weight, x) * error, off.square(), rtol=1e-9, atol=0)
    gamma = wrap(nn.Identity(), of(v, weighting="min_snr", snr_gamma=5.0)).training_weight(sigma)
    torch.testing.assert_close(gamma, torch.minimum(sigma**-2, torch.full_like(sigma, 5.0)))


def test_ladders_are_finite_and_cover_the_range() -> None:
    for params in (EdmParams(), SCHEDULES["linear"], PURE, FlowParams(kind="flow", shift=3.0)):
        ladder = wrap(nn.Identity(), params).ladder(1000)
        assert ladder.dtype == torch.float64
        assert bool(ladder.isfinite().all())
        assert bool((ladder.diff() > 0).all())
    assert torch.equal(wrap(nn.Identity(), SCHEDULES["linear"]).ladder(1000), training_sigmas(SCHEDULES["linear"]))
    assert len(wrap(nn.Identity(), PURE).ladder(1000)) == 999
    for shift in (0.5, 1.0, 3.0):
        assert float(wrap(nn.Identity(), FlowParams(kind="flow", shift=shift)).ladder(1000)[0]) > 0.002
    lowest = 0.002 / 3.002
    t = lowest + (1 - lowest) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    shifted = 3 * t / (1 + 2 * t)
    ladder = wrap(nn.Identity(), FlowParams(kind="flow", shift=3.0)).ladder(1000)
    torch.testing.assert_close(ladder / (1 + ladder), shifted)


# --- samplers


def test_steps_are_spaced_as_diffusers_does() -> None:
    for spacing in ("trailing", "leading", "linspace"):
        for steps in (1, 4, 7, 10, 16, 50, 999, 1000):
            if (spacing, steps) == ("linspace", 1):
                continue  # where they take the step of least noise
            scheduler = DDPMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            assert spaced_steps(steps, 1000, spacing).tolist() == scheduler.timesteps.tolist(), (spacing, steps)
    with pytest.raises(ValueError, match="1001 steps of a schedule of 1000"):
        spaced_steps(1001, 1000, "leading")
    with pytest.raises(ValueError, match="trailing ones"):
        wrap(nn.Identity(), FlowParams(kind="flow")).spaced(4, "leading")
    with pytest.raises(ValueError, match="have no steps, use karras"):
        wrap(nn.Identity(), EdmParams()).spaced(4, "trailing")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 10, 50, 1000])
def test_ddim_and_ddpm_are_those_of_diffusers(prediction: str, steps: int) -> None:
    params = of(SCHEDULES["scaled_linear"], prediction=prediction)
    denoiser = wrap(vp_network(params, torch.float64), params)
    sigmas = denoiser.spaced(steps, "trailing")
    first = float(sigmas[0])
    x = start(draws("start"), first)
    steps_of = spaced_steps(steps, 1000, "trailing").tolist()
    config = ddpm_scheduler(params).config
    network = denoiser.network

    def by_diffusers(scheduler: DDIMScheduler | DDPMScheduler, **extra: object) -> Tensor:
        scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # theirs is of float32
        scheduler.alphas, scheduler.one = 1 - scheduler.betas.double(), torch.ones((), dtype=torch.float64)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == steps_of
        sample = x / math.sqrt(1 + first**2)
        for t in scheduler.timesteps:
            output = network(sample, t.expand(COUNT), return_dict=False)[0]
            sample = scheduler.step(output, t, sample, **extra).prev_sample
        return sample

    def no_noise(step: int) -> Tensor:
        raise AssertionError("DDIM drew noise")

    ddim = DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)
    torch.testing.assert_close(euler(denoiser, x, sigmas, NOTHING, no_noise), by_diffusers(ddim), rtol=0, atol=1e-9)

    with pytest.MonkeyPatch.context() as patch:
        drawn = iter(range(steps))

        def their_noise(*arguments: object, **named: object) -> Tensor:
            return draws(f"step-{next(drawn)}")

        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", their_noise)
        theirs = by_diffusers(
            DDPMScheduler.from_config(config, timestep_spacing="trailing", variance_type="fixed_small")
        )
    ours = ancestral(denoiser, x, sigmas, NOTHING, lambda step: draws(f"step-{step}"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.var(0)


@pytest.mark.parametrize("kind", ["pure", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "2m", "ddpm", "renoise"])
def test_pure_noise_starts_natively(kind: str, sampler: str) -> None:
    """From an infinite sigma each sampler's first step is x0 + s'·eps, and the Gaussian comes out."""
    params = PURE if kind == "pure" else FlowParams(kind="flow")
    network = vp_network(PURE, torch.float64) if kind == "pure" else flow_network(torch.float64)
    denoiser = wrap(network, params)
    sigmas = denoiser.spaced(1000, "trailing")
    assert math.isinf(float(sigmas[0]))
    eps = draws("start")
    assert torch.equal(start(eps, math.inf), eps)
    stop = torch.cat([sigmas[:2], sigmas.new_zeros(1)])
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor, condition: NoCondition) -> Tensor:
        seen.append(x)
        return denoiser(x, sigma, condition)

    SAMPLERS[sampler](watched, eps, stop, NOTHING, lambda step: draws("fresh"))
    fresh = draws("fresh") if sampler in ("ddpm", "renoise") else eps
    torch.testing.assert_close(seen[1], MEAN + float(sigmas[1]) * fresh, rtol=1e-12, atol=1e-12)
    if sampler == "renoise":
        return  # which is no sampler of the Gaussian at any number of steps
    out = SAMPLERS[sampler](denoiser, eps, sigmas, NOTHING, lambda step: draws(f"step-{step}"))
    if sampler == "ddpm":
        mean, variance = moments_of(out)
        error = (VARIANCE / COUNT).sqrt()
        assert float(((mean - MEAN) / error).abs().max()) < 4
        assert float((variance / VARIANCE).log().abs().max()) < 4 * math.sqrt(2 / COUNT)
    else:  # the probability flow maps eps to mean + sqrt(variance)·eps
        exact = MEAN + VARIANCE.sqrt() * eps
        torch.testing.assert_close(out, exact, rtol=0, atol=0.02)


def test_clipped_keeps_x0_among_images() -> None:
    denoise = clipped(lambda x, sigma, condition: 3 * x)
    x = draws("x")
    assert torch.equal(denoise(x, torch.ones(COUNT), NOTHING), (3 * x).clamp(-1, 1))


# --- the formula that takes alpha = 1 - t/1000 for abar


def formula(network: nn.Module, x: Tensor, steps: int) -> Tensor:
    """As it is written down: alpha_t = max(1 - t/1000, 1e-3), ten DDIM steps from t = 999 to 0, the last alpha 1."""
    times = torch.linspace(999, 0, steps).round().long().tolist()
    for i, t in enumerate(times):
        alpha = max(1 - t / 1000, 1e-3)
        after = max(1 - times[i + 1] / 1000, 1e-3) if i + 1 < steps else 1.0
        eps = network(x, torch.full((COUNT,), t), return_dict=False)[0]
        x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    return x


def test_the_linear_alpha_formula_is_reproduced_and_is_not_ddim() -> None:
    params = SCHEDULES["linear"]
    network = vp_network(params, torch.float64)
    theirs = VP(network, sigmas=linear_alpha_sigmas())
    sigmas = theirs.spaced(10, "linspace")
    first = float(sigmas[0])
    assert first == pytest.approx(math.sqrt(0.999 / 0.001))
    x = start(draws("start"), first)

    def no_noise(step: int) -> Tensor:
        raise AssertionError("the formula draws no noise")

    out = euler(theirs, x, sigmas, NOTHING, no_noise)
    torch.testing.assert_close(out, formula(network, x * math.sqrt(0.001), 10), rtol=0, atol=1e-9)

    right = wrap(network, params)
    exact = MEAN + VARIANCE.sqrt() * draws("start")
    errors: dict[str, list[float]] = {"formula": [], "ddim": []}
    for steps in (10, 1000):
        for name, denoiser, spacing in (("formula", theirs, "linspace"), ("ddim", right, "trailing")):
            levels = denoiser.spaced(steps, spacing)
            out = euler(denoiser, start(draws("start"), float(levels[0])), levels, NOTHING, no_noise)
            errors[name].append(float((out - exact).abs().mean()))
    assert errors["ddim"][1] < 0.02 * errors["ddim"][0], "DDIM comes to the data with more steps"
    assert errors["formula"][1] > errors["formula"][0] > errors["ddim"][0], "the formula does not"
    # where they differ: at the same t, in the noise that the image holds
    schedule, taken = training_sigmas(params), linear_alpha_sigmas()
    assert (float(schedule[500]), float(taken[500])) == (pytest.approx(3.443, abs=1e-3), pytest.approx(1.0))
    # and its last evaluation, at t = 0, asks about an image without noise and changes nothing
    assert (float(sigmas[-2]), float(sigmas[-1])) == (0.0, 0.0)


def test_the_formula_is_right_for_a_network_that_is_trained_on_its_schedule() -> None:
    sigmas = linear_alpha_sigmas()
    abar = 1 / (1 + sigmas**2)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        signal = per_sample(abar[t.round().long()].sqrt(), x)
        return posterior(x, signal, (1 - signal**2).sqrt())[1]

    denoiser = VP(Optimal(predict, torch.float64), sigmas=sigmas)
    levels = denoiser.spaced(1000, "linspace")
    x = start(draws("start"), float(levels[0]))
    out = heun(denoiser, x, levels[:-1], NOTHING, lambda step: x)
    torch.testing.assert_close(out, MEAN + VARIANCE.sqrt() * draws("start"), rtol=0, atol=0.03)


def test_vp_sigmas_are_exact_where_little_noise_is_left() -> None:
    betas = torch.tensor([1e-6, 1e-6, 0.5], dtype=torch.float64)
    expected = torch.tensor([1e-6, 1 - (1 - 1e-6) ** 2, 1 - 0.5 * (1 - 1e-6) ** 2], dtype=torch.float64)
    torch.testing.assert_close(vp_sigmas(betas) ** 2, expected / (1 - expected), rtol=1e-9, atol=0)
