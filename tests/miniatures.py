"""Every experiment of conf/ made small: the same configuration with tiny networks, few images and hand-made inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm_files import TINY, random_tensors, write_edm_pickle
from pipestill import config, configure
from pipestill.config import ExampleParams, Params
from pipestill.data import examples
from pipestill.evaluation.extractors import Extractor, inception_weights
from workflow_project import ROOT

EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))
NEEDED = {"own": ("data.path=photos",)}  # what an experiment does not say itself
SYNSETS = tuple(f"n0{number}" for number in range(1440764, 1440764 + TINY["label_dim"]))
SIDE, EACH = 8, 16  # of hand-made images, of which each class has so many
IMAGES, BATCH = 12, 8
FEATURES = 12  # of the stand-in for Inception-v3
WHOLE_EXAMPLE = examples.example_images

Body = dict[str, Any]


def composed(experiment: str) -> Params:
    return configure.compose([f"experiment={experiment}", *NEEDED.get(experiment, ())])


def small(experiment: str) -> Params:
    """The experiment's parameters, smaller: runs and models of each kind, their steps, counts, networks."""
    body = composed(experiment).plain()
    if not body["examples"]:
        levels = [len(teacher["network"]["channels"]) for teacher in body["teachers"].values() if teacher["network"]]
        body["data"] |= {"resolution": max(SIDE, *(2**count for count in levels), 0)}
        body["data"]["split"] |= {"validation": 0.25, "test": 0.25}
    if body["data"].get("expect"):
        body["data"]["expect"] = {"images": EACH * len(SYNSETS), "classes": len(SYNSETS)}
    runs = body["sampling"]["runs"] = _of_each_kind(body)
    students = body["distillation"]["students"] = _used(body["distillation"]["students"], runs)
    for run in runs.values():
        _shrink(run, images=IMAGES, micro_batch=BATCH)
        run["seeds"] = run["seeds"][:2]
        if run["steps"]:
            run["steps"] = min(run["steps"], 4)
    for teacher in body["teachers"].values():
        if teacher["network"]:
            levels = len(teacher["network"]["channels"])
            teacher["network"] |= {"channels": [8] * levels, "layers": 1, "head_channels": 8, "norm_groups": 8}
        _shrink(teacher["training"], iterations=6, batch=BATCH, validate_every=3)
        _shrink(teacher["training"]["optimizer"], warmup=2)
    for student in students.values():
        _shrink(student, iterations=2, batch=BATCH, update_ratio=2)
        _shrink(student["optimizer"], warmup=1)
        _shrink(student["validation"], every=1, images=BATCH, micro_batch=BATCH)
    for name, tuned in list(body["tune"].items()):
        asked = [run for run in runs.values() if run["sigmas"] == f"tuned/{name}"]
        solvers = [{"sampler": run["sampler"], "steps": run["steps"]} for run in asked]
        tuned["solvers"] = [solver for place, solver in enumerate(solvers) if solver not in solvers[:place]]
        tuned |= {"sigma_max": tuned["sigma_max"][:2], "sigma_min": tuned["sigma_min"][:1]}
        _shrink(tuned, images=BATCH, micro_batch=BATCH)
        if not asked:
            del body["tune"][name]
    reference = body["reference"]
    reference["floor"] |= {"counts": [IMAGES], "draws": 2}
    reference["classifier"] |= {"channels": [8], "features": 8}
    _shrink(reference["classifier"], iterations=10, batch=BATCH)
    _shrink(reference["protocol"], kid_subsets=2, kid_subset_size=6)
    _shrink(body["report"], grid_rows=3, grid_columns=3)
    return config.check(body, f"the miniature of {experiment}")


def _shrink(section: Body, **most: int) -> None:
    """Lowers numbers; what is off (0) stays off."""
    for name, value in most.items():
        section[name] = min(section[name], value)


def _of_each_kind(body: Body) -> dict[str, Body]:
    """The first run of each kind, and the second of the first kind of student that is trained more than once."""
    students = body["distillation"]["students"]
    kept: dict[str, Body] = {}
    seen: list[Body] = []
    repeated = False
    for name, run in body["sampling"]["runs"].items():
        kind = _kind_of_run(run, body)
        if kind not in seen:
            seen.append(kind)
            kept[name] = run
        elif not repeated and run["model"] in students and students[run["model"]]["seed"]:
            repeated = True
            kept[name] = run
    return kept


def kinds_of_runs(params: Params) -> set[str]:
    """What a run is in all at once, for every run: sampler, plan, model and how that was trained."""
    body = params.plain()
    return {repr(sorted(_kind_of_run(run, body).items())) for run in body["sampling"]["runs"].values()}


def _kind_of_run(run: Body, body: Body) -> Body:
    model = run["model"]
    student = body["distillation"]["students"].get(model)
    kind: Body = {key: run[key] for key in ("sampler", "store", "weights", "spacing", "clip", "plan", "precision")}
    kind |= {"sigmas": run["sigmas"].partition("/")[0], "guided": run["guidance"] != 1}
    if student is None:
        return kind | {
            "model": "converted" if model in body["converted"] else _kind_of_teacher(body["teachers"][model])
        }
    start = student["init"]
    return kind | {
        "model": "student",
        "steps": student["steps"] == 1,
        "init": "student" if start in body["distillation"]["students"] else start in body["converted"],
        "gan": student["gan"]["generator_weight"] > 0,
        **{key: student[key] for key in ("transition", "rollout", "spacing", "precision")},
        "unconditional": student["label_dropout"] > 0,
    }


def _kind_of_teacher(teacher: Body) -> Body:
    return {"denoiser": teacher["denoiser"]["kind"], "starts": teacher["start"].partition("/")[0]}


def _used(students: Mapping[str, Body], runs: Mapping[str, Body]) -> dict[str, Body]:
    """The students of these runs, and those that they start from."""
    wanted = {run["model"] for run in runs.values()}
    while more := {students[name]["init"] for name in wanted if name in students} - wanted:
        wanted |= more
    return {name: student for name, student in students.items() if name in wanted}


def write_inputs(root: Path, params: Params) -> None:
    """What a user brings: a folder of images where no stage makes one, and files to fetch below `inputs/`."""
    if not params.examples:
        write_images(root / params.data.path)
    for name, entry in params.fetched.items():
        for file in entry.files:
            place = root / "inputs" / name / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            BROUGHT[place.name](place)


def write_images(folder: Path) -> None:
    """Colour PNGs, larger than the store keeps them, in folders named as ImageNet's."""
    for place, (name, pixels) in enumerate(_pictures()):
        file = folder / name / f"{place:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def _pictures() -> Iterator[tuple[str, np.ndarray]]:
    """A bright square of the class's colour at a random place, over noise."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(SYNSETS):
        for _ in range(EACH):
            pixels = rng.integers(0, 60, (3 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
            row, column = rng.integers(0, 2 * SIDE, 2)
            pixels[row : row + SIDE, column : column + SIDE, label % 3] = 160 + 30 * (label // 3)
            yield name, pixels


def _write_pickle(place: Path) -> None:
    write_edm_pickle(place, TINY, random_tensors(TINY))


def _write_checkpoint(place: Path) -> None:
    """A generator as DMD2's training saves it."""
    tensors = random_tensors(TINY, seed=1)
    torch.save({f"model.{name}": tensor for name, tensor in tensors.items()}, place)


def _write_statistics(place: Path) -> None:
    root = np.random.default_rng(1).normal(size=(FEATURES, FEATURES))
    np.savez(place, mu=np.zeros(FEATURES), sigma=root @ root.T / FEATURES)


def _write_weights(place: Path) -> None:
    torch.save({"projection": torch.randn(FEATURES, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))}, place)


BROUGHT = {
    "edm-imagenet-64x64-cond-adm.pkl": _write_pickle,
    "pytorch_model.bin": _write_checkpoint,
    "weights-inception-2015-12-05-6726825d.pth": _write_weights,
    "imagenet-64x64.npz": _write_statistics,
}


def few_images(example: ExampleParams) -> Iterator[examples.Named]:
    """Some images of an embedded example, of each class and part."""
    return islice(WHOLE_EXAMPLE(example), 0, None, {"digits": 17, "textures": 41}[example.kind])


def small_inception(device: torch.device | str = "cpu", *, weights: str | None) -> Extractor:
    """Stands in for Inception-v3, whose 2048 features take seconds for each distance: a projection of 4×4 pixels."""
    projection = torch.load(inception_weights(weights), weights_only=True)["projection"]

    def forward(images: torch.Tensor) -> torch.Tensor:
        pixels = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ projection.T

    return Extractor(
        "inception", FEATURES, torch.device(device), "a small stand-in", forward, 32, projection[:5, :FEATURES]
    )
