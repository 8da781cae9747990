"""The losses of DMD2 as values: against autograd, closed forms and hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch

from pipestill.diffusion.schedules import karras_ladder
from pipestill.distillation import losses

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_matching_loss_has_the_direction_as_its_gradient() -> None:
    x0 = draw(3, 2, 4, 4).requires_grad_()
    direction = losses.distribution_matching_direction(x0.detach(), draw(3, 2, 4, 4), draw(3, 2, 4, 4))
    losses.distribution_matching_loss(x0, direction).backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, direction / x0.numel(), rtol=1e-12, atol=0)


def test_direction_is_normalised_by_each_samples_own_distance_to_the_teacher() -> None:
    x0, fake, real = draw(2, 1, 2, 2), draw(2, 1, 2, 2), draw(2, 1, 2, 2)
    direction = losses.distribution_matching_direction(x0, fake, real)
    for i in range(2):
        expected = (fake[i] - real[i]) / (x0[i] - real[i]).abs().mean()
        torch.testing.assert_close(direction[i], expected)
    scaled = losses.distribution_matching_direction(3 * x0, 3 * fake, 3 * real)
    torch.testing.assert_close(scaled, direction)


def test_direction_moves_samples_from_the_fake_score_towards_the_teacher() -> None:
    x0 = torch.zeros(1, 1, 2, 2)
    fake, real = torch.full_like(x0, -1.0), torch.full_like(x0, 2.0)
    step = x0 - losses.distribution_matching_direction(x0, fake, real)
    assert (step > 0).all()


def test_direction_is_zero_where_teacher_and_sample_coincide_everywhere() -> None:
    x0 = torch.ones(2, 1, 2, 2)
    direction = losses.distribution_matching_direction(x0, x0 + 1, x0)
    assert torch.equal(direction, torch.zeros_like(direction))


def test_gan_losses_have_the_right_signs_and_values() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    generator = losses.generator_gan_loss(logits)
    assert generator.item() == pytest.approx(sum(math.log1p(math.exp(-z)) for z in (-2, 0, 3)) / 3)
    generator.backward()
    assert logits.grad is not None
    assert (logits.grad < 0).all()  # the student raises the logits of its samples

    fake, real = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    discriminator = sum(losses.discriminator_gan_losses(fake, real))
    expected = (math.log1p(math.e) + math.log1p(1 / math.e)) / 2
    expected += (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-2.0))) / 2
    assert discriminator.item() == pytest.approx(expected)
    discriminator.backward()
    assert fake.grad is not None
    assert real.grad is not None
    assert (fake.grad > 0).all()  # the discriminator lowers the logits of samples …
    assert (real.grad < 0).all()  # … and raises those of data


def test_fake_score_loss_weighs_each_sample() -> None:
    denoised, x0 = draw(2, 1, 3, 3), draw(2, 1, 3, 3)
    weight = torch.tensor([2.0, 0.25], dtype=torch.float64)
    expected = sum(float(weight[i]) * float(((denoised[i] - x0[i]) ** 2).mean()) for i in range(2)) / 2
    assert losses.fake_score_loss(denoised, x0, weight).item() == pytest.approx(expected)


def test_approximate_r1_estimates_the_squared_gradient() -> None:
    """For a linear discriminator w·x, E(D(x) - D(x + s·eps))² = s²·|w|²."""
    w, s = draw(50), 0.1
    x, eps = draw(20_000, 50), draw(20_000, 50)
    penalty = losses.approximate_r1(x @ w, (x + s * eps) @ w)
    assert penalty.item() == pytest.approx(s**2 * float(w @ w), rel=0.05)


def test_ladder_ends_and_order() -> None:
    ladder = karras_ladder(1000, 0.002, 80.0)
    assert ladder[0].item() == pytest.approx(0.002)
    assert ladder[-1].item() == pytest.approx(80.0)
    assert (ladder.diff() > 0).all()


def published_indices(count: int, share: float) -> set[int]:
    """What DMD2's code draws its noise indices from: randint(min_step, min(max_step + 1, count))."""
    min_step, max_step = int(share * count), int((1 - share) * count)
    return set(range(min_step, min(max_step + 1, count)))


def test_matching_draws_from_the_published_levels() -> None:
    """All 961, each from EDM's formula (Karras et al. 2022, eq. 5) in Python's floats."""
    kept = losses.ladder_range(karras_ladder(1000, 0.002, 80.0), 1000, 0.002, 80.0, 0.02)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    expected = [(low + i / 999 * (high - low)) ** 7 for i in sorted(published_indices(1000, 0.02))]
    assert len(kept) == len(expected) == 961
    torch.testing.assert_close(kept, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("count", "share"), [(1000, 0.0), (1000, 0.02), (100, 0.02), (50, 0.1), (10, 0.0), (1, 0.0)])
def test_a_trimmed_ladder_has_the_published_indices(count: int, share: float) -> None:
    ladder = torch.arange(1, count + 1, dtype=torch.float64)
    kept = losses.ladder_range(ladder, count, 1.0, float(count), share)
    assert set((kept - 1).int().tolist()) == published_indices(count, share)


def test_a_ladder_without_its_infinite_level_is_trimmed_by_the_same_indices() -> None:
    ladder = torch.arange(1, 1000, dtype=torch.float64)
    kept = losses.ladder_range(ladder, 1000, 1.0, 1000.0, 0.02)
    assert set((kept - 1).int().tolist()) == published_indices(1000, 0.02)


def test_ladder_range_keeps_what_lies_inside() -> None:
    ladder = karras_ladder(1000, 0.002, 80.0)
    kept = losses.ladder_range(ladder, 1000, 0.05, 2.0, 0.0)
    assert ((kept >= 0.05) & (kept <= 2.0)).all()
    assert len(kept) == int(((ladder >= 0.05) & (ladder <= 2.0)).sum())
    assert len(losses.ladder_range(ladder, 1000, 0.002, 80.0, 0.0)) == 1000
    with pytest.raises(ValueError, match="no noise level"):
        losses.ladder_range(ladder, 1000, 81.0, 82.0, 0.0)
    with pytest.raises(ValueError, match=r"no noise level .*trim=0\.6"):
        losses.ladder_range(ladder, 1000, 0.002, 80.0, 0.6)
