"""Denoiser, schedules, samplers and guidance against formulas, closed forms and each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipestill import counter
from pipestill.diffusion.conditions import ClassCondition, Condition, NoCondition
from pipestill.diffusion.denoiser import per_sample
from pipestill.diffusion.edm import EDM
from pipestill.diffusion.guidance import branches, guided
from pipestill.diffusion.samplers import (
    SAMPLERS,
    StochasticHeun,
    dpm_solver_2m,
    euler,
    euler_step,
    evaluations,
    heun,
    renoise,
    renoise_step,
    walk,
)
from pipestill.diffusion.schedules import karras

DATA = 0.5  # standard deviation of the Gaussian data
NOTHING = NoCondition(6)


def gaussian(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The exact denoiser of data N(0, DATA²): D(x; s) = sd²·x / (sd² + s²)."""
    return DATA**2 * x / (DATA**2 + per_sample(sigma, x) ** 2)


def no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def start(sigma: float, shape: tuple[int, ...] = (6, 1, 4, 4)) -> Tensor:
    return sigma * counter.normal(0, "start", torch.arange(shape[0]), shape[1:]).double()


class Network(nn.Module):
    """A network that shows what reached it: F(x, t) = a·x + t + class, in its own type."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.seen.append((x, t))
        assert not return_dict
        shift = 0 if class_labels is None else per_sample(class_labels, x)
        return (self.a * x + per_sample(t, x) + shift,)


# --- EDM's preconditioning


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 3.0, 80.0, 20_000.0])
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_edm_is_the_papers_preconditioning(sigma: float, data: float) -> None:
    network = Network(torch.float64)
    x, labels = start(sigma), torch.tensor([0, 1, 2, 0, 1, 2])
    sigmas = torch.full((6,), sigma, dtype=torch.float64)
    got = EDM(network, sigma_data=data)(x, sigmas, ClassCondition(labels, None))
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / math.sqrt(sigma**2 + data**2)
    c_in, c_noise = 1 / math.sqrt(sigma**2 + data**2), math.log(sigma) / 4
    inner = network.a.detach() * c_in * x + c_noise + labels[:, None, None, None]
    torch.testing.assert_close(got, c_skip * x + c_out * inner, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.seen[0][0], c_in * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(network.seen[0][1], torch.full((6,), c_noise, dtype=torch.float64), rtol=1e-12, atol=0)


def test_edm_takes_a_noise_level_a_sample() -> None:
    denoiser = EDM(Network())
    x, sigmas = start(1.0).float(), torch.tensor([0.002, 0.1, 1.0, 5.0, 80.0, 2.0])
    together = denoiser(x, sigmas, NOTHING)
    for row, sigma in enumerate(sigmas):
        alone = denoiser(x[row : row + 1], sigma[None], NoCondition(1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-7)


def test_edm_keeps_little_noise_and_drops_pure_noise() -> None:
    network = Network()
    network.a.data.zero_()
    denoiser = EDM(network)
    x = start(1.0).float()
    clean = denoiser(x, torch.full((6,), 1e-5), NOTHING)
    torch.testing.assert_close(clean, x, atol=1e-4, rtol=0)
    blind = denoiser(1e5 * x, torch.full((6,), 1e5), NOTHING)  # c_out -> sd, c_skip·x -> 0
    torch.testing.assert_close(blind, torch.full_like(x, 0.5 * math.log(1e5) / 4), atol=2e-5, rtol=0)


def test_edm_computes_around_the_network_in_the_type_of_x() -> None:
    network = Network(torch.bfloat16)
    x = start(2.0)
    out = EDM(network)(x, torch.full((6,), 2.0, dtype=torch.float64), NOTHING)
    assert out.dtype == torch.float64
    assert network.seen[0][0].dtype == torch.bfloat16
    c_skip = 0.25 / 4.25
    torch.testing.assert_close(out - c_skip * x, (out - c_skip * x).bfloat16().double(), rtol=1e-2, atol=1e-2)


def test_autocast_runs_the_network_alone_in_bf16() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            out = self.layer(x)
            self.seen.append(out.dtype)
            return (out,)

    network = Linear()
    out = EDM(network, autocast=torch.bfloat16)(start(1.0).float(), torch.ones(6), NOTHING)
    assert (network.seen, out.dtype) == ([torch.bfloat16], torch.float32)
    assert network.layer.weight.dtype == torch.float32


def test_edms_weights_and_noise_law() -> None:
    denoiser = EDM(Network(), sigma_data=0.5, p_mean=-1.2, p_std=1.2)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser.training_weight(sigma), (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    torch.testing.assert_close(denoiser.fake_score_weight(sigma), sigma**-2 + 4.0)
    normal = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser.training_sigma(normal), torch.exp(-1.2 + 1.2 * normal))


# --- schedules


def test_karras_is_the_formula_of_the_paper() -> None:
    """Karras et al. 2022, eq. 5, for 80, 0.002, rho 7 and ten steps, and the figures that it is known by."""
    sigmas = karras(10, 0.002, 80.0)
    formula = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    torch.testing.assert_close(sigmas[:-1], torch.tensor(formula, dtype=torch.float64), rtol=1e-12, atol=0)
    known = [80, 42.42, 21.11, 9.72, 4.07, 1.50, 0.47, 0.117, 0.0204, 0.002]
    torch.testing.assert_close(sigmas[:-1], torch.tensor(known, dtype=torch.float64), rtol=5e-3, atol=0)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_karras_ends_where_it_should(steps: int, rho: float) -> None:
    sigmas = karras(steps, 0.05, 8.0, rho)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == steps + 1
    assert (sigmas[0].item(), sigmas[-1].item()) == (8.0, 0.0)
    assert (sigmas.diff() < 0).all()
    if steps > 1:
        assert sigmas[-2].item() == pytest.approx(0.05, rel=1e-12)
    if rho == 1.0 and steps > 2:
        torch.testing.assert_close(sigmas[:-1].diff(), torch.full((steps - 1,), -7.95 / (steps - 1)).double())


@pytest.mark.parametrize(("steps", "low", "high"), [(0, 0.1, 1.0), (3, 0.0, 1.0), (3, 2.0, 1.0), (3, -1.0, 1.0)])
def test_karras_refuses_what_is_no_schedule(steps: int, low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        karras(steps, low, high)


# --- samplers against the closed form of Gaussian data


def _exact(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The probability-flow ODE's solution for Gaussian data: x·sqrt((sd² + s'²)/(sd² + s²))."""
    return x * math.sqrt((DATA**2 + sigma_next**2) / (DATA**2 + sigma**2))


def _error(sampler: Callable[..., Tensor], steps: int, rho: float = 7.0) -> float:
    """Error at sigma 0.05 of a solve from 8; a final 0 would add each sampler's own last step."""
    sigmas = karras(steps, 0.05, 8.0, rho)[:-1]
    x = start(8.0)
    return float((sampler(gaussian, x, sigmas, NOTHING, no_noise) - _exact(x, 8.0, 0.05)).abs().max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("2m", 2.0)])
def test_each_sampler_converges_with_its_order(name: str, order: float) -> None:
    errors = [_error(SAMPLERS[name], steps) for steps in (65, 129, 257)]
    found = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert errors[-1] < 0.02
    assert found[1] == pytest.approx(order, abs=0.15)


def test_all_deterministic_samplers_go_to_the_same_images() -> None:
    sigmas, x = karras(400, 0.002, 80.0), start(80.0)
    expected = _exact(x, 80.0, 0.0)
    for name, tolerance in (("euler", 2e-2), ("heun", 5e-4), ("2m", 5e-4)):
        got = SAMPLERS[name](gaussian, x, sigmas, NOTHING, no_noise)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_one_step_is_one_denoising_for_every_sampler() -> None:
    sigmas, x = karras(1, 0.05, 8.0), start(8.0)
    expected = gaussian(x, torch.full((6,), 8.0, dtype=torch.float64), NOTHING)
    for name, sampler in SAMPLERS.items():
        got = sampler(gaussian, x, sigmas, NOTHING, no_noise)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)


def test_2m_is_exact_where_the_clean_image_is_known() -> None:
    """With a constant x0 the multistep solver's exponential integrator makes no error, whatever the steps."""
    target = start(1.0)
    sigmas = karras(3, 0.05, 8.0)[:-1]
    x = target + 8.0 * start(1.0).flip(0)
    got = dpm_solver_2m(lambda *_: target, x, sigmas, NOTHING, no_noise)
    torch.testing.assert_close(got, target + 0.05 / 8.0 * (x - target), rtol=1e-12, atol=1e-12)


def test_2m_extrapolates_as_the_paper_says() -> None:
    """Two steps by hand (Lu et al. 2022b, algorithm 2): D = (1 + 1/2r)·D_1 - 1/2r·D_0, r = h_0/h_1."""
    sigmas, x = torch.tensor([8.0, 2.0, 0.7], dtype=torch.float64), start(8.0)

    def at(sigma: float) -> Tensor:
        return torch.full((6,), sigma, dtype=torch.float64)

    first = gaussian(x, at(8.0), NOTHING)
    middle = first + 2.0 / 8.0 * (x - first)
    second = gaussian(middle, at(2.0), NOTHING)
    ratio = math.log(8.0 / 2.0) / math.log(2.0 / 0.7)
    estimate = second + (second - first) / (2 * ratio)
    expected = estimate + 0.7 / 2.0 * (middle - estimate)
    torch.testing.assert_close(dpm_solver_2m(gaussian, x, sigmas, NOTHING, no_noise), expected, rtol=1e-12, atol=1e-12)


def test_euler_step_is_ddim() -> None:
    """DDIM without noise keeps the direction: x' = x0 + s'·eps with eps = (x - x0)/s."""
    x, x0 = start(3.0), start(1.0).flip(0)
    eps = (x - x0) / 3.0
    torch.testing.assert_close(euler_step(x, x0, 3.0, 1.1), x0 + 1.1 * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(renoise_step(x0, 1.1, eps), x0 + 1.1 * eps, rtol=0, atol=0)


def test_renoising_draws_afresh_for_each_step_but_the_last() -> None:
    sigmas, x = karras(4, 0.05, 8.0), start(8.0)
    drawn: list[int] = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return counter.normal(1, "step", torch.arange(6), x.shape[1:], draw=step).double()

    got = renoise(gaussian, x, sigmas, NOTHING, noise)
    assert drawn == [0, 1, 2]
    levels, state = sigmas.tolist(), x
    for i in range(4):
        clean = gaussian(state, torch.full((6,), levels[i], dtype=torch.float64), NOTHING)
        eps = counter.normal(1, "step", torch.arange(6), x.shape[1:], draw=i).double()
        state = clean + levels[i + 1] * eps
    torch.testing.assert_close(got, state, rtol=1e-12, atol=1e-12)


def test_renoising_keeps_gaussian_data_gaussian() -> None:
    """Each x0 shrinks to variance sd⁴/(sd² + s²), noise lifts it by s'²: the last denoising's variance follows."""
    items = torch.arange(4000)
    sigmas = torch.tensor([8.0, 1.0, 0.3, 0.0])
    x = 8.0 * counter.normal(0, "start", items, (1, 2, 2))
    got = renoise(gaussian, x, sigmas, NoCondition(4000), lambda i: counter.normal(0, "step", items, (1, 2, 2), draw=i))
    variance = 64.0
    for sigma, sigma_next in ((8.0, 1.0), (1.0, 0.3), (0.3, 0.0)):
        variance = variance * (DATA**2 / (DATA**2 + sigma**2)) ** 2 + sigma_next**2
    assert got.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("transition", ["euler", "renoise"])
def test_a_walk_can_be_stopped_and_gone_on_with_bit_for_bit(transition: str) -> None:
    sigmas, x = karras(6, 0.05, 8.0), start(8.0).float()

    def noise(step: int) -> Tensor:
        return counter.normal(1, "step", torch.arange(6), x.shape[1:], draw=step)

    whole = SAMPLERS[transition](gaussian, x, sigmas, NOTHING, noise)
    assert torch.equal(walk(gaussian, x, sigmas, NOTHING, noise, transition), whole)  # type: ignore[arg-type]
    for stop in range(7):
        part = walk(gaussian, x, sigmas, NOTHING, noise, transition, steps=stop)  # type: ignore[arg-type]
        rest = walk(gaussian, part, sigmas[stop:], NOTHING, lambda i, at=stop: noise(at + i), transition)  # type: ignore[arg-type, misc]
        assert torch.equal(rest, whole)


# --- the stochastic sampler


def test_no_churn_is_heun() -> None:
    sigmas, x = karras(12, 0.002, 80.0), start(80.0)
    quiet = StochasticHeun(churn=0.0)(gaussian, x, sigmas, NOTHING, no_noise)
    assert torch.equal(quiet, heun(gaussian, x, sigmas, NOTHING, no_noise))


def test_churn_is_added_inside_its_range_only_and_as_the_paper_says() -> None:
    sigmas = torch.tensor([20.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    sampler = StochasticHeun(churn=0.9, s_min=2.0, s_max=10.0, s_noise=1.1)
    x, eps = start(20.0), start(1.0).flip(0)
    drawn: list[int] = []
    seen: list[float] = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return eps

    def watching(state: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        seen.append(float(sigma[0]))
        return gaussian(state, sigma, condition)

    got = sampler(watching, x, sigmas, NOTHING, noise)
    gamma = 0.9 / 3
    assert drawn == [1]
    assert seen == pytest.approx([20.0, 4.0, 4.0 * (1 + gamma), 1.0, 1.0])
    at_four = heun(gaussian, x, sigmas[:2], NOTHING, no_noise)
    churned = at_four + math.sqrt((4 * (1 + gamma)) ** 2 - 16) * 1.1 * eps
    rest = torch.tensor([4 * (1 + gamma), 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(got, heun(gaussian, churned, rest, NOTHING, no_noise), rtol=1e-12, atol=1e-12)


def test_churn_is_bounded_by_the_square_root_of_two() -> None:
    seen: list[float] = []

    def watching(state: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        seen.append(float(sigma[0]))
        return gaussian(state, sigma, condition)

    sigmas = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    StochasticHeun(churn=100.0, s_min=0, s_max=50)(watching, start(4.0), sigmas, NOTHING, lambda i: start(1.0))
    assert seen[0] == pytest.approx(4 * math.sqrt(2))


def test_the_stochastic_sampler_keeps_the_distribution() -> None:
    items = torch.arange(4000)
    x = 8.0 * counter.normal(0, "start", items, (1, 2, 2))
    x = x * math.sqrt(DATA**2 + 64) / 8.0  # the marginal at sigma 8
    sampler = StochasticHeun(churn=10.0, s_min=0.0, s_max=50.0, s_noise=1.0)
    got = sampler(
        gaussian,
        x,
        karras(40, 0.01, 8.0),
        NoCondition(4000),
        lambda i: counter.normal(0, "step", items, (1, 2, 2), draw=i),
    )
    assert got.std().item() == pytest.approx(DATA, rel=0.03)


# --- evaluations and guidance


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", [*SAMPLERS, "heun-churn"])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_evaluations_are_the_network_calls_an_image(name: str, steps: int, weight: float) -> None:
    calls = torch.zeros(())
    labels = ClassCondition(torch.arange(6) % 3, 3)

    def counting(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        calls.add_(len(x))
        assert len(x) == len(sigma) == len(condition)
        return gaussian(x, sigma, condition)

    sampler = StochasticHeun(s_min=0.0, s_max=100.0) if name == "heun-churn" else SAMPLERS[name]
    sampler(guided(counting, weight), start(8.0), karras(steps, 0.05, 8.0), labels, lambda step: start(1.0))
    assert int(calls) == 6 * evaluations(name, steps) * branches(weight)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", [*SAMPLERS, "heun-churn"])
def test_evaluations_from_pure_noise(name: str, steps: int) -> None:
    calls: list[float] = []

    def counting(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        calls.append(float(sigma[0]))
        return torch.zeros_like(x)

    sampler = StochasticHeun() if name == "heun-churn" else SAMPLERS[name]
    sigmas = torch.cat([torch.tensor([math.inf]), 0.5 ** torch.arange(steps - 1), torch.zeros(1)]).double()
    out = sampler(counting, start(1.0), sigmas, NOTHING, lambda step: start(1.0))
    assert len(calls) == evaluations(name, steps, pure=True)
    assert math.isinf(calls[0])
    assert bool(out.isfinite().all())


def _by_class(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """A denoiser that answers with its class; 3 is 'no class'."""
    assert isinstance(condition, ClassCondition)
    return x + per_sample(condition.labels, x)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_guidance_moves_from_the_null_class_towards_the_class(weight: float) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    x = start(1.0)
    got = guided(_by_class, weight)(x, torch.ones(6), ClassCondition(labels, 3))
    expected = (x + 3) + weight * (labels - 3)[:, None, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_no_guidance_is_the_denoiser_itself() -> None:
    assert guided(_by_class, 1.0) is _by_class
    assert (branches(1.0), branches(1.5), branches(0.0)) == (1, 2, 2)


def test_guidance_needs_a_null_form() -> None:
    x = start(1.0)
    with pytest.raises(ValueError, match="no unconditional branch"):
        guided(_by_class, 1.5)(x, torch.ones(6), ClassCondition(torch.zeros(6, dtype=torch.int64), None))
    with pytest.raises(ValueError, match="nothing to guide by"):
        guided(gaussian, 1.5)(x, torch.ones(6), NOTHING)


# --- conditions


def test_a_class_condition_knows_its_null_form() -> None:
    condition = ClassCondition(torch.tensor([0, 1, 2]), 3)
    assert condition.null().labels.tolist() == [3, 3, 3]
    assert condition.dropped(torch.tensor([True, False, True])).labels.tolist() == [3, 1, 3]
    assert condition.cat(condition.null()).labels.tolist() == [0, 1, 2, 3, 3, 3]
    assert condition.select(torch.tensor([2, 0])).labels.tolist() == [2, 0]
    assert condition.select(slice(1, 3)).labels.tolist() == [1, 2]
    assert condition.inputs()["class_labels"] is condition.labels
    assert len(condition) == 3


def test_a_class_condition_without_a_null_class_says_so() -> None:
    condition = ClassCondition(torch.tensor([0, 1]), None)
    for ask in (condition.null, lambda: condition.dropped(torch.tensor([True, False]))):
        with pytest.raises(ValueError, match="no unconditional branch"):
            ask()


def test_an_unconditional_model_has_nothing_to_drop() -> None:
    condition = NoCondition(5)
    assert condition.dropped(torch.ones(5, dtype=torch.bool)) is condition
    assert len(condition.cat(NoCondition(2))) == 7
    assert len(condition.select(slice(1, 4))) == 3
    assert len(condition.select(torch.tensor([0, 0]))) == 2
    assert condition.inputs() == {}


def test_euler_and_renoise_agree_where_nothing_is_left_to_draw() -> None:
    """With two levels and a last one of 0 both are one denoising."""
    sigmas, x = torch.tensor([2.0, 0.0]), start(2.0).float()
    assert torch.equal(euler(gaussian, x, sigmas, NOTHING, no_noise), renoise(gaussian, x, sigmas, NOTHING, no_noise))
