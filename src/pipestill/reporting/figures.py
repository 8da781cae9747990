"""What the figures of a run are called, mean and look like, and which of them lead. Pure functions of plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipestill import durations

Metrics = Mapping[str, Any]

EXTRACTORS = {
    "inception": "Inception-v3 features (FID)",
    "classifier": "classifier features",
    "efficientnet_lite0": "EfficientNet-Lite0 features",
}
SAMPLERS = {
    "heun": "Heun",
    "heun-churn": "Heun with churn",
    "euler": "Euler",
    "2m": "DPM-Solver++(2M)",
    "renoise": "renoising",
    "ddpm": "DDPM, ancestral",
    "ddim-linear-alpha": "linear-alpha formula",
    "native": "its own steps",
}
DASH = "–"


@dataclass(frozen=True)
class Meaning:
    """One figure's name and what it says, for the page's legend."""

    name: str
    text: str


TIME = Meaning(
    "Time",
    "Seconds per image when this machine made the samples, without start-up; a dash if they were made elsewhere. No "
    "other metric depends on it.",
)
MEANINGS = (
    Meaning(
        "Evaluations",
        "Network calls an image costs; with guidance each step makes two. Guidance 1 means none.",
    ),
    Meaning(
        "Distance",
        "Fréchet distance between the features of the generated images and those of the held-out test images. Lower is "
        "better. It depends on the extractor, the number of images and the reference: compare it only within one "
        "column of this page. Only the column named FID is FID.",
    ),
    Meaning(
        "Floor",
        "The same distance between as many real training images and the test images: what perfect samples would "
        "score. A distance means little without it.",
    ),
    Meaning(
        "Excess", "Distance minus floor: what is left to gain. Around zero the samples are as close as real images."
    ),
    Meaning(
        "[low, high]",
        "95% interval of the mean over the run's sampling seeds; on a floor row, over its draws. A run with one seed "
        "has none, and its figure is one draw.",
    ),
    Meaning(
        "KID",
        "Kernel distance between the same features. Unlike the Fréchet distance its expectation does not depend on the "
        "number of images; it can fall slightly below zero. Lower is better.",
    ),
    Meaning(
        "Precision, recall",
        "Share of generated images that lie among the real ones, and share of real images that lie among the "
        "generated ones. Blurry or guided samples gain precision and lose recall: read them together.",
    ),
    Meaning(
        "Accuracy",
        "Share of samples that a classifier, trained on the training part alone, gives the class they were made for. "
        "Much above the floor's own means too typical, not better.",
    ),
    Meaning(
        "Diversity",
        "Spread of the samples within their classes in that classifier's features, relative to the real test images. "
        "1 is right; below, samples repeat themselves.",
    ),
    Meaning(
        "Nearest train",
        "Median distance of a sample to its nearest training image, over the same for held-out test images. Around 1 "
        "is right; well below 1 the model has memorised.",
    ),
    TIME,
)


def extractors(metrics: Iterable[Metrics]) -> list[str]:
    """Names of the extractors with a Fréchet distance, the best known first, others by name."""
    found = {key.removeprefix("fd_") for figures in metrics for key in figures if key.startswith("fd_")}
    known = [name for name in EXTRACTORS if name in found]
    return known + sorted(found - set(known))


def extractor_title(name: str) -> str:
    return EXTRACTORS.get(name, f"{name} features")


def value(metrics: Metrics, key: str) -> float | None:
    """A figure as a finite float, or None where it was not measured."""
    found = metrics.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)


def interval(metrics: Metrics, key: str) -> tuple[float, float] | None:
    """Low and high over seeds or draws."""
    bounds = (metrics.get("intervals") or {}).get(key)
    return (float(bounds[0]), float(bounds[1])) if bounds else None


def floor_of(metrics: Metrics, extractor: str) -> float | None:
    """The real-against-real distance that stands beside a run's."""
    return value(metrics, f"floor_fd_{extractor}")


def excess_of(metrics: Metrics, extractor: str) -> float | None:
    """Distance minus floor."""
    return value(metrics, f"excess_fd_{extractor}")


def class_mix(metrics: Metrics) -> str:
    """The class mix of a row, and what of it could not be matched."""
    return "; ".join([*metrics.get("mix", []), *metrics.get("notes", [])])


def decimals(values: Iterable[float | None]) -> int:
    """Decimals for a column: three digits of its smallest value, or two where its largest would have more than four."""
    sizes = [abs(found) for found in values if found]
    if not sizes:
        return 2
    smallest, largest = min(sizes), max(sizes)
    two = 1 - math.floor(math.log10(smallest))
    wanted = min(two + 1, 3 - max(math.floor(math.log10(largest)), 0))
    return min(max(wanted, two, 0), 4)


def fixed(number: float | None, places: int) -> str:
    """A number with fixed decimals and a true minus, or a dash."""
    return DASH if number is None else f"{number:.{places}f}".replace("-", "−")


def short(number: float | None, digits: int = 3) -> str:
    """A number in `digits` significant digits, never in powers of ten above 1e-5, or a dash."""
    if number is None:
        return DASH
    if number == 0:
        return "0"
    places = max(digits - 1 - math.floor(math.log10(abs(number))), 0)
    return f"{number:.{min(places, 7)}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds in the unit that a person would choose, or a dash."""
    if seconds is None:
        return DASH
    if seconds < 1e-3:
        return f"{short(1e6 * seconds)} µs"
    if seconds < 1:
        return f"{short(1e3 * seconds)} ms"
    if seconds < 120:
        return f"{short(seconds)} s"
    return durations.duration(seconds)


def leaders(runs: Sequence[tuple[str, Metrics]], key: str) -> dict[str, str]:
    """Which runs no other run beats with as few or fewer evaluations, lower values of `key` being better.

    'best' has the lowest value at its budget; 'level' has not, but its interval reaches that of the run that has.
    Everything else is left out, and so is a run without a rival at its budget.
    """
    marks: dict[str, str] = {}
    measured = [(name, metrics, value(metrics, key), value(metrics, "evaluations")) for name, metrics in runs]
    for name, metrics, own, budget in measured:
        if own is None or budget is None:
            continue
        rivals = [
            (theirs, other)
            for _, other, theirs, spent in measured
            if theirs is not None and spent is not None and spent <= budget
        ]
        if len(rivals) < 2:
            continue
        lowest, best = min(rivals, key=lambda rival: rival[0])
        if own == lowest:
            marks[name] = "best"
            continue
        here, there = interval(metrics, key), interval(best, key)
        if here and there and here[0] <= there[1]:
            marks[name] = "level"
    return marks


def noise_of(card: Mapping[str, Any]) -> str:
    """The noise levels that a model is sampled at, or was trained for, from its `model.json`."""
    native, denoiser = card.get("native"), card["denoiser"]
    levels = denoiser if native is None else native
    if native is not None and native.get("spacing", "karras") != "karras":
        return f"{native['spacing']} steps of its teacher's noise"
    if levels.get("sigma_max") is not None:
        return f"sigma {levels['sigma_max']:g} to {levels['sigma_min']:g}"
    if denoiser["kind"] == "flow":
        return "a flow's velocity"
    predicted = "eps" if denoiser["prediction"] == "epsilon" else "v"
    schedule = "cosine" if denoiser["schedule"] == "squaredcos_cap_v2" else denoiser["schedule"].replace("_", "-")
    ending = " to pure noise" if denoiser["zero_terminal_snr"] else ""
    return f"DDPM's {predicted}, {schedule} schedule of {denoiser['steps']:,} steps{ending}"
