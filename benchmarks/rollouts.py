"""Rollouts of distillation: distance against seconds and against student forwards, for each way to get inputs.

    python benchmarks/rollouts.py --output runs/benchmarks/rollouts.json --picture rollouts.png

Run in a project whose dataset, reference and teacher are there (`pipestill config experiment=textures`, then
`snakemake artifacts/models/teacher/manifest.json artifacts/reference/manifest.json`). Students differ in `rollout`
and training seed alone and train for equal seconds: on a CPU those of the process, so that other work beside it
disturbs little, on a GPU those of the clock. Validation is in no second and no forward. Distances are of the averaged
student against the validation part; the table's are means over seeds of the last one, and of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from pipestill.config import StudentParams
from pipestill.distillation.validation import Validation
from pipestill.distributed import World, pick_device
from pipestill.evaluation.reference import open_reference
from pipestill.stages.distill import prepared

WAYS: dict[str, dict[str, Any]] = {
    "fresh": {"rollout": "fresh"},
    "every_step": {"rollout": "every_step"},
    "pool": {"rollout": "pool", "pool": {"updates": 4, "uses": 1}},
    "pool, each twice": {"rollout": "pool", "pool": {"updates": 4, "uses": 2}},
}
STUDENT: dict[str, Any] = {
    "teacher": "teacher",
    "init": "teacher",
    "steps": 10,
    "transition": "renoise",  # as published, and further from the teacher than "euler": more to be learned
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "iterations": 1_000_000,  # the budget ends it: no rate follows from this number
    "update_ratio": 2,
    "generator_lr": 1e-4,
    "fake_score_lr": 3e-4,
    "label_dropout": 0.1,
    "dm": {"sigma_min": 0.002},
    "gan": {"generator_weight": 0.0, "discriminator_weight": 0.0},
    "ema": {"decay": 0.97, "warmup": False},
    "precision": "bf16",
}


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def train(way: str, seed: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One student's distances as it trains."""
    validation = {"images": options.images, "seed": 2000, "extractor": options.space}
    params = StudentParams.model_validate(
        STUDENT | WAYS[way] | {"seed": seed, "batch": options.batch, "validation": validation}
    )
    root: Path = options.artifacts
    teacher = root / "models" / "teacher"
    world = World(0, 1, device)
    training, denoiser, card = prepared(
        params,
        dataset=root / "dataset",
        reference=root / "reference",
        teacher=teacher,
        init=teacher,
        world=world,
        cache="host",
    )
    measured = Validation(open_reference(root / "reference"), card, params.validation, params.plan, world)
    forwards = 0

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal forwards
        forwards += len(inputs[0])

    handle = denoiser.network.register_forward_hook(count)
    rows: list[dict[str, Any]] = []
    spent, done, due = 0.0, 0, 0.0
    while True:
        if spent >= due or spent >= options.seconds:
            passed = forwards
            found = measured.distance(denoiser, training.ema)
            forwards = passed
            rows.append(
                {
                    "rollout": way,
                    "seed": seed,
                    "updates": done,
                    "seconds": round(spent, 2),
                    "student_forwards": forwards,
                    "distance": round(found, 4),
                }
            )
            print(rows[-1], flush=True)
            due += options.seconds / options.marks
        if spent >= options.seconds:
            break
        begun = clock(device)
        training.update(done)
        spent += clock(device) - begun
        done += 1
    handle.remove()
    return rows


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each way: means over seeds, each seed's last and best distance, updates, seconds and forwards an update."""
    found = {}
    for way in WAYS:
        seeds: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            if row["rollout"] == way:
                seeds.setdefault(row["seed"], []).append(row)
        if not seeds:
            continue
        last = [own[-1] for own in seeds.values()]
        found[way] = {
            "last": [row["distance"] for row in last],
            "mean_last": round(statistics.fmean(row["distance"] for row in last), 3),
            "mean_best": round(statistics.fmean(min(row["distance"] for row in own) for own in seeds.values()), 3),
            "updates": round(statistics.fmean(row["updates"] for row in last)),
            "seconds_an_update": round(statistics.fmean(row["seconds"] / row["updates"] for row in last), 3),
            "forwards_an_update": round(statistics.fmean(row["student_forwards"] / row["updates"] for row in last), 1),
        }
    return found


def draw(rows: list[dict[str, Any]], path: Path, unit: str) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, key, label in zip(
        axes,
        ("seconds", "student_forwards"),
        (f"seconds of training ({unit})", "student forwards, thousands"),
        strict=True,
    ):
        scale = 1000 if key == "student_forwards" else 1
        for number, way in enumerate(WAYS):
            for seed in sorted({row["seed"] for row in rows}):
                own = [row for row in rows if (row["rollout"], row["seed"]) == (way, seed)]
                axis.plot(
                    [row[key] / scale for row in own],
                    [row["distance"] for row in own],
                    color=f"C{number}",
                    alpha=0.8,
                    label=way if seed == 0 else None,
                )
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation distance")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of each student")
    parser.add_argument("--marks", type=int, default=10, help="measurements on the way")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000, help="of each measurement")
    parser.add_argument("--space", default="efficientnet_lite0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if not (options.artifacts / "models" / "teacher").exists():
        print(f"{options.artifacts} holds no teacher: make one first (see --help)")
        return
    torch.set_num_threads(1)
    device = pick_device(options.device)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for way in WAYS:  # in turn, so that what the machine does meanwhile is shared
            rows += train(way, seed, options, device)
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                settings = {key: str(value) for key, value in vars(options).items()}
                options.output.write_text(
                    json.dumps({"settings": settings, "rows": rows, "table": table(rows)}, indent=1), encoding="utf-8"
                )
    print(json.dumps(table(rows), indent=1))
    if options.picture:
        draw(rows, options.picture, "CPU, one thread" if device.type == "cpu" else str(device))


if __name__ == "__main__":
    main()
