"""Teachers of every parametrisation through the stages: DDPM as Diffusers has it, students from pure noise, flow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.nn.functional import mse_loss

from commands import here, payload, write_params
from pipestill import PixelPipeline, cli
from pipestill.config import RunParams, load
from pipestill.data.store import open_dataset
from pipestill.diffusion.flow import Flow
from pipestill.diffusion.schedules import spaced_steps
from pipestill.diffusion.vp import VP
from pipestill.distributed import World
from pipestill.networks.model import load_model, read_card
from pipestill.sampling.items import latents
from pipestill.sampling.recipe import settle
from pipestill.sampling.store import open_samples
from pipestill.stages.train import prepared
from pipestill.training.losses import denoising_loss
from test_distill import STUDENT
from tiny_models import make_model

NETWORK = {"channels": [8, 16], "layers": 1, "attention": [False, False], "norm_groups": 4}
PLAIN = {"kind": "vp"}
PURE = {"kind": "vp", "prediction": "v_prediction", "schedule": "scaled_linear", "zero_terminal_snr": True}
FLOW = {"kind": "flow"}
KINDS = {"plain": PLAIN, "pure": PURE, "flow": FLOW}
NATIVE = STUDENT | {"spacing": "trailing", "sigma_max": None, "sigma_min": None, "iterations": 4}


def parameters(folder: Path, **changes: object) -> Path:
    teacher = {"network": NETWORK, "training": {"iterations": 20, "batch": 32, "validate_every": 10}}
    teachers = {name: teacher | {"denoiser": denoiser} for name, denoiser in KINDS.items()}
    rest = {"tune": {}, "sampling": {}, "distillation": {}}
    return write_params(folder / "params.yaml", **(rest | {"teachers": teachers} | changes))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, Path]:
    """A hardly trained teacher of each kind."""
    folder = tmp_path_factory.mktemp("teachers")
    params = parameters(folder)
    for name in KINDS:
        words = ["train", "--name", name, "--dataset", digits, "--output", folder / name, "--params", params]
        here(*words, runs=folder / "runs")
    return {name: folder / name for name in KINDS}


def sampled(folder: Path, model: Path, **run: object) -> Path:
    """Twenty images of a run, as an artefact."""
    whole = {"model": model.name, "sigmas": f"models/{model.name}", "images": 20, "seeds": [3]} | run
    params = parameters(folder, **{"sampling.runs": {"run": whole}, "reference.floor.counts": [20]})
    if model.name not in KINDS:
        students = {model.name: NATIVE | {"teacher": "pure", "init": "pure"}}
        params = parameters(
            folder,
            **{
                "sampling.runs": {"run": whole},
                "reference.floor.counts": [20],
                "distillation.students": students,
            },
        )
    output = folder / f"samples-{len(list(folder.iterdir()))}"
    words = ["sample", "--name", "run", "--model", model, "--output", output, "--params", params]
    here(*words, runs=folder / "runs")
    return output


def images(samples: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return open_samples(samples).images(0, 20).astype(np.int64)


def test_the_loss_is_ddpms(tmp_path: Path, digits: Path) -> None:
    """mean (eps - eps_theta(sqrt(abar)·x0 + sqrt(1-abar)·eps, t))², as Diffusers' training script has it."""
    params = load(parameters(tmp_path))
    training, denoiser, card = prepared(
        params.teachers["plain"], open_dataset(digits), World(0, 1, torch.device("cpu")), "host"
    )
    torch.nn.init.normal_(denoiser.network.conv_out.weight, std=0.1)
    batch = training._loader.batch(0)
    sigma, eps = training._noise("train", batch.positions, batch.images)
    assert isinstance(denoiser, VP)
    t = denoiser.step_of(sigma).round().long()
    assert len(t.unique()) > 20
    noisy = DDPMScheduler().add_noise(batch.images, eps, t)
    condition = card.condition(batch.labels)
    with torch.no_grad():
        theirs = mse_loss(denoiser.network(noisy, t, **condition.inputs()).sample, eps)
        weight = denoiser.training_weight(sigma)
        ours = denoising_loss(denoiser, batch.images, sigma, eps, condition, weight)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)  # float32's abar of small t


def test_a_teachers_folder_holds_diffusers_scheduler(teachers: dict[str, Path]) -> None:
    for name in ("plain", "pure"):
        scheduler = DDPMScheduler.from_pretrained(teachers[name], subfolder="scheduler")
        wanted = KINDS[name]
        assert scheduler.config.prediction_type == wanted.get("prediction", "epsilon")
        assert scheduler.config.beta_schedule == wanted.get("schedule", "linear")
        assert scheduler.config.rescale_betas_zero_snr == wanted.get("zero_terminal_snr", False)
        assert not scheduler.config.clip_sample
        assert scheduler.config.timestep_spacing == "trailing"
        scheduler.set_timesteps(50)
        model, t = load_model(teachers[name]), scheduler.timesteps[0]
        assert int(t) == 999
        noise = latents(0, torch.arange(3), (1, 8, 8))
        output = model.unet(noise, t.expand(3), class_labels=torch.arange(3)).sample
        x0 = scheduler.step(output, t, noise).pred_original_sample
        first = model.denoiser.spaced(50, "trailing")[0].float()
        x = noise if first.isinf() else noise * (1 + first**2).sqrt()
        ours = model.denoiser(x, first.expand(3), model.card.condition(torch.arange(3)))
        torch.testing.assert_close(ours, x0, rtol=1e-3, atol=1e-3 * float(x0.abs().max()))
    assert not (teachers["flow"] / "scheduler").exists()


@pytest.mark.parametrize("clip", [False, True])
def test_a_run_of_ddim_is_that_of_diffusers(teachers: dict[str, Path], clip: bool) -> None:
    model = load_model(teachers["plain"])
    run = RunParams(model="plain", sigmas="models/plain", sampler="euler", steps=10, spacing="trailing", clip=clip)
    items = torch.arange(20)
    ours = settle(run, model.card).sample(
        model.denoiser, seed=3, items=items, labels=items % 10, device=torch.device("cpu")
    )
    scheduler = DDIMScheduler.from_config(
        DDPMScheduler.from_pretrained(teachers["plain"], subfolder="scheduler").config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=clip,
    )
    scheduler.set_timesteps(10)
    condition = model.card.condition(torch.arange(20) % 10)
    first = float(torch.sqrt((1 - scheduler.alphas_cumprod[999]) / scheduler.alphas_cumprod[999]))
    sample = first / math.sqrt(1 + first**2) * latents(3, torch.arange(20), (1, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.unet(sample, t.expand(20), **condition.inputs()).sample
            sample = scheduler.step(output, t, sample, use_clipped_model_output=clip).prev_sample
    assert float(ours.std()) > 0.3
    torch.testing.assert_close(ours, sample, rtol=0, atol=2e-3 * float(ours.abs().max()))


def test_index_and_evaluations_of_schedules(tmp_path: Path, teachers: dict[str, Path]) -> None:
    plain, pure = teachers["plain"], teachers["pure"]
    index = open_samples(sampled(tmp_path, plain, sampler="ddpm", steps=25, spacing="leading")).index
    assert (index["evaluations"], index["steps"], index["sampler"]) == (25, 25, "ddpm")
    model = load_model(plain)
    assert index["sigmas"] == model.denoiser.spaced(25, "leading").tolist()
    formula = sampled(tmp_path, plain, sampler="ddim-linear-alpha", steps=10)
    assert open_samples(formula).index["sigmas"][0] == pytest.approx(math.sqrt(999))
    right = sampled(tmp_path, plain, sampler="euler", steps=10, spacing="linspace")
    assert np.abs(images(formula) - images(right)).mean() > 2, "another path"
    whole = sampled(tmp_path, pure, sampler="euler", steps=4, spacing="trailing")
    assert open_samples(whole).index["sigmas"][0] is None, "pure noise, which JSON has no number for"
    assert spaced_steps(4, 1000, "trailing").tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("kind", ["plain", "flow"])
@pytest.mark.parametrize("sampler", ["heun", "2m", "renoise"])
def test_every_sampler_takes_every_model(tmp_path: Path, teachers: dict[str, Path], kind: str, sampler: str) -> None:
    made = images(sampled(tmp_path, teachers[kind], sampler=sampler, steps=3, sigma_max=20.0, sigma_min=0.1))
    assert made.shape == (20, 8, 8, 1)
    assert made.std() > 5


def test_a_student_that_begins_with_pure_noise(
    tmp_path: Path, digits: Path, digits_reference: Path, teachers: dict[str, Path]
) -> None:
    students = {"student": NATIVE | {"teacher": "pure", "init": "pure"}}
    params = parameters(tmp_path, **{"distillation.students": students})
    places = ["--dataset", digits, "--reference", digits_reference, "--teacher", teachers["pure"]]
    words = ["distill", "--name", "student", *places, "--output", tmp_path / "student", "--params", params]
    here(*words, runs=tmp_path / "runs")
    _, card = read_card(tmp_path / "student")
    assert card.native is not None
    assert (card.native.spacing, card.native.sigma_max, card.native.steps) == ("trailing", None, 3)
    teacher, student = load_model(teachers["pure"]), load_model(tmp_path / "student")
    changed = [
        name for name, tensor in student.unet.state_dict().items() if not tensor.equal(teacher.unet.state_dict()[name])
    ]
    assert len(changed) > 40, "every layer has learnt"
    samples = sampled(tmp_path, tmp_path / "student")
    index = open_samples(samples).index
    assert index["sigmas"] == [None, *teacher.denoiser.spaced(3, "trailing").tolist()[1:]]
    again = sampled(tmp_path, tmp_path / "student")
    assert payload(again) == payload(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_is_sampled_by_the_pipeline_of_its_folder(teachers: dict[str, Path], kind: str) -> None:
    pipeline = PixelPipeline.from_pretrained(teachers[kind])
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([0, 1, 2], num_inference_steps=4, output_type="uint8").images
    assert made.shape == (3, 8, 8, 1)
    ancestral = pipeline([0, 1, 2], 4, sampler="ddpm", spacing="trailing", output_type="uint8").images
    assert not np.array_equal(ancestral, made)


def test_flow_trains_and_validates(teachers: dict[str, Path]) -> None:
    model = load_model(teachers["flow"])
    assert isinstance(model.denoiser, Flow)
    curves = (teachers["flow"] / "curves.csv").read_text().splitlines()
    assert curves[0].split(",")[:2] == ["step", "loss"]
    summary = json.loads((teachers["flow"] / "manifest.json").read_text())["summary"]
    assert 0 < summary["validation_loss"] < 3


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_is_one_line(
    tmp_path: Path,
    digits: Path,
    digits_reference: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    edm = make_model(tmp_path / "edm", classes=tuple("0123456789")).path
    run = {"model": "plain", "sigmas": "models/plain", "images": 20, "sampler": "euler", "steps": 4}
    for model, changes, message in (
        (edm, {"spacing": "trailing"}, "EDM's noise levels are continuous"),
        (edm, {"sampler": "ddim-linear-alpha"}, "takes a network's output for eps"),
        (teachers["pure"], {"sampler": "ddim-linear-alpha"}, "takes a network's output for eps"),
        (teachers["pure"], {}, "begins with pure noise"),
        (teachers["flow"], {"spacing": "leading"}, "steps are trailing ones"),
        (teachers["plain"], {"spacing": "trailing", "steps": 1001}, "1001 steps of a schedule of 1000"),
        (teachers["plain"], {"sigma_max": 200.0}, "the schedule of model plain reaches from 0.01 to 157.4"),
        (teachers["plain"], {"sampler": "ddim-linear-alpha", "sigma_max": 20.0}, "leave sigma_max and sigma_min out"),
    ):
        runs = {"sampling.runs": {"run": run | changes}, "reference.floor.counts": [20]}
        words = ["sample", "--name", "run", "--model", model, "--output", tmp_path / "out"]
        assert message in refused(capsys, *words, "--params", parameters(tmp_path, **runs)), (model, changes)
    students = {"student": NATIVE | {"teacher": "plain", "init": "plain"}}
    params = parameters(tmp_path, **{"distillation.students": students})
    places = ["--dataset", digits, "--reference", digits_reference, "--teacher", edm]
    words = ["distill", "--name", "student", *places, "--output", tmp_path / "out", "--params", params]
    assert "cannot be walked so: spacing=trailing" in refused(capsys, *words)
    start = {"start": "models/pure", "network": None, "denoiser": PLAIN, "training": {"iterations": 2}}
    own = json.loads(json.dumps({"pure": {"network": NETWORK, "denoiser": PURE}, "other": start}))
    params = write_params(tmp_path / "start.yaml", teachers=own, tune={}, sampling={}, distillation={})
    words = ["train", "--name", "other", "--dataset", digits, "--start", teachers["pure"], "--output", tmp_path / "o"]
    assert "has prediction=v_prediction: set the teacher's denoiser to it" in refused(
        capsys, *words, "--params", params
    )
