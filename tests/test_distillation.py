"""DMD2's parts together: rollouts against the sampler, who is trained by which step, and what stays frozen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipestill import counter
from pipestill.config import EdmParams, GanParams, NetworkParams, StudentParams
from pipestill.diffusion.samplers import SAMPLERS, Transition
from pipestill.diffusion.schedules import karras
from pipestill.distillation import losses, rollout
from pipestill.distillation.discriminator import FakeScore, Head, build_head
from pipestill.distillation.dmd2 import Distillation, frozen
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard, NativeSchedule, wrap
from pipestill.networks.unet import build_unet, encoder_view

NETWORK = NetworkParams(channels=(8, 16), layers=1, norm_groups=4)
SHAPE = (1, 8, 8)
NO_GAN = GanParams(generator_weight=0, discriminator_weight=0)


def network(seed: int) -> nn.Module:
    """A tiny denoiser with random weights everywhere, output layer included, so that every gradient is alive."""
    torch.manual_seed(seed)
    unet = build_unet(NETWORK, resolution=8, channels=1, classes=3)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return wrap(unet, EdmParams())


class RealImages:
    """Stands for the loader: a rank's equal share of the images and labels of a step."""

    def __init__(self, batch: int, world: World) -> None:
        self.positions = torch.arange(batch).chunk(world.size)[world.rank]
        self.images = counter.normal(7, "real", self.positions, SHAPE).clamp(-1, 1)
        self.labels = self.positions % 3

    def batch(self, step: int) -> RealImages:
        return self


class NoValidation:
    def distance(self, student: nn.Module, ema: object) -> float:
        return 1.0


def distillation(world: World | None = None, mix: tuple[int, ...] = (1, 1, 1), **overrides: Any) -> Distillation:
    usual = {"teacher": "teacher", "init": "teacher", "steps": 3, "iterations": 4, "batch": 6, "update_ratio": 2}
    params = StudentParams.model_validate(usual | overrides)
    world = world or World(0, 1, torch.device("cpu"))
    teacher = network(0).requires_grad_(False).eval()
    student, score = copy.deepcopy(teacher).requires_grad_(True), network(1)
    native = NativeSchedule(params.steps, params.transition, params.sigma_max, params.sigma_min, params.rho)
    card = ModelCard("student", 8, 1, ("a", "b", "c"), True, EdmParams().plain(), native)
    torch.manual_seed(2)
    source = teacher if params.gan.features == "teacher" else score
    fake = FakeScore(score, build_head(score) if params.gan.on else None, source)
    return Distillation(
        student=student,
        teacher=teacher,
        fake=fake,
        card=card,
        params=params,
        loader=RealImages(6, world),  # type: ignore[arg-type]
        validation=NoValidation(),  # type: ignore[arg-type]
        world=world,
        train_images=60,
        mix=np.array(mix),
    )


def test_labels_are_drawn_from_the_mix_and_a_class_without_images_never() -> None:
    def drawn(*mix: int) -> np.ndarray:
        condition = distillation(mix=mix, label_dropout=0.0)._condition(torch.arange(3000))
        return np.bincount(condition.labels.numpy(), minlength=3)  # type: ignore[attr-defined]

    assert drawn(0, 3, 1)[0] == 0
    assert drawn(0, 3, 1)[1] / 3000 == pytest.approx(0.75, abs=0.03)
    uniform = counter.integers(0, "distill/label", torch.arange(3000), 3)
    assert (drawn(1, 1, 1) == np.bincount(uniform.numpy())).all()  # equal shares draw what they always drew


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> list[str]:
    return [name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)]


def start(transition: Transition, steps: int = 4) -> rollout.Start:
    items = torch.arange(5) + 100
    labels = torch.tensor([0, 1, 2, 0, 3])
    card = ModelCard("student", 8, 1, ("a", "b", "c"), True, EdmParams().plain())
    return rollout.Start(items, card.condition(labels), karras(steps, 0.05, 8.0), transition, 3, "test", SHAPE)


@pytest.mark.parametrize("transition", ["euler", "renoise"])
def test_rollout_is_the_sampler_bit_for_bit(transition: Transition) -> None:
    student, begin = network(0).eval(), start(transition)
    sampled = SAMPLERS[transition](student, begin.latent(), begin.sigmas, begin.condition, begin.noise)
    states = rollout.every_step(student, begin)
    assert states.outputs is not None
    assert torch.equal(states.outputs[-5:], sampled)  # the last step's output is the picture
    for stop in range(4):
        fresh = rollout.fresh(student, begin, stop)
        assert torch.equal(fresh.x, states.x[5 * stop : 5 * stop + 5])
        assert torch.equal(fresh.sigma, states.sigma[5 * stop : 5 * stop + 5])
    last = rollout.fresh(student, begin, 3)
    with torch.no_grad():
        assert torch.equal(student(last.x, last.sigma, last.condition), sampled)


def test_rollout_starts_from_pure_noise_as_sampling_does() -> None:
    begin = start("euler")
    states = rollout.fresh(network(0), begin, 0)
    torch.testing.assert_close(states.x, 8.0 * counter.normal(3, "test/latent", begin.items, SHAPE))
    assert not states.x.requires_grad


@pytest.mark.parametrize("mode", ["fresh", "every_step", "pool"])
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_each_step_trains_its_own_network_and_the_teacher_none(mode: str, features: str) -> None:
    run = distillation(rollout=mode, gan=GanParams(features=features, generator_weight=0.1, r1=0.1))
    student, teacher, fake = weights(run._student), weights(run._teacher), weights(run._fake)
    states, items = run._rollout.take(0)

    x0, figures = run._update_generator(0, states, items)
    assert changed(student, run._student)
    assert not changed(fake, run._fake)
    assert all(parameter.grad is None for parameter in run._fake.parameters())
    assert {"dm_loss", "gan_generator_loss"} <= figures.keys()

    student = weights(run._student)
    run._update_fake(0, x0, states.condition, items)
    assert not changed(student, run._student)
    moved = changed(fake, run._fake)
    assert any(name.startswith("head") for name in moved)
    assert any(name.startswith("denoiser.network.up_blocks") for name in moved)

    assert not changed(teacher, run._teacher)
    assert all(parameter.grad is None for parameter in run._teacher.parameters())


def test_generator_gradient_is_the_distribution_matching_direction() -> None:
    """With the GAN off, the student's gradient is the vector-Jacobian product of its output with the direction."""
    run = distillation(rollout="fresh", gan=GanParams(generator_weight=0, discriminator_weight=0))
    states, items = run._rollout.take(0)
    x0 = run._student(states.x, states.sigma, states.condition)
    direction = run.direction(x0.detach(), states.condition, items)
    name, parameter = next(item for item in run._student.named_parameters() if item[0].endswith("conv_out.weight"))
    (by_hand,) = torch.autograd.grad(x0, parameter, grad_outputs=direction / x0.numel())
    losses.distribution_matching_loss(run._student(states.x, states.sigma, states.condition), direction).backward()
    assert parameter.grad is not None
    assert (parameter.grad - by_hand).norm() < 1e-4 * by_hand.norm(), name  # float32 sums in two orders


def test_direction_vanishes_when_the_fake_score_is_the_teacher() -> None:
    run = distillation()
    run._fake.denoiser.load_state_dict(run._teacher.state_dict())
    states, items = run._rollout.take(0)
    direction = run.direction(torch.randn(len(states.x), *SHAPE), states.condition, items)
    assert torch.equal(direction, torch.zeros_like(direction))


def test_losses_can_be_switched_off() -> None:
    without_gan = distillation(gan=GanParams(generator_weight=0, discriminator_weight=0))
    assert not {key for key in without_gan.update(0) if key.startswith("gan")}
    gan_only = distillation(dm={"weight": 0.0}, gan=GanParams(generator_weight=1.0))
    assert "dm_loss" not in gan_only.update(0)
    late = distillation(gan=GanParams(start=1))
    assert "gan_generator_loss" not in late.update(0)
    assert "gan_generator_loss" in late.update(1)
    alone = distillation(dm={"weight": 0.0}, gan=GanParams(generator_weight=1.0, start=1))
    before = weights(alone._student)
    alone.update(0)
    assert not changed(before, alone._student)
    alone.update(1)
    assert changed(before, alone._student)
    with pytest.raises(ValueError, match="would learn nothing"):
        distillation(dm={"weight": 0.0}, gan=GanParams(generator_weight=0, discriminator_weight=0))
    with pytest.raises(ValueError, match=r"gan\.start=4, but there are 4 iterations: the student would learn nothing"):
        distillation(dm={"weight": 0.0}, gan=GanParams(start=4), iterations=4)


def test_an_average_that_cannot_forget_its_start_is_named() -> None:
    """After updates that leave the student as it is, those alone count that change it: 0.9^20 = 12%."""
    ema = {"decay": 0.9, "warmup": False}
    said = "the averaged weights will still be 12% initial weights after 20 updates: train longer or lower ema.decay"
    late = {"dm": {"weight": 0.0}, "gan": GanParams(start=30), "iterations": 50}
    for overrides in ({"iterations": 20}, late):
        assert distillation(ema=ema, **overrides).warnings == [f"{said} or set ema.warmup=true"]
    assert distillation(ema=ema, iterations=50).warnings == []


@pytest.mark.parametrize("first", [0, 2])
def test_a_students_average_warms_up_from_the_first_update_that_changes_it(first: int) -> None:
    """(1 + t) / (10 + t) of the average is kept after t such updates, 0.3 at most."""
    late = {"dm": {"weight": 0.0}, "gan": GanParams(generator_weight=1.0, start=first)}
    quick = {"generator_lr": 0.01, "optimizer": {"warmup": 0, "schedule": "constant"}, "update_ratio": 1}
    run = distillation(iterations=8, ema={"decay": 0.3}, **quick, **(late if first else {"gan": NO_GAN}))
    expected = weights(run._student.network)
    for step in range(first + 5):
        before = weights(run._student.network)
        run.update(step)
        assert bool(changed(before, run._student.network)) == (step >= first)
        if step >= first:
            kept = (0.1, 2 / 11, 0.25, 0.3, 0.3)[step - first]
            now = weights(run._student.network)
            expected = {name: kept * tensor + (1 - kept) * now[name] for name, tensor in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(run.ema.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    run.validate(8)
    assert all(torch.equal(run.best["ema"][name], tensor) for name, tensor in run.ema.tensors.items())


def test_labels_are_dropped_once_before_every_network() -> None:
    run = distillation(label_dropout=0.5)
    seen: list[Tensor] = []
    for module in (run._student, run._teacher, run._fake.denoiser):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].labels))
    states, items = run._rollout.take(0)
    run._update_generator(0, states, items)
    walked, trained = seen[:3], seen[3:]
    assert len(trained) == 3  # student, fake score, teacher
    assert (trained[0] == 3).any()
    assert (trained[0] != 3).any()
    assert all(torch.equal(labels, trained[0]) for labels in trained)
    assert torch.equal(torch.cat(walked), trained[0])


def test_the_stop_step_is_a_function_of_the_turn_and_covers_all_steps() -> None:
    run = distillation(rollout="fresh")
    sigmas = [float(run._rollout.take(turn)[0].sigma[0]) for turn in range(40)]
    assert sigmas == [float(run._rollout.take(turn)[0].sigma[0]) for turn in range(40)]
    assert {round(sigma, 4) for sigma in sigmas} == {round(float(sigma), 4) for sigma in run._walkers.sigmas[:-1]}


@pytest.mark.parametrize(("batch", "updates", "uses"), [(6, 3, 1), (7, 3, 1), (6, 4, 2), (4, 1, 1)])
def test_a_pool_takes_each_input_so_often_and_no_older(batch: int, updates: int, uses: int) -> None:
    """Inputs are those of a rollout by the student as it was when the pool was filled; its outputs are not kept."""
    run = distillation(rollout="pool", batch=batch, pool={"updates": updates, "uses": uses})
    turns, steps = updates * 2, 3
    walkers = -(-turns * batch // (steps * uses))
    for filling in range(2):
        student = copy.deepcopy(run._student)
        walked = rollout.every_step(student, run._walkers.start(torch.arange(walkers) + filling * walkers))
        taken: dict[int, int] = {}
        seen = set()
        for turn in range(filling * turns, (filling + 1) * turns):
            states, numbers = run._rollout.take(turn)
            assert states.outputs is None
            assert len(states.x) == batch
            for x, sigma, label in zip(states.x, states.sigma, states.condition.labels, strict=True):
                apart = (walked.x - x).abs().amax(dim=(1, 2, 3))  # not 0: the rollout's batches were smaller
                found = int(apart.argmin())
                assert apart[found] < 1e-4 < apart.sort().values[1]
                taken[found] = taken.get(found, 0) + 1
                assert sigma == walked.sigma[found]
                assert label == walked.condition.labels[found]
            counts = [int((states.sigma == float(sigma)).sum()) for sigma in run._walkers.sigmas[:-1].float()]
            assert max(counts) - min(counts) <= 1  # equal shares of all steps
            seen |= set(numbers.tolist())
            with torch.no_grad():
                next(iter(run._student.parameters())).add_(0.01)  # the student moves on, the pool does not
        assert sum(taken.values()) == len(seen) == turns * batch  # noise of its own for each
        assert max(taken.values()) <= uses
        assert len(taken) * uses >= turns * batch


def test_a_pool_is_filled_by_batches_that_a_turn_has() -> None:
    run = distillation(rollout="pool", batch=6, pool={"updates": 10})
    sizes = set()
    run._student.register_forward_hook(lambda module, inputs, output: sizes.add(len(inputs[0])))
    run._rollout.take(0)
    assert run._rollout._count == 40
    assert sizes == {6, 4}
    with pytest.raises(ValueError, match="a turn would hold an input twice"):
        distillation(rollout="pool", pool={"updates": 1, "uses": 3})


def test_a_pool_mixes_trajectories() -> None:
    run = distillation(rollout="pool", batch=30, pool={"updates": 10})
    run._rollout.take(0)
    trajectories, _ = run._rollout._order(0)
    first = trajectories[:30]
    assert len(set(first.tolist())) > 20  # `every_step` would have ten
    assert not torch.equal(first, run._rollout._order(1)[0][:30])


@pytest.mark.parametrize("mode", ["every_step", "fresh", "pool"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("gan", [NO_GAN, GanParams(generator_weight=0.5, discriminator_weight=0.5, r1=0.1)])
def test_a_batch_and_its_gradient_are_the_same_over_any_number_of_ranks(
    mode: str, size: int, gan: GanParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that are not wrapped in DDP here; its mean over them is taken by hand."""
    monkeypatch.setattr("pipestill.distillation.dmd2.distributed", lambda module, world: module)
    monkeypatch.setattr("pipestill.training.optimizers.step", lambda *_: torch.zeros(()))  # gradients stay

    def run(world: World) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        made = distillation(world, rollout=mode, batch=24 if gan.on else 20, gan=gan)
        made._rollout.load(inputs)  # what all ranks gather
        states, items = made._rollout.take(5)
        x0, figures = made._update_generator(0, states, items)
        figures |= made._update_fake(5, x0, states.condition, items)
        gradients = {
            f"{name}/{key}": parameter.grad.clone()
            for name, module in (("student", made._student), ("fake", made._fake))
            for key, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        return items.tolist(), figures, gradients

    alone = distillation(rollout=mode, batch=24 if gan.on else 20, gan=gan)
    alone._rollout.take(5)
    inputs = alone._rollout.state()
    items, figures, gradients = run(World(0, 1, torch.device("cpu")))
    ranks = [run(World(rank, size, torch.device("cpu"))) for rank in range(size)]
    assert sorted(item for rank in ranks for item in rank[0]) == sorted(items)
    # 7 trajectories, or 20 states over three ranks; with a GAN 8 trajectories over three
    uneven = (mode, size) == ("every_step", 3) if gan.on else mode == "every_step" or size == 3
    assert (len({len(rank[0]) for rank in ranks}) > 1) == uneven
    for name in (
        "dm_loss",
        "fake_score_loss",
        *(["gan_discriminator_loss", "gan_discriminator_right"] if gan.on else []),
    ):
        torch.testing.assert_close(sum(rank[1][name] for rank in ranks) / size, figures[name], rtol=1e-5, atol=1e-7)
    for name, whole in gradients.items():
        mean = sum(rank[2][name] for rank in ranks) / size
        assert torch.linalg.norm(mean - whole) <= 1e-4 * torch.linalg.norm(whole) + 1e-8, name


def test_ranks_without_a_trajectory_are_refused() -> None:
    with pytest.raises(InputError, match="gives 2 trajectories of 3 steps, too few for 3 ranks"):
        distillation(World(0, 3, torch.device("cpu")), rollout="every_step")


@pytest.mark.parametrize("mode", ["every_step", "fresh"])
def test_checkpointing_changes_no_gradient(mode: str) -> None:
    """The backward pass runs forward once more, the frozen fake score within it too."""
    ends = []
    for checkpointing in (False, True):
        run = distillation(rollout=mode, gan=GanParams(generator_weight=0.5, discriminator_weight=0.5))
        for module in (run._student, run._fake.denoiser):
            module.train()  # what Diffusers' checkpointing asks for; there is no dropout here
            if checkpointing:
                module.network.enable_gradient_checkpointing()
        for step in range(2):
            run.update(step)
        ends.append(weights(run._student) | weights(run._fake))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["every_step", "pool"])
def test_state_round_trip_goes_on_bit_for_bit(mode: str) -> None:
    whole, broken = distillation(rollout=mode), distillation(rollout=mode)
    for step in range(3):
        whole.update(step)
        whole.validate(step + 1)
    broken.update(0)
    state = copy.deepcopy(broken.state())
    resumed = distillation(rollout=mode)
    resumed.load(state)
    for step in range(1, 3):
        resumed.update(step)
    assert not changed(weights(whole._student), resumed._student)
    assert not changed(weights(whole._fake), resumed._fake)
    assert all(torch.equal(whole.ema.tensors[name], tensor) for name, tensor in resumed.ema.tensors.items())


def test_the_best_weights_stay_as_they_were_while_training_continues() -> None:
    run = distillation(validation={"every": 1})
    run.update(0)
    held = {"ema": {name: tensor.clone() for name, tensor in run.ema.tensors.items()}}
    held["raw"] = weights(run._student.network)
    run.validate(1)
    run.update(1)
    run.validate(2)  # no nearer
    assert run.best_step == 1
    assert changed(held["raw"], run._student.network)
    for which, tensors in held.items():
        assert all(torch.equal(run.best[which][name], tensor) for name, tensor in tensors.items()), which
    assert any(not torch.equal(held["raw"][name], held["ema"][name]) for name in held["raw"])


def test_discriminator_reads_the_input_of_the_mid_block() -> None:
    denoiser = network(0).eval()
    seen: list[Tensor] = []
    denoiser.network.mid_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, sigma = torch.randn(2, *SHAPE), torch.tensor([0.5, 3.0])
    condition = ModelCard("teacher", 8, 1, ("a", "b", "c"), True, {}).condition(torch.tensor([0, 2]))
    denoiser(x, sigma, condition)
    features = denoiser.run_network(encoder_view(denoiser.network), x, sigma, condition)
    assert torch.equal(features, seen[0])


@pytest.mark.parametrize(("channels", "side"), [(16, 4), (24, 8), (48, 2), (8, 16), (32, 1)])
def test_head_gives_one_logit_for_any_bottleneck_and_listens_to_it(channels: int, side: int) -> None:
    torch.manual_seed(0)
    logits = Head(channels, side)(torch.randn(64, channels, side, side))
    assert logits.shape == (64,)
    assert logits.std() > 0.05


def test_frozen_lets_gradients_through_and_restores() -> None:
    module = nn.Linear(2, 1)
    x = torch.randn(3, 2, requires_grad=True)
    with frozen(module):
        module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None
    assert module.weight.requires_grad
