"""On a GPU: equal bytes twice, raw weights, and the figures of the CPU. Rehearse with PIPESTILL_GPU_TESTS=cpu."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import Command, here, payload, steps_logged, write_params
from pipestill import counter
from pipestill.networks.model import load_model
from pipestill.sampling.store import open_samples
from tiny_models import make_model

DEVICE = os.environ.get("PIPESTILL_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]
UPDATES = 24
NETWORK = {"channels": [8, 16], "layers": 1, "attention": [False, True], "norm_groups": 4}
STUDENT = {
    "teacher": "teacher",
    "init": "teacher",
    "steps": 3,
    "iterations": 8,
    "update_ratio": 2,
    "batch": 16,
    "validation": {"every": 4, "images": 20, "micro_batch": 10, "extractor": "classifier"},
    "gan": {"generator_weight": 0.01, "discriminator_weight": 0.1, "r1": 0.1},
}
RUN = {"model": "teacher", "sampler": "heun", "steps": 5, "sigmas": "models/teacher", "images": 20}


def params_at(folder: Path, device: str = DEVICE, **changes: Any) -> Path:
    """Parameters of a small teacher, a student and a run, on one device."""
    training = {"iterations": UPDATES, "batch": 16, "validate_every": 10, "accumulation": 2}
    small = {
        "teachers.teacher.network": NETWORK,
        "teachers.teacher.training": training | changes.pop("training", {}),
        "distillation.students": {"student": STUDENT | changes.pop("student", {})},
        "sampling.runs": {"run": RUN},
        "tune": {},
        "reference.floor": {"counts": [20], "draws": 2},
        "operation": {"device": device, "save_every": 0.001, "log_every": 1},
    }
    assert not changes
    return write_params(folder / f"{device}.yaml", **small)


def train(folder: Path, digits: Path, output: str, params: Path) -> list[object]:
    return ["train", "--name", "teacher", "--dataset", digits, "--output", folder / output, "--params", params]


@pytest.fixture(autouse=True, scope="module")
def _deterministic_products() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first product
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "teacher", classes=tuple("0123456789")).path


def test_random_numbers_are_those_of_the_cpu() -> None:
    items = torch.arange(1000)
    wanted = counter.normal(3, "noise", items, (3, 8, 8))
    assert torch.equal(counter.normal(3, "noise", items.to(DEVICE), (3, 8, 8)).cpu(), wanted)


def test_a_network_gives_what_it_gives_on_the_cpu(teacher: Path) -> None:
    network = load_model(teacher).unet.eval()
    x = counter.normal(0, "x", torch.arange(16), (1, 8, 8))
    step, label = torch.linspace(-1.5, 1, 16), torch.arange(16) % 10
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        wanted = network(x, step, label).sample
        found = network.to(DEVICE)(x.to(DEVICE), step.to(DEVICE), label.to(DEVICE)).sample.cpu()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    "training", [{}, {"precision": "bf16"}, {"precision": "bf16", "compile": True}], ids=["fp32", "bf16", "compiled"]
)
def test_training_again_and_stopped_in_between_gives_equal_bytes(
    tmp_path: Path, digits: Path, training: dict[str, Any]
) -> None:
    params = params_at(tmp_path, training=training)
    here(*train(tmp_path, digits, "a", params), runs=tmp_path / "runs-a")
    weights = {which: load_model(tmp_path / "a", weights=which).unet.state_dict() for which in ("raw", "ema")}
    assert any(not torch.equal(tensor, weights["ema"][name]) for name, tensor in weights["raw"].items())

    runs, command = tmp_path / "runs-b", train(tmp_path, digits, "b", params)
    stopped = Command(*command, runs=runs)
    assert stopped.wait_until(lambda: steps_logged(runs) >= 5)
    stopped.process.terminate()
    assert stopped.wait() in (0, 75), stopped.output
    here(*command, runs=runs)
    assert payload(tmp_path / "b") == payload(tmp_path / "a")


@pytest.mark.parametrize("rollout", ["fresh", "every_step", "pool"])
def test_distilling_again_gives_equal_bytes(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path, rollout: str
) -> None:
    params = params_at(tmp_path, student={"rollout": rollout, "precision": "bf16"})
    places = ["--dataset", digits, "--reference", digits_reference, "--teacher", teacher, "--params", params]
    for name in ("a", "b"):
        output = tmp_path / name
        here("distill", "--name", "student", *places, "--output", output, runs=tmp_path / f"runs-{name}")
    assert payload(tmp_path / "a") == payload(tmp_path / "b")


def test_samples_and_their_distances_are_those_of_the_cpu(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path
) -> None:
    found = []
    for device in ("cpu", DEVICE):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        params, runs = params_at(folder, device), folder / "runs"
        model = ["--model", teacher, "--sigmas", teacher, "--dataset", digits]
        here("sample", "--name", "run", *model, "--output", folder / "s", "--params", params, runs=runs)
        measured = ["--samples", folder / "s", "--reference", digits_reference, "--output", folder / "e"]
        here("evaluate", "--name", "run", *measured, "--params", params, runs=runs)
        metrics = json.loads((folder / "e" / "metrics.json").read_text(encoding="utf-8"))
        found.append((open_samples(folder / "s").images(0, 20).astype(int), metrics))
    (wanted, cpu_metrics), (images, metrics) = found
    assert np.abs(images - wanted).max() <= 1
    assert np.mean(images != wanted) < 0.02
    assert len(distances(cpu_metrics)) >= 2
    assert distances(metrics) == pytest.approx(distances(cpu_metrics), rel=1e-2)


def distances(metrics: Any, name: str = "") -> dict[str, float]:
    """Every Fréchet distance in a document of metrics, by its full name."""
    if not isinstance(metrics, dict):
        return {name: float(metrics)} if "fd" in name and isinstance(metrics, float) else {}
    return {key: value for part, body in metrics.items() for key, value in distances(body, f"{name}.{part}").items()}
