"""All figures of one set of images against the reference, their means over repetitions, and their protocol in words.

Works on feature tables; sampled images, and real ones for the floor, are measured by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipestill import mixes
from pipestill.config import mix_of
from pipestill.config.fields import MixName
from pipestill.evaluation import metrics
from pipestill.evaluation.intervals import mean_and_interval, rounded
from pipestill.evaluation.matching import RESAMPLES, Match, chosen, match
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import Reference

NEAREST_SPACE = "efficientnet_lite0"
SPLITS = 10  # of the Inception Score

Figures = dict[str, float]


def measure(
    reference: Reference,
    features: Mapping[str, Tensor],
    labels: Tensor,
    *,
    match: Match,
    own: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Figures:
    """Figures of images given by their feature tables [n, d] in each space and their intended classes [n].

    `match` says how the test part is brought into their class mix.

    Labels below 0 mean that no class was asked for: then there is neither accuracy nor diversity. `own` [n] says
    which training image each image is, where real ones are measured, so that none is its own neighbour.
    """
    protocol, found = reference.protocol, Figures()
    for name in protocol.extractors:
        table, real = features[name], reference.features("test", name)
        target = reference.target(name, match.weights, device)
        found[f"fd_{name}"] = frechet_distance(Moments.of(table, device=device), target)
        if match.weights is None or match.subsets is not None:
            found[f"kid_{name}"] = metrics.kid(
                table,
                real,
                subsets=protocol.kid_subsets,
                size=protocol.kid_subset_size,
                seed=protocol.seed,
                rows=match.subsets,
            )
        if match.weights is None or match.resamples is not None:
            found |= _precision_recall(table, real, name, match, protocol.neighbours, device)
    if "inception" in protocol.extractors:
        head = reference.extractor("inception", device).head
        assert head is not None
        logits = features["inception"] @ head.T.cpu()
        found["inception_score"] = metrics.inception_score(logits, splits=SPLITS, seed=protocol.seed)
    real_distance = reference.nearest_real(match.weights)
    if real_distance:  # 0 where most test images repeat training images
        pool = reference.features("train", NEAREST_SPACE)
        distances = metrics.nearest(features[NEAREST_SPACE], pool, own=own, device=device)
        found["nearest_train_ratio"] = float(distances.median()) / real_distance
    if reference.classes and bool((labels >= 0).all()):
        found |= _by_class(reference, features["classifier"], labels)
    return found


def _precision_recall(
    table: Tensor, real: Tensor, name: str, match: Match, neighbours: int, device: torch.device | str
) -> Figures:
    parts = [real] if match.resamples is None else [real[rows] for rows in match.resamples]
    pairs = [metrics.precision_recall(table, part, neighbours=neighbours, device=device) for part in parts]
    precision, recall = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {f"precision_{name}": precision, f"recall_{name}": recall}


def by_seed(
    reference: Reference,
    tables: Mapping[str, Tensor],
    labels: Tensor,
    seeds: Sequence[int],
    match: Match,
    device: torch.device | str = "cpu",
) -> dict[str, Figures]:
    """Figures of each sampling seed; tables [seeds·n, d] and labels [seeds·n] hold one seed after another."""
    count, found = len(labels) // len(seeds), {}
    for index, seed in enumerate(seeds):
        rows = slice(index * count, (index + 1) * count)
        features = {space: table[rows] for space, table in tables.items()}
        found[str(seed)] = measure(reference, features, labels[rows], match=match, device=device)
    return found


def _by_class(reference: Reference, table: Tensor, labels: Tensor) -> Figures:
    guessed = reference.guess(table)
    found = {"class_accuracy": float((guessed == labels).double().mean())}
    classes = len(reference.classes)
    real = metrics.spread(reference.features("test", "classifier"), reference.labels("test"), classes)
    diversity = metrics.diversity(metrics.spread(table, labels, classes), real)
    return found if diversity is None else found | {"diversity": diversity}


def nearest_real(reference: Reference, device: torch.device | str = "cpu") -> Tensor | None:
    """Distance of each test image to its nearest training image, float64 [n]; None without that space."""
    if NEAREST_SPACE not in reference.index.spaces:
        return None
    test, train = (reference.features(part, NEAREST_SPACE) for part in ("test", "train"))
    return metrics.nearest(test, train, device=device)


def summarise(repetitions: Sequence[Figures]) -> tuple[Figures, dict[str, list[float]]]:
    """Means over repetitions (seeds, or draws of the floor), and 95% t-intervals where there are several.

    A figure that one of them lacks (diversity, where no class has two images) is left out.
    """
    means, intervals = Figures(), {}
    for key in repetitions[0]:
        if not all(key in figures for figures in repetitions):
            continue
        mean, interval = mean_and_interval([figures[key] for figures in repetitions])
        means[key] = rounded(mean)
        if interval is not None:
            intervals[key] = [rounded(end) for end in interval]
    return means, intervals


def drawn_rows(reference: Reference, count: int, plan: MixName, draw: int) -> Tensor:
    """`count` train images of a floor without repetition, in the mix of a plan; sorted int64.

    A train part that is in the mix already, as far as whole images allow, is drawn from in its own proportions.
    """
    labels, train = reference.labels("train").numpy(), reference.counts("train")
    if not reference.classes:
        labels, train = np.zeros_like(labels), np.array([len(labels)])
    mix = mixes.of_plan(plan, train)
    sizes = mixes.apportioned(train if mixes.agree(train, mix) else mix, count)
    return chosen(labels, sizes, seed=reference.protocol.seed, purpose="floor", draw=draw)


def floor(
    reference: Reference, count: int, draws: int, plan: MixName, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Real-against-real figures at `count` images in the mix of a plan: draws from train, measured against test.

    The classifier knows its training images, so `class_accuracy` is that of the test images.
    """
    labels, repetitions, matched = reference.labels("train"), [], match(reference, plan)
    for draw in range(draws):
        rows = drawn_rows(reference, count, plan, draw)
        features = {name: reference.features("train", name)[rows] for name in reference.index.spaces}
        repetitions.append(measure(reference, features, labels[rows], match=matched, own=rows, device=device))
    means, intervals = summarise(repetitions)
    if "class_accuracy" in means:
        means["class_accuracy"] = rounded(reference.accuracy(matched.weights))
        intervals.pop("class_accuracy", None)
    fixed = {"evaluations": 0, "guidance": None, "images": count, "seeds": draws}
    beside = {f"floor_{key}": value for key, value in means.items() if key.startswith("fd_")}
    excess = {f"excess_{key}": 0.0 for key in means if key.startswith("fd_")}
    texts = protocol_text(reference, means, matched)
    repeated = f"mean of {draws} class-stratified draws of {count} train images, each against the whole test part"
    return {
        **means,
        **beside,
        **excess,
        **fixed,
        "mix": [plan],
        "notes": list(matched.notes),
        "intervals": intervals,
        "protocol": stated(texts | {"floor": repeated, "intervals": INTERVAL.format("draws")}),
    }


INTERVAL = "95% t-interval of the mean over {}"


def stated(texts: Mapping[str, str]) -> list[dict[str, str]]:
    """The protocol as metrics files hold it: a list, since DVC makes a column of every text in a mapping."""
    return [{"figure": key, "how": text} for key, text in texts.items()]


def texts_of(stated: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The inverse of `stated`."""
    return {entry["figure"]: entry["how"] for entry in stated}


def protocol_text(reference: Reference, keys: Mapping[str, float], match: Match) -> dict[str, str]:
    """How each figure is measured, in words, by its key."""
    protocol = reference.protocol
    texts = {}
    weighted, drawn, resampled = "", "", ""
    if match.weights is not None:
        mix = "the class mix of the data" if mix_of(match.plan) == "data" else "equal shares of the classes"
        weighted, drawn = f", weighted to {mix}", f", these drawn in {mix}"
        resampled = f", mean over {RESAMPLES} of their largest subsets in {mix}"
    for name in protocol.extractors:
        space = reference.space_text(name)
        test = f"{reference.count('test')} test images"
        outside = name == "inception" and reference.index.statistics
        against = "the given statistics" if outside else f"{test}{weighted}"
        texts[f"fd_{name}"] = f"Fréchet distance to {against}, float64 moments, N-1 covariance; {space}"
        texts[f"kid_{name}"] = (
            f"MMD² with kernel (x·y/d + 1)³ against {test}, mean of {protocol.kid_subsets} subsets of "
            f"{protocol.kid_subset_size} by numpy RandomState({protocol.seed}){drawn}; {space}"
        )
        for half, meaning in (("precision", "images within the real"), ("recall", "real images within the sampled")):
            texts[f"{half}_{name}"] = (
                f"share of {meaning} ones' balls, radius the distance to neighbour {protocol.neighbours}, "
                f"against {test}{resampled}; {space}"
            )
    texts["inception_score"] = f"torch-fidelity, {SPLITS} splits shuffled by numpy RandomState({protocol.seed})"
    texts["nearest_train_ratio"] = (
        f"median distance to the nearest train image over that of test images{weighted}; "
        + reference.space_text(NEAREST_SPACE)
        if reference.index.nearest_real is not None
        else ""
    )
    texts["class_accuracy"] = "share put into the class asked for, by the classifier trained on the train part alone"
    texts["diversity"] = (
        "mean distance between two images of a class over that of test images, mean over classes; classifier features"
    )
    return {key: texts[key] for key in keys}
