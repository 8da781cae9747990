"""All figures of one set of images against the reference, their means over repetitions, and their protocol in words.

Works on feature tables; sampled images, and real ones for the floor, are measured by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipestill import counter
from pipestill.evaluation import metrics
from pipestill.evaluation.intervals import mean_and_interval, rounded
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
    own: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Figures:
    """Figures of images given by their feature tables [n, d] in each space and their intended classes [n].

    Labels below 0 mean that no class was asked for: then there is neither accuracy nor diversity. `own` [n] says
    which training image each image is, where real ones are measured, so that none is its own neighbour.
    """
    protocol, found = reference.protocol, Figures()
    for name in protocol.extractors:
        table, real = features[name], reference.features("test", name)
        found[f"fd_{name}"] = frechet_distance(Moments.of(table, device=device), reference.target(name))
        found[f"kid_{name}"] = metrics.kid(
            table, real, subsets=protocol.kid_subsets, size=protocol.kid_subset_size, seed=protocol.seed
        )
        found[f"precision_{name}"], found[f"recall_{name}"] = metrics.precision_recall(
            table, real, neighbours=protocol.neighbours, device=device
        )
    if "inception" in protocol.extractors:
        head = reference.extractor("inception", device).head
        assert head is not None
        logits = features["inception"] @ head.T.cpu()
        found["inception_score"] = metrics.inception_score(logits, splits=SPLITS, seed=protocol.seed)
    if reference.index.nearest_real:
        pool = reference.features("train", NEAREST_SPACE)
        distances = metrics.nearest(features[NEAREST_SPACE], pool, own=own, device=device)
        found["nearest_train_ratio"] = float(distances.median()) / reference.index.nearest_real
    if reference.classes and bool((labels >= 0).all()):
        found |= _by_class(reference, features["classifier"], labels)
    return found


def by_seed(
    reference: Reference,
    tables: Mapping[str, Tensor],
    labels: Tensor,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> dict[str, Figures]:
    """Figures of each sampling seed; tables [seeds·n, d] and labels [seeds·n] hold one seed after another."""
    count, found = len(labels) // len(seeds), {}
    for index, seed in enumerate(seeds):
        rows = slice(index * count, (index + 1) * count)
        features = {space: table[rows] for space, table in tables.items()}
        found[str(seed)] = measure(reference, features, labels[rows], device=device)
    return found


def _by_class(reference: Reference, table: Tensor, labels: Tensor) -> Figures:
    with torch.inference_mode():
        guessed = reference.classifier().last(table).argmax(1)
    found = {"class_accuracy": float((guessed == labels).double().mean())}
    classes = len(reference.classes)
    real = metrics.spread(reference.features("test", "classifier"), reference.labels("test"), classes)
    diversity = metrics.diversity(metrics.spread(table, labels, classes), real)
    return found if diversity is None else found | {"diversity": diversity}


def nearest_real(reference: Reference, device: torch.device | str = "cpu") -> float | None:
    """Median distance of test images to their nearest training image; None without that space."""
    if NEAREST_SPACE not in reference.index.spaces:
        return None
    test, train = (reference.features(part, NEAREST_SPACE) for part in ("test", "train"))
    return float(metrics.nearest(test, train, device=device).median())


def summarise(repetitions: Sequence[Figures]) -> tuple[Figures, dict[str, list[float]]]:
    """Means over repetitions (seeds, or draws of the floor), and 95% t-intervals where there are several."""
    means, intervals = Figures(), {}
    for key in repetitions[0]:
        mean, interval = mean_and_interval([figures[key] for figures in repetitions])
        means[key] = rounded(mean)
        if interval is not None:
            intervals[key] = [rounded(end) for end in interval]
    return means, intervals


def stratified(labels: Tensor, count: int, *, seed: int, draw: int) -> Tensor:
    """`count` positions of [0, n) without repetition, classes in the proportions of `labels` [n]; sorted int64.

    Shares are rounded by largest remainder. The draw is a function of (seed, draw).
    """
    classes, sizes = np.unique(labels.numpy(), return_counts=True)
    exact = count * sizes / len(labels)
    shares = np.floor(exact).astype(np.int64)
    order = np.lexsort((classes, -(exact - shares)))
    shares[order[: count - shares.sum()]] += 1
    keys = counter.uniform(seed, "floor", torch.arange(len(labels)), draw=draw)
    chosen = []
    for index, share in zip(classes, shares, strict=True):
        members = torch.nonzero(labels == int(index)).flatten()
        chosen.append(members[torch.argsort(keys[members], stable=True)[: int(share)]])
    return torch.cat(chosen).sort().values


def floor(reference: Reference, count: int, draws: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Real-against-real figures at `count` images: class-stratified draws from train, measured against test.

    The classifier knows its training images, so `class_accuracy` is that of the test images.
    """
    labels, repetitions = reference.labels("train"), []
    for draw in range(draws):
        rows = stratified(labels, count, seed=reference.protocol.seed, draw=draw)
        features = {name: reference.features("train", name)[rows] for name in reference.index.spaces}
        repetitions.append(measure(reference, features, labels[rows], own=rows, device=device))
    means, intervals = summarise(repetitions)
    if "class_accuracy" in means:
        means["class_accuracy"] = rounded(reference.index.accuracy["test"])
        intervals.pop("class_accuracy", None)
    fixed = {"evaluations": 0, "guidance": None, "images": count, "seeds": draws}
    beside = {f"floor_{key}": value for key, value in means.items() if key.startswith("fd_")}
    excess = {f"excess_{key}": 0.0 for key in means if key.startswith("fd_")}
    texts = protocol_text(reference, means)
    repeated = f"mean of {draws} class-stratified draws of {count} train images, each against the whole test part"
    return {
        **means,
        **beside,
        **excess,
        **fixed,
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


def protocol_text(reference: Reference, keys: Mapping[str, float]) -> dict[str, str]:
    """How each figure is measured, in words, by its key."""
    protocol = reference.protocol
    texts = {}
    for name in protocol.extractors:
        space = reference.space_text(name)
        test = f"{reference.count('test')} test images"
        against = "the given statistics" if name == "inception" and reference.index.statistics else test
        texts[f"fd_{name}"] = f"Fréchet distance to {against}, float64 moments, N-1 covariance; {space}"
        texts[f"kid_{name}"] = (
            f"MMD² with kernel (x·y/d + 1)³ against {test}, mean of {protocol.kid_subsets} subsets of "
            f"{protocol.kid_subset_size} by numpy RandomState({protocol.seed}); {space}"
        )
        for half, meaning in (("precision", "images within the real"), ("recall", "real images within the sampled")):
            texts[f"{half}_{name}"] = (
                f"share of {meaning} ones' balls, radius the distance to neighbour {protocol.neighbours}, "
                f"against {test}; {space}"
            )
    texts["inception_score"] = f"torch-fidelity, {SPLITS} splits shuffled by numpy RandomState({protocol.seed})"
    texts["nearest_train_ratio"] = (
        "median distance to the nearest train image over that of test images; " + reference.space_text(NEAREST_SPACE)
        if reference.index.nearest_real
        else ""
    )
    texts["class_accuracy"] = "share put into the class asked for, by the classifier trained on the train part alone"
    texts["diversity"] = (
        "mean distance between two images of a class over that of test images, mean over classes; classifier features"
    )
    return {key: texts[key] for key in keys}
