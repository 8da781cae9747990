"""Students that differ in nothing but their training seed, as one: means over training seeds beside the teachers' best.

Pure functions of a report's runs and of the parameters behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from pipestill import digests
from pipestill.evaluation.intervals import mean_and_interval, rounded
from pipestill.reporting import figures
from pipestill.reporting.sources import Sources


def repeats(
    runs: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]], sources: Sources
) -> list[dict[str, Any]]:
    """One entry for every two or more runs of students that differ in the training seed alone, in the runs' order.

    A run's figure is its mean over sampling seeds; the interval is the 95% t-interval over training seeds.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["role"] == "student":
            groups.setdefault(_likeness(run, sources), []).append(run)
    rivals = {(comparison["run"], comparison["extractor"]): comparison for comparison in compared}
    return [_entry(members, rivals) for members in groups.values() if len(members) > 1]


def _likeness(run: Mapping[str, Any], sources: Sources) -> str:
    """What two runs share that repeat each other: the student's parameters but its seed, and the run's."""
    trained = dict(sources.models[run["model"]].manifest.parameters)
    sampled = dict(sources.samples[run["name"]].manifest.parameters)
    trained.pop("seed", None)  # a converted student has none
    for name in ("model", "sigmas"):  # both name the student
        sampled.pop(name)
    return digests.canonical_json([trained, sampled])


def _entry(members: Sequence[Mapping[str, Any]], rivals: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    names = [str(run["name"]) for run in members]
    spaces = {}
    for space in figures.extractors([run["metrics"] for run in members]):
        values = [run["metrics"][f"fd_{space}"] for run in members]
        mean, interval = mean_and_interval(values)
        rival = rivals[names[0], space]
        spaces[space] = {
            "mean": rounded(mean),
            "interval": None if interval is None else [rounded(end) for end in interval],
            "values": values,
            "floor": rival["floor"],
            "same_budget": rival["same_budget"],
            "any_budget": rival["any_budget"],
        }
    return {
        "name": _common(names),
        "runs": names,
        "evaluations": members[0]["metrics"]["evaluations"],
        "guidance": members[0]["guidance"],
        "spaces": spaces,
    }


def _common(names: Sequence[str]) -> str:
    """The words with which all names begin, or the first name."""
    words = [name.split("-") for name in names]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*words, strict=False))]
    return "-".join(shared) or names[0]
