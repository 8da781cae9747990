"""Building the reference's payload: classifier, tables, moments, what real images score, and the floors.

Each step goes on from what an earlier attempt left in the work's state; it writes there and into the staging folder.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pipestill.config import ClassifierParams, ReferenceParams
from pipestill.config.fields import MixName
from pipestill.data.store import Dataset
from pipestill.distributed import World
from pipestill.errors import InputError, Stopped
from pipestill.evaluation import classifier, measure
from pipestill.evaluation.classifier import Classifier
from pipestill.evaluation.extractors import Extractor
from pipestill.evaluation.intervals import rounded
from pipestill.evaluation.limits import misfits
from pipestill.evaluation.moments import Moments, MomentSums, read_statistics
from pipestill.evaluation.reference import (
    CLASSIFIER,
    FLOOR,
    INDEX,
    NEAREST,
    PARTS,
    STATISTICS,
    Index,
    Part,
    Reference,
    floor_key,
    make_extractor,
    moments_path,
    write_moments,
)
from pipestill.evaluation.tables import extract, table_path
from pipestill.progress import Bar, say
from pipestill.stopping import StopRequest
from pipestill.work import write_atomic

UNFINISHED = "classifier-training.pt"  # in the work's state
HELD_BYTES = 1 << 30  # images that the classifier's training holds in memory


def check(params: ReferenceParams, data: Dataset) -> None:
    """Raises InputError, in one line, where the data is too small for what the parameters ask or has no labels."""
    sizes = {part: len(indices) for part, indices in data.split.items()}
    train = dict(zip(data.classes, data.train_counts.tolist(), strict=True))
    found = misfits(params, sizes, train, where=data.artifact.path)
    if found:
        raise InputError("; ".join(found))


def images_of(data: Dataset, part: Part, first: int, last: int) -> Tensor:
    """Images [first, last) of a part, uint8 [n, C, H, W]."""
    return torch.from_numpy(data.images(data.split[part][first:last])).permute(0, 3, 1, 2)


def train_classifier(params: ReferenceParams, data: Dataset, state: Path, world: World) -> Classifier | None:
    """The classifier, trained by the leader and read by every rank; None where the data has no labels."""
    if not data.classes:
        return None
    path, stopped = state / CLASSIFIER, None
    with world.stop.at_steps():  # the leader says to all whether it stopped
        if world.leader and not path.exists():
            try:
                network = _trained(params.classifier, data, state / UNFINISHED, world.stop)
                write_atomic(path, save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
                (state / UNFINISHED).unlink(missing_ok=True)
            except Stopped as error:
                stopped = str(error)
        world.await_leader("classifier")
        stopped = world.broadcast(stopped)
        if stopped is not None:
            raise Stopped(stopped)
    network = Classifier(params.classifier, data.channels, len(data.classes))
    network.load_state_dict(load_file(path))
    return network.requires_grad_(False).eval()


def _trained(params: ClassifierParams, data: Dataset, unfinished: Path, stop: StopRequest) -> Classifier:
    """The trained classifier; what a stop interrupts is left in `unfinished`, from where the next call goes on."""
    labels = torch.from_numpy(data.labels[data.split["train"]])
    training = classifier.ClassifierTraining(params, _TrainImages(data), labels, len(data.classes))
    if unfinished.exists():
        training.load(torch.load(unfinished, weights_only=True))
        say(f"the classifier goes on after update {training.done} of {params.iterations}")
    bar = Bar("classifier", params.iterations, done=training.done, unit="updates")
    with closing(bar):
        for _ in training.updates():
            bar.advance()
            if training.done < params.iterations and stop.requested():
                content = io.BytesIO()
                torch.save(training.state(), content)
                write_atomic(unfinished, content.getvalue())
                stop.check(f"update {training.done} of the classifier's {params.iterations} is saved; start it again")
    return training.network


class _TrainImages:
    """The train part by position: held in memory where it is small, read as it is asked for where it is not."""

    def __init__(self, data: Dataset) -> None:
        self._data, self._count = data, len(data.split["train"])
        small = self._count * data.layout.image_bytes <= HELD_BYTES
        self._held = images_of(data, "train", 0, self._count) if small else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: Tensor) -> Tensor:
        if self._held is not None:
            return self._held[positions]
        indices = self._data.split["train"][positions.numpy()]
        return torch.from_numpy(self._data.images(indices)).permute(0, 3, 1, 2)


def make_extractors(params: ReferenceParams, judge: Classifier | None, world: World) -> list[Extractor]:
    """The extractors of every space that is kept: the protocol's, and the classifier's where there is one."""
    names = dict.fromkeys((*params.protocol.extractors, *(("classifier",) if judge else ())))
    return [
        classifier.extractor(judge, world.device)
        if name == "classifier" and judge is not None
        else make_extractor(name, world.device, params.protocol.inception_weights)
        for name in names
    ]


def measure_parts(
    params: ReferenceParams, data: Dataset, extractors: list[Extractor], state: Path, world: World
) -> dict[tuple[str, str], Moments]:
    """Tables of every part by every extractor, left in `state`; returns the moments by (part, extractor)."""
    moments: dict[tuple[str, str], Moments] = {}
    for part in PARTS:
        count = len(data.split[part])
        if not count:
            continue

        def images(first: int, last: int, part: Part = part) -> Tensor:
            return images_of(data, part, first, last)

        tables = extract(state, part, extractors, images, count, block=params.batch, world=world)
        if count > 1:
            moments |= {(part, name): Moments.of(table, world, world.device) for name, table in tables.items()}
    if params.statistics is not None:
        inception = next(extractor for extractor in extractors if extractor.name == "inception")
        moments[STATISTICS, "inception"] = outside_moments(Path(params.statistics), inception, params.batch)
    return moments


def write_payload(
    params: ReferenceParams,
    data: Dataset,
    extractors: list[Extractor],
    moments: dict[tuple[str, str], Moments],
    state: Path,
    staging: Path,
    *,
    inception_sha256: str | None,
    world: World,
) -> Reference:
    """Fills the staging folder: tables, labels, moments, classifier, index and floors. On the leader alone."""
    sizes = {part: len(data.split[part]) for part in PARTS}
    for part in PARTS:
        np.save(staging / f"{part}-labels.npy", data.labels[data.split[part]])
        for extractor in extractors:
            if sizes[part]:
                shutil.copyfile(table_path(state, part, extractor.name), table_path(staging, part, extractor.name))
    for (label, name), found in moments.items():
        write_moments(moments_path(staging, label, name), found)
    if data.classes:
        shutil.copyfile(state / CLASSIFIER, staging / CLASSIFIER)
    index = Index(
        resolution=data.resolution,
        channels=data.channels,
        classes=data.classes,
        images={str(part): count for part, count in sizes.items()},
        protocol=params.protocol,
        classifier=params.classifier if data.classes else None,
        accuracy={},
        nearest_real=None,
        texts={extractor.name: extractor.protocol for extractor in extractors},
        inception_sha256=inception_sha256,
        statistics=params.statistics is not None,
    )
    index = _with_real_figures(Reference(staging, index), staging, world)
    (staging / INDEX).write_text(index.to_json(), encoding="utf-8")
    reference = Reference(staging, index)
    floors = {}
    for plan, count in itertools.product(floor_plans(params, data.classes), params.floor.counts):
        world.stop.check()
        figures = measure.floor(reference, count, params.floor.draws, plan, world.device)
        floors[floor_key(count, plan)] = json.loads(
            json.dumps(figures, sort_keys=True)
        )  # figures by name, counts as they were given
    (staging / FLOOR).write_text(json.dumps(floors, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return reference


def floor_plans(params: ReferenceParams, classes: Sequence[str]) -> tuple[MixName, ...]:
    """The mixes of the floors; there is only that of the data without classes."""
    return params.floor.plans if classes else ("data",)


def _with_real_figures(reference: Reference, staging: Path, world: World) -> Index:
    """The index with what is known of real images: the classifier's accuracies and the nearest-neighbour distance.

    Each image's distance is written beside it.
    """
    index, accuracy = reference.index, dict[str, float]()
    for part in PARTS if index.classifier is not None else ():
        if index.images[part]:
            guessed = reference.guess(reference.features(part, "classifier"))
            accuracy[part] = rounded(float((guessed == reference.labels(part)).double().mean()))
    distances = measure.nearest_real(reference, world.device)
    if distances is None:
        return replace(index, accuracy=accuracy, nearest_real=None)
    np.save(staging / NEAREST, distances.numpy())
    return replace(index, accuracy=accuracy, nearest_real=float(distances.median()))


def outside_moments(path: Path, inception: Extractor, batch: int) -> Moments:
    """Moments of an outside npz: its mu and sigma, or, where it has none, those of the images in its arr_0."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"] if "mu" not in file.files and "arr_0" in file.files else None
    except Exception:
        images = None  # the reader of statistics says what is wrong with the file
    if images is None:
        return read_statistics(path, inception.dimension)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(f"{path}: arr_0 holds {images.dtype} {images.shape}, uint8 [n, H, W, 1 or 3] was expected")
    sums = MomentSums(inception.dimension, inception.device)
    for first in range(0, len(images), batch):
        sums.add(inception(torch.from_numpy(images[first : first + batch]).permute(0, 3, 1, 2)))
    return sums.moments()
