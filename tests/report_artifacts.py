"""Tiny artefacts of every kind that a report reads, published for real, with figures like a demo's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipestill import artifacts
from pipestill.artifacts import Artifact, InputEntry, Manifest
from pipestill.config import Params, check
from pipestill.data.store import Layout, write_dataset
from pipestill.reporting.sources import Places
from pipestill.sampling.store import write_samples
from pipestill.versions import version_of

PER_CLASS, SIDE = 20, 8
# evaluations, classifier distance, EfficientNet-Lite0 distance, accuracy, diversity
RUNS: dict[str, tuple[int, float, float, float, float]] = {
    "teacher-heun-79": (79, 1.52, 6.31, 0.992, 0.955),
    "student-10-cfg15": (20, 2.21, 7.94, 0.998, 0.874),
    "student-10": (10, 1.61, 6.02, 0.989, 0.948),
    "teacher-2m-10": (10, 1.93, 7.15, 0.985, 0.941),
    "teacher-euler-10": (10, 4.87, 15.2, 0.991, 0.803),
    "teacher-renoise-10": (10, 3.12, 11.8, 0.994, 0.842),
    "teacher-heun-9": (9, 2.44, 8.91, 0.972, 0.960),
    "student-4": (4, 2.36, 8.87, 0.984, 0.921),
    "teacher-2m-4": (4, 6.71, 21.5, 0.943, 0.834),
    "teacher-euler-4": (4, 14.9, 48.3, 0.978, 0.551),
    "teacher-renoise-4": (4, 9.83, 30.9, 0.981, 0.643),
}
FLOOR = {"classifier": 0.92, "efficientnet_lite0": 4.21}
WARNING = "the averaged weights will still be 74% initial weights after 300 updates: train longer or lower ema.decay"
MODELS = {"teacher": None, "student-10": 10, "student-4": 4}
REPEATED = {"student-4-b": 4, "student-4-c": 4}  # student-4 with other training seeds, where a run asks for them
SEEDS = {"student-4-b": 1, "student-4-c": 2}


def publish(
    folder: Path,
    kind: str,
    stage: str,
    fill: Callable[[Path], None],
    *,
    parameters: Mapping[str, Any] | None = None,
    inputs: Mapping[str, InputEntry] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Artifact:
    """Fills and publishes one artefact."""
    staging = folder.with_name(f".{folder.name}.partial")
    staging.mkdir(parents=True)
    fill(staging)
    version = version_of(stage)
    assert version is not None, f"there is no stage {stage}"
    manifest = Manifest(
        kind, stage, version, parameters or {}, inputs or {}, artifacts.describe_files(staging), summary or {}
    )
    return artifacts.publish(staging, folder, manifest)


def write_json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def digits(classes: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    """Images uint8 [count, 8, 8, 1] that look like something: class by class, a bright bar that wanders."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, SIDE, SIDE, 1), dtype=np.uint8)
    for index in range(count):
        row = index % max(len(classes), 1)
        images[index, :, row % SIDE] = 255 - rng.integers(0, 80)
        images[index, (row * 3 + index) % SIDE] = 200
    return images


def found(count: int) -> dict[str, Any]:
    """A dataset's validation report."""
    return {
        "images": count,
        "bad": {"count": 2, "files": []},
        "modes": [{"name": "L", "count": count}],
        "sizes": {"distinct": 1, "commonest": [{"name": "8x8", "count": count}], "enlarged": 0},
        "exif_rotated": {"count": 0, "files": []},
        "duplicates": {
            "exact": {"repeats": 3, "across_parts": 1},
            "near": {"bits": 2, "pairs": 7, "across_parts": 4},
        },
        "imbalance": 1.0,
    }


def build(
    root: Path,
    *,
    runs: Mapping[str, tuple[int, float, float, float, float]] = RUNS,
    seeds: int = 1,
    converted: bool = False,
    mixes: Mapping[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Params:
    """Writes a whole set of artefacts below `root`; returns their parameters. The teacher may be a converted one.

    `mixes` are the class mixes of the runs, balanced where not named, and `notes` those on them; without `mixes`
    nothing states any.
    """
    described = params(runs, seeds=seeds, converted=converted)
    classes = tuple(str(digit) for digit in range(10))
    count = PER_CLASS * len(classes)
    labels = np.arange(count, dtype=np.int64) % len(classes)
    parts = np.array([0] * 11 + [1] * 3 + [2] * 6, dtype=np.uint8)[np.arange(count) // len(classes)]

    def fill_dataset(folder: Path) -> None:
        images = digits(classes, count, seed=0)
        write_dataset(
            folder,
            [images],
            Layout(count, SIDE, 1, count),
            classes=classes,
            labels=labels,
            parts=parts,
            names=[f"{label}/{index}.png" for index, label in enumerate(labels)],
            digests=np.stack([np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in images]),
        )
        write_json(folder / "report.json", found(count))

    source = InputEntry("folder", hashlib.sha256(b"images").hexdigest())
    dataset = publish(
        root / "dataset",
        "dataset",
        "dataset",
        fill_dataset,
        parameters=described.data.plain(),
        inputs={"source": source},
    )
    protocol = [{"figure": f"fd_{name}", "how": f"Fréchet distance to 60 test images; {name}"} for name in FLOOR]
    floor: dict[str, Any] = {f"fd_{name}": value for name, value in FLOOR.items()}
    floor |= {"kid_classifier": 0.0002, "precision_classifier": 0.97, "recall_classifier": 0.96, "images": 100}
    floor |= {"class_accuracy": 0.987, "diversity": 1.0, "evaluations": 0, "guidance": None}
    floor["intervals"] = {"fd_classifier": [0.81, 1.04], "fd_efficientnet_lite0": [3.95, 4.5]}
    reference = publish(
        root / "reference",
        "reference",
        "reference",
        lambda folder: write_json(folder / "floor.json", _floors(floor | {"protocol": protocol}, mixes)),
        parameters=described.reference.plain(),
        inputs={"dataset": dataset.as_input},
    )
    models: dict[str, Artifact] = {}
    for name, steps in _models(runs).items():
        models[name] = _model(root, name, steps, dataset, reference, models, described)
    for name, figures in runs.items():
        mixed = {} if mixes is None else {"mix": [mixes.get(name, "balanced")], "notes": (notes or {}).get(name, [])}
        _run(root, name, figures, models, reference, protocol, described, classes, mixed)
    return described


def _floors(floor: Mapping[str, Any], mixes: Mapping[str, str] | None) -> dict[str, Any]:
    """floor.json: one floor, or one for each class mix, that of the data being twice as high."""
    if mixes is None:
        return {"100": floor}
    higher = {key: 2 * value for key, value in floor.items() if key.startswith("fd_")}
    return {
        "balanced 100": {**floor, "mix": ["balanced"], "notes": []},
        "data 100": {**floor, **higher, "intervals": {}, "mix": ["data"], "notes": []},
    }


def params(runs: Mapping[str, Any] = RUNS, *, seeds: int = 1, converted: bool = False) -> Params:
    """Parameters that name the fixture's teacher, students and runs."""
    teacher: dict[str, Any] = {"teachers": {"teacher": {}}}
    if converted:
        files = [{"path": "edm.pkl", "source": "path", "location": "edm.pkl"}]
        teacher = {"fetched": {"edm": {"files": files}}, "teachers": {}}
        teacher["converted"] = {"teacher": {"input": "edm", "file": "edm.pkl"}}
    return check(
        teacher
        | {
            "data": {"path": "images", "resolution": SIDE, "color": "grey"},
            "reference": {"floor": {"counts": [100]}},
            "distillation": {
                "students": {
                    name: {"teacher": "teacher", "init": "teacher", "steps": steps, "seed": SEEDS.get(name, 0)}
                    for name, steps in _models(runs).items()
                    if steps
                }
            },
            "sampling": {
                "runs": {name: _run_parameters(name, seeds) for name in runs},
            },
            "report": {"title": "Digits & <bars>", "grid_columns": 6},
        }
    )


def _run_parameters(name: str, seeds: int) -> dict[str, Any]:
    """A run's parameters, from its name: teacher-heun-79 is Heun at 79 evaluations with a tuned range."""
    model, sampler, evaluations = _model_of(name), _sampler_of(name), RUNS.get(name, (0,))[0]
    body = {"model": model, "images": 100, "seeds": list(range(seeds)), "guidance": 1.5 if "cfg15" in name else 1.0}
    if sampler == "native":
        return body | {"sigmas": f"models/{model}"}
    steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
    return body | {"sampler": sampler, "steps": steps, "sigmas": f"tuned/{model}"}


def _sampler_of(name: str) -> str:
    return next((word for word in ("heun", "2m", "euler", "renoise") if f"-{word}-" in name), "native")


def places(root: Path) -> Places:
    return Places(root / "dataset", root / "reference", root / "models", root / "samples", root / "evaluations")


def _models(runs: Iterable[str]) -> dict[str, int | None]:
    """Names and steps of the models that the runs use; the teacher has no steps."""
    return MODELS | {name: steps for name, steps in REPEATED.items() if name in runs}


def _model_of(run: str) -> str:
    name = run.removesuffix("-cfg15")
    return name if name in MODELS | REPEATED else "teacher"


def _model(
    root: Path,
    name: str,
    steps: int | None,
    dataset: Artifact,
    reference: Artifact,
    models: Mapping[str, Artifact],
    described: Params,
) -> Artifact:
    native = (
        None
        if steps is None
        else {"steps": steps, "transition": "euler", "sigma_max": 8.0, "sigma_min": 0.05, "rho": 7.0}
    )
    card = {
        "role": "teacher" if steps is None else "student",
        "resolution": SIDE,
        "channels": 1,
        "classes": [str(digit) for digit in range(10)],
        "unconditional_branch": True,
        "denoiser": {"kind": "edm", "sigma_max": 80.0, "sigma_min": 0.002},
        "native": native,
    }

    def fill(folder: Path) -> None:
        write_json(folder / "model.json", card)
        rng = np.random.default_rng(len(name))
        if steps is None:
            lines = ["step,loss,gradient_norm,validation_loss"]
            for step in range(10, 2001, 10):
                lines.append(
                    f"{step},{0.9 / (1 + step / 200) + 0.2 + 0.03 * rng.normal():.6g},{rng.uniform(1, 3):.6g},"
                )
                if step % 200 == 0:
                    lines.append(f"{step},,,{0.9 / (1 + step / 200) + 0.22:.6g}")
        else:
            lines = ["step,dm_loss,fake_score_loss,validation_distance"]
            for step in range(2, 301, 2):
                lines.append(f"{step},{rng.uniform(0.02, 0.04):.6g},{0.4 + 0.05 * rng.normal():.6g},")
                if step % 50 == 0:
                    lines.append(f"{step},,,{30 / steps + 4 + 40 / step + (step == 300):.6g}")
        (folder / "curves.csv").write_text("\n".join(lines) + "\n")

    inputs = {"dataset": dataset.as_input}
    summary: dict[str, Any] = {"parameters": 87_265}
    if steps is not None:
        inputs |= {"reference": reference.as_input}
        inputs |= {"teacher": models["teacher"].as_input, "init": models["teacher"].as_input}
        summary |= {"best_step": 250, "validation_distance": 30 / steps + 4.16}
    else:
        summary |= {"warnings": [WARNING]}
    stages = {
        "convert": described.converted,
        "train": described.teachers,
        "distill": described.distillation.students,
    }
    ((stage, section),) = [(stage, sections[name]) for stage, sections in stages.items() if name in sections]
    return publish(
        root / "models" / name,
        "model",
        stage,
        fill,
        parameters=section.plain(),
        inputs=inputs,
        summary=summary,
    )


def _run(
    root: Path,
    name: str,
    figures: tuple[int, float, float, float, float],
    models: Mapping[str, Artifact],
    reference: Artifact,
    protocol: Sequence[Mapping[str, str]],
    described: Params,
    classes: tuple[str, ...],
    mixed: Mapping[str, Any],
) -> None:
    run = described.sampling.runs[name]
    model, sampler, guidance, images, seeds = run.model, run.sampler, run.guidance, run.images, len(run.seeds)
    evaluations, classifier, efficient, accuracy, diversity = figures
    steps = (MODELS | REPEATED)[model] or run.steps
    total = images * seeds

    def fill_samples(folder: Path) -> None:
        write_samples(
            folder,
            [digits(classes, total, seed=evaluations)],
            labels=np.arange(total, dtype=np.int64) % len(classes),
            shape=(SIDE, SIDE, 1),
            index={
                "seeds": list(range(seeds)),
                "images_per_seed": images,
                "evaluations": evaluations,
                "guidance": guidance,
                "sampler": "euler" if sampler == "native" else sampler,
                "steps": steps,
                "sigmas": [8.0, 1.0, 0.05, 0.0],
                "model": {"name": model, "payload": models[model].manifest.payload, "weights": "ema"},
                "classes": list(classes),
            },
        )

    samples = publish(
        root / "samples" / name,
        "samples",
        "sample",
        fill_samples,
        parameters=run.plain(),
        inputs={"model": models[model].as_input},
    )
    metrics: dict[str, Any] = {
        "fd_classifier": classifier,
        "fd_efficientnet_lite0": efficient,
        "kid_classifier": classifier / 900,
        "kid_efficientnet_lite0": efficient / 4000,
        "precision_classifier": accuracy - 0.03,
        "recall_classifier": diversity - 0.05,
        "precision_efficientnet_lite0": accuracy - 0.11,
        "recall_efficientnet_lite0": diversity - 0.2,
        "class_accuracy": accuracy,
        "diversity": diversity,
        "nearest_train_ratio": 0.74 if name == "teacher-euler-4" else 0.97,
        "evaluations": evaluations,
        "guidance": guidance,
        "images": total,
        "seeds": seeds,
        "protocol": list(protocol),
        "intervals": {},
        **mixed,
    }
    for space, value in (("classifier", classifier), ("efficientnet_lite0", efficient)):
        metrics |= {f"floor_fd_{space}": FLOOR[space], f"excess_fd_{space}": round(value - FLOOR[space], 6)}
        if seeds > 1:
            metrics["intervals"][f"fd_{space}"] = [round(0.93 * value, 6), round(1.08 * value, 6)]
    publish(
        root / "evaluations" / name,
        "evaluation",
        "evaluate",
        lambda folder: write_json(folder / "metrics.json", metrics),
        parameters=described.evaluation.plain(),
        inputs={"samples": samples.as_input, "reference": reference.as_input},
    )
