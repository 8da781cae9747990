"""Everything that a report says, as one plain value: rows, comparisons, curves, the dataset's card, the chain.

Reads artefacts; what it returns is deterministic and holds no timings.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipestill.artifacts import Artifact
from pipestill.config import ReportParams
from pipestill.data.store import Dataset
from pipestill.errors import InputError
from pipestill.reporting import figures
from pipestill.reporting.repeats import repeats
from pipestill.reporting.sources import Sources

SCHEMA = 1
FAR = 5  # times the floor: a teacher beyond that says little about methods
Body = dict[str, Any]


def gather(sources: Sources, dataset: Dataset, params: ReportParams) -> Body:
    """The payload of a report, its grids aside: plain JSON values, equal for equal artefacts."""
    models = {name: _model(name, artifact) for name, artifact in sources.models.items()}
    runs = [_run(name, artifact, sources, models) for name, artifact in sources.evaluations.items()]
    floors = _floors(sources.reference)
    spaces = figures.extractors([run["metrics"] for run in runs] or [floor["metrics"] for floor in floors])
    runs.sort(key=lambda run: _order(run, spaces))
    compared = [comparison for space in spaces for comparison in comparisons(runs, space)]
    return {
        "schema": SCHEMA,
        "title": params.title,
        "verdict": verdict(runs, compared, spaces),
        "extractors": spaces,
        "runs": runs,
        "floors": floors,
        "comparisons": compared,
        "repeats": repeats(runs, compared, sources),
        "models": sorted(
            models.values(), key=lambda model: (model["role"] != "teacher", -(model["steps"] or 0), model["name"])
        ),
        "dataset": _dataset(dataset),
        "protocol": _protocol(sources, runs),
        "chain": [_link(name, artifact) for name, artifact in sources.named().items()],
        "left_out": sorted(sources.left_out),
    }


def read_json(artifact: Artifact, name: str) -> Any:
    """A JSON payload file. Raises InputError."""
    path = artifact.file(name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): run pipestill {artifact.manifest.stage} again") from error


def _order(run: Mapping[str, Any], spaces: Sequence[str]) -> tuple[float, float, str]:
    distance = figures.value(run["metrics"], f"fd_{spaces[0]}") if spaces else None
    return -(figures.value(run["metrics"], "evaluations") or 0.0), distance or 0.0, run["name"]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {key: figures.value(metrics, key) for key in sorted(metrics)}
    return {key: number for key, number in found.items() if number is not None}


def _intervals(metrics: Mapping[str, Any]) -> dict[str, list[float]]:
    bounds = metrics.get("intervals") or {}
    return {key: list(bounds[key]) for key in sorted(bounds) if bounds[key]}


def _run(name: str, evaluation: Artifact, sources: Sources, models: Mapping[str, Body]) -> Body:
    metrics = read_json(evaluation, "metrics.json")
    samples = sources.samples[name]
    index, parameters = read_json(samples, "index.json"), samples.manifest.parameters
    levels = [level for level in index["sigmas"] if level != 0]  # null is pure noise
    return {
        "name": name,
        "model": index["model"]["name"],
        "role": models[index["model"]["name"]]["role"],
        "sampler": index["sampler"],
        "steps": index["steps"],
        "guidance": index["guidance"],
        "weights": index["model"]["weights"],
        "tuned": str(parameters.get("sigmas", "")).startswith("tuned/"),
        "sigma_max": levels[0],
        "sigma_min": levels[-1],
        "images_per_seed": index["images_per_seed"],
        "seeds": list(index["seeds"]),
        "metrics": _numbers(metrics),
        "intervals": _intervals(metrics),
        **_mix(metrics),
    }


def _mix(metrics: Mapping[str, Any]) -> Body:
    """The class mix of a row, and what of it could not be matched."""
    return {"mix": " ".join(metrics.get("mix", [])), "notes": list(metrics.get("notes", []))}


def _floors(reference: Artifact) -> list[Body]:
    """Real-against-real figures, one entry for each number of images and class mix."""
    found = read_json(reference, "floor.json").values()
    floors = [{"metrics": _numbers(one), "intervals": _intervals(one), **_mix(one)} for one in found]
    return sorted(floors, key=lambda floor: (floor["mix"], floor["metrics"].get("images", 0)))


def _model(name: str, artifact: Artifact) -> Body:
    card = read_json(artifact, "model.json")
    native = card.get("native") or {}
    summary = artifact.manifest.summary
    inputs = artifact.manifest.inputs
    return {
        "name": name,
        "role": card["role"],
        "parameters": summary.get("parameters"),
        "steps": native.get("steps"),
        "transition": native.get("transition"),
        "noise": figures.noise_of(card),
        "from": inputs["init"].payload if "init" in inputs else None,
        "best_step": summary.get("best_step"),
        "warnings": list(summary.get("warnings", [])),
        "curves": _curves(artifact),
    }


def _curves(artifact: Artifact) -> dict[str, list[list[float]]]:
    """Each column of the model's CSV files as [step, value] pairs, rows without the figure left out."""
    curves: dict[str, list[list[float]]] = {}
    for name in ("curves.csv", "validation.csv"):
        if name not in artifact.manifest.files:
            continue
        with artifact.file(name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row["step"])
                for column, text in row.items():
                    if column != "step" and text:
                        curves.setdefault(column, []).append([step, float(text)])
    return curves


def _dataset(dataset: Dataset) -> Body:
    manifest = dataset.artifact.manifest
    labels, classes = np.asarray(dataset.labels), len(dataset.classes)
    counts = {
        part: np.bincount(labels[members], minlength=classes).tolist() if classes else [len(members)]
        for part, members in dataset.split.items()
    }
    return {
        "images": len(labels),
        "resolution": dataset.resolution,
        "channels": dataset.channels,
        "classes": list(dataset.classes),
        "split": counts,
        "parameters": dict(manifest.parameters),
        "found": read_json(dataset.artifact, "report.json") if "report.json" in manifest.files else {},
    }


def _protocol(sources: Sources, runs: Sequence[Mapping[str, Any]]) -> Body:
    """How each figure was measured, in the evaluations' own words, and whether all say the same."""
    stated = [
        (entry["figure"], entry["how"])
        for artifact in sources.evaluations.values()
        for entry in read_json(artifact, "metrics.json").get("protocol", [])
    ]
    texts = dict(stated)
    return {
        "texts": texts,
        "same_for_all": all(texts[figure] == how for figure, how in stated),
        "images": sorted({run["images_per_seed"] for run in runs}),
    }


def _link(name: str, artifact: Artifact) -> Body:
    manifest = artifact.manifest
    return {
        "name": name,
        "kind": manifest.kind,
        "payload": manifest.payload,
        "key": manifest.key,
        "stage": manifest.stage,
        "version": manifest.version,
        "parameters": dict(manifest.parameters),
        "inputs": {key: {"kind": entry.kind, "payload": entry.payload} for key, entry in manifest.inputs.items()},
        "summary": dict(manifest.summary),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def comparisons(runs: Sequence[Mapping[str, Any]], space: str) -> list[Body]:
    """Each student's run beside the teachers' best at no more evaluations, and at any number, in the same class mix.

    Guided runs take part like any other: their evaluations count both branches.
    """
    key = f"fd_{space}"
    measured = [run for run in runs if key in run["metrics"] and "evaluations" in run["metrics"]]
    teachers = [run for run in measured if run["role"] == "teacher"]
    found = []
    for run in measured:
        if run["role"] != "student":
            continue
        budget, rivals = run["metrics"]["evaluations"], [one for one in teachers if one["mix"] == run["mix"]]
        affordable = [teacher for teacher in rivals if teacher["metrics"]["evaluations"] <= budget]
        found.append(
            {
                "extractor": space,
                "run": run["name"],
                "mix": run["mix"],
                "distance": run["metrics"][key],
                "evaluations": budget,
                "same_budget": _lowest(affordable, key),
                "any_budget": _lowest(rivals, key),
                "floor": run["metrics"].get(f"floor_{key}"),
            }
        )
    return found


def _lowest(runs: Sequence[Mapping[str, Any]], key: str) -> Body | None:
    if not runs:
        return None
    best = min(runs, key=lambda run: (run["metrics"][key], run["metrics"]["evaluations"], run["name"]))
    return {"run": best["name"], "distance": best["metrics"][key], "evaluations": best["metrics"]["evaluations"]}


def verdict(runs: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]], spaces: Sequence[str]) -> str:
    """The student that comes closest, beside the teacher at its best and at the same budget.

    Distances of different class mixes are not compared: where runs have several, each has a sentence of its own.
    """
    if not runs:
        return "No run has been measured yet."
    space, mixes = spaces[0], list(dict.fromkeys(run["mix"] for run in runs))
    found = []
    for mix in mixes:
        students = [one for one in compared if one["extractor"] == space and one["mix"] == mix]
        measured = [run for run in runs if run["mix"] == mix and f"fd_{space}" in run["metrics"]]
        if measured:
            text = _closest_student(students, space) if students else _closest(measured, space)
            found.append(text if len(mixes) == 1 else f"Among runs with plan={mix}, {text}")
    return " ".join(found)


def _closest(runs: Sequence[Mapping[str, Any]], space: str) -> str:
    best = min(runs, key=lambda run: _excess(run["metrics"][f"fd_{space}"], run["metrics"].get(f"floor_fd_{space}")))
    return (
        f"{best['name']} comes closest: {figures.short(best['metrics'][f'fd_{space}'])} "
        f"({figures.extractor_title(space)}) with {_times(best['metrics']['evaluations'])} an image."
    )


def _closest_student(students: Sequence[Mapping[str, Any]], space: str) -> str:
    best = min(students, key=lambda comparison: _excess(comparison["distance"], comparison["floor"]))
    text = f"{best['run']}: distance {figures.short(best['distance'])} at {_times(best['evaluations'])} an image"
    same, any_budget = best["same_budget"], best["any_budget"]
    if same and any_budget and same != any_budget:
        text += f", against the teacher's best of {figures.short(same['distance'])} at no more"
        text += f" and {figures.short(any_budget['distance'])} at {any_budget['evaluations']:g}"
    elif any_budget:
        text += f", against the teacher's best of {figures.short(any_budget['distance'])}"
        text += f" at {_times(any_budget['evaluations'])}"
    if best["floor"] is not None:
        text += f"; real images score {figures.short(best['floor'])}"
    text = f"{text} ({figures.extractor_title(space)})."
    if best["floor"] and any_budget and any_budget["distance"] > FAR * best["floor"]:
        text += " The teacher itself is still far from real images: train it longer before you judge its students."
    return text


def _excess(distance: float, floor: float | None) -> float:
    """What is left to gain: the floor depends on the number of images."""
    return distance - (floor or 0.0)


def _times(count: float) -> str:
    return f"{count:g} evaluation{'' if count == 1 else 's'}"
