"""The reference artefact: what images are measured against, read by tuning, distillation and evaluation.

Feature tables and moments of each part in each extractor's space, the classifier, the real-against-real floors and
the protocol. Reads one folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from pipestill import artifacts, digests, mixes
from pipestill.artifacts import Artifact, InputEntry
from pipestill.config import ClassifierParams, ProtocolParams, check_section
from pipestill.config.fields import MixName
from pipestill.errors import InputError
from pipestill.evaluation import classifier, extractors
from pipestill.evaluation.classifier import Classifier
from pipestill.evaluation.extractors import Extractor
from pipestill.evaluation.moments import Moments
from pipestill.evaluation.tables import read_table, table_path

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
INDEX, FLOOR, CLASSIFIER = "reference.json", "floor.json", "classifier.safetensors"
NEAREST = "test-nearest.npy"  # distance of each test image to its nearest training image
STATISTICS = "statistics"  # name under which moments from an outside file are kept, beside the parts'


@dataclass(frozen=True)
class Index:
    """What reference.json says."""

    resolution: int
    channels: int
    classes: tuple[str, ...]
    images: Mapping[str, int]  # by part
    protocol: ProtocolParams
    classifier: ClassifierParams | None  # None where the data has no labels
    accuracy: Mapping[str, float]  # the classifier's, by part
    nearest_real: float | None  # median distance of test images to their nearest training image
    texts: Mapping[str, str]  # what each feature space is, in words
    inception_sha256: str | None
    statistics: bool  # whether outside statistics stand in for the test part's Inception moments

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of the feature spaces in which tables are kept: the protocol's, and the classifier's with labels."""
        judge = ("classifier",) if self.classifier is not None else ()
        return tuple(dict.fromkeys((*self.protocol.extractors, *judge)))

    def to_json(self) -> str:
        body = dict(self.__dict__) | {
            "images": dict(self.images),
            "accuracy": dict(self.accuracy),
            "texts": dict(self.texts),
            "protocol": self.protocol.plain(),
            "classifier": self.classifier.plain() if self.classifier else None,
        }
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Index:
        try:
            body = json.loads(text)
            body["protocol"] = check_section(ProtocolParams, body["protocol"], where)
            if body["classifier"] is not None:
                body["classifier"] = check_section(ClassifierParams, body["classifier"], where)
            return Index(**body | {"classes": tuple(body["classes"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} cannot be read ({error}): rebuild the reference") from error


@dataclass
class Reference:
    """A reference, open for reading; what is asked for twice is read once."""

    folder: Path
    index: Index
    artifact: Artifact | None = None  # None while it is being built
    _kept: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def protocol(self) -> ProtocolParams:
        return self.index.protocol

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, () without labels."""
        return self.index.classes

    @property
    def resolution(self) -> int:
        return self.index.resolution

    @property
    def channels(self) -> int:
        return self.index.channels

    def count(self, part: Part) -> int:
        """Number of images in a part."""
        return self.index.images[part]

    def space_text(self, name: str) -> str:
        """What a feature space is, in words."""
        return self.index.texts[name]

    def features(self, part: Part, name: str) -> Tensor:
        """Feature table of a part, float32 [n, d], mapped from disk. Raises InputError for one that is not kept."""
        self._check(part, name)
        return read_table(table_path(self.folder, part, name))

    def labels(self, part: Part) -> Tensor:
        """Class of each image of a part, int64 [n] (-1 without labels), in the order of the tables."""
        return torch.from_numpy(np.load(self.folder / f"{part}-labels.npy"))

    def counts(self, part: Part) -> NDArray[np.int64]:
        """Images of each class in a part, int64 [classes]."""
        return mixes.counts(self.labels(part).numpy(), len(self.classes))

    def moments(self, part: Part, name: str) -> Moments:
        """Moments of a part in an extractor's space. Raises InputError where the part holds fewer than two images."""
        self._check(part, name)
        if self.count(part) < 2:
            raise InputError(
                f"{self.folder} was made from {self.count(part)} {part} images, a distance needs 2: raise data.split"
            )
        return self._moments(part, name)

    def weighted(self, part: Part, name: str, weights: Tensor | None, device: torch.device | str = "cpu") -> Moments:
        """Moments of a part whose images count by weights of sum 1; as they are without. Raises InputError as above."""
        plain = self.moments(part, name)
        if weights is None:
            return plain
        key = ("weighted", part, name, digests.of_bytes(weights.numpy().tobytes()))
        if key not in self._kept:
            self._kept[key] = Moments.weighted(self.features(part, name), weights, device)
        return self._kept[key]  # type: ignore[no-any-return]

    def target(self, name: str, weights: Tensor | None, device: torch.device | str = "cpu") -> Moments:
        """The moments that reported distances are measured against: outside statistics if given, else the test part."""
        if name == "inception" and self.index.statistics:
            return self._moments(STATISTICS, name)
        return self.weighted("test", name, weights, device)

    def in_mix(self, part: Part, name: str, plan: MixName) -> tuple[Moments, NDArray[np.int64]]:
        """What samples are chosen by: moments of a part in the mix of a plan, and that mix, int64 [classes].

        Classes that the part or the train part has no image of are left out.
        """
        mix = mixes.of_plan(plan, self.counts("train"))
        mix = np.where(self.counts(part) > 0, mix, 0)
        weights = mixes.weights(self.labels(part).numpy(), mix) if mix.any() else None
        return self.weighted(part, name, None if weights is None else torch.from_numpy(weights)), mix

    def nearest_real(self, weights: Tensor | None) -> float | None:
        """Median distance of test images, by weight, to their nearest training image; None where it is not known."""
        if weights is None or self.index.nearest_real is None:
            return self.index.nearest_real
        distances = torch.from_numpy(np.load(self.folder / NEAREST))
        order = torch.argsort(distances, stable=True)
        middle = int(torch.searchsorted(weights[order].cumsum(0), 0.5))
        return float(distances[order[min(middle, len(order) - 1)]])

    def guess(self, table: Tensor) -> Tensor:
        """The classifier's guesses, int64 [n], from its features [n, d]: only classes that had images to train on."""
        with torch.inference_mode():
            logits = self.classifier().last(table)
        filled = torch.from_numpy(np.flatnonzero(self.counts("train")))
        return filled[logits[:, filled].argmax(1)]

    def accuracy(self, weights: Tensor | None) -> float:
        """The classifier's accuracy on the test images, by weight."""
        if weights is None:
            return self.index.accuracy["test"]
        right = self.guess(self.features("test", "classifier")) == self.labels("test")
        return float((weights * right).sum())

    def _moments(self, label: str, name: str) -> Moments:
        key = ("moments", label, name)
        if key not in self._kept:
            held = load_file(moments_path(self.folder, label, name))
            self._kept[key] = Moments(held["mean"], held["covariance"], int(held["count"]))
        return self._kept[key]  # type: ignore[no-any-return]

    def _check(self, part: str, name: str) -> None:
        if name not in self.index.spaces:
            raise InputError(
                f"{self.folder} was made without extractor {name} (it has {', '.join(self.index.spaces)}): "
                "add it to reference.protocol.extractors and rebuild the reference"
            )
        if not self.index.images.get(part):
            raise InputError(f"{self.folder} has no {part} images: set data.split so that the part is not empty")

    def extractor(self, name: str, device: torch.device | str = "cpu") -> Extractor:
        """The extractor by which this reference's tables were made. Raises InputError where it cannot be had."""
        if name not in self.index.spaces:
            self._check("train", name)
        key = ("extractor", name, str(device))
        if key not in self._kept:
            self._kept[key] = self._make_extractor(name, device)
        return self._kept[key]  # type: ignore[no-any-return]

    def _make_extractor(self, name: str, device: torch.device | str) -> Extractor:
        if name == "classifier":
            return classifier.extractor(self.classifier(device), device)
        weights = self.protocol.inception_weights
        if name == "inception" and self.index.inception_sha256 is not None:
            file = extractors.inception_weights(weights)
            if digests.of_file(file) != self.index.inception_sha256:
                raise InputError(f"{file} is not the file that {self.folder} was made with: bring it back or rebuild")
        return make_extractor(name, device, weights)

    def classifier(self, device: torch.device | str = "cpu") -> Classifier:
        """The classifier, on a device. Raises InputError where the data had no labels."""
        if self.index.classifier is None:
            raise InputError(f"{self.folder} has no classifier: its data has no labels")
        key = ("classifier", str(device))
        if key not in self._kept:
            network = Classifier(self.index.classifier, self.channels, len(self.classes))
            network.load_state_dict(load_file(self.folder / CLASSIFIER))
            self._kept[key] = network.requires_grad_(False).eval().to(device)
        return self._kept[key]  # type: ignore[no-any-return]

    def classify(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Logits [n, classes] of uint8 images [n, C, H, W]."""
        return classifier.logits(self.classifier(device), images)

    def floor(self, count: int, plan: MixName) -> dict[str, Any]:
        """Real-against-real figures at `count` images in the mix of a plan. Raises InputError if not measured."""
        key = ("floor",)
        if key not in self._kept:
            self._kept[key] = json.loads((self.folder / FLOOR).read_text(encoding="utf-8"))
        floors: dict[str, dict[str, Any]] = self._kept[key]
        if floor_key(count, plan) not in floors:
            raise InputError(
                f"{self.folder} has no real-against-real floor at {count} images of plan {plan} (it has "
                f"{', '.join(floors)}): add it to reference.floor.counts and plans and rebuild the reference"
            )
        return floors[floor_key(count, plan)]

    def check_card(self, channels: int, resolution: int, classes: Sequence[str]) -> None:
        """Raises InputError, in one line, where this was made for other images than a model makes."""
        own, theirs = (self.channels, self.resolution, self.classes), (channels, resolution, tuple(classes))
        if own != theirs:
            raise InputError(
                f"{self.folder} was made from {own[1]}x{own[1]} images with {own[0]} channels and {len(own[2])} "
                f"classes, not for {theirs[1]}x{theirs[1]} with {theirs[0]} and {len(theirs[2])} or other ones: "
                "use the reference of this data"
            )

    def check_count(self, count: int) -> None:
        """Raises InputError if the protocol's KID subsets or neighbours do not fit into `count` images per seed."""
        if count < self.protocol.kid_subset_size or count <= self.protocol.neighbours:
            raise InputError(
                f"{count} images per seed are too few for subsets of {self.protocol.kid_subset_size} and "
                f"{self.protocol.neighbours} neighbours: sample more, or lower reference.protocol.kid_subset_size"
            )

    @property
    def measures(self) -> InputEntry:
        """What features depend on: the spaces, the classifier and Inception's file, and not parts, floors or counts."""
        assert self.artifact is not None
        files = self.artifact.manifest.files
        stated = {
            "spaces": {space: self.index.texts[space] for space in self.index.spaces},
            "classifier": files[CLASSIFIER].sha256 if CLASSIFIER in files else None,
            "inception": self.index.inception_sha256,
        }
        return InputEntry("extractors", digests.of_value(stated))

    @property
    def payload(self) -> str:
        """Digest of what is measured against."""
        assert self.artifact is not None  # open, not being built
        return self.artifact.manifest.payload


def floor_key(count: int, plan: MixName) -> str:
    """The name of a floor in `floor.json`."""
    return f"{plan} {count}"


def make_extractor(name: str, device: torch.device | str, inception_weights: str | None) -> Extractor:
    """An extractor that is no classifier, by name."""
    if name == "inception":
        return extractors.inception(device, weights=inception_weights)
    return extractors.efficientnet_lite0(device)


def moments_path(folder: Path, label: str, name: str) -> Path:
    """Where the moments of a part in an extractor's space lie."""
    return folder / f"{label}-{name}-moments.safetensors"


def write_moments(path: Path, moments: Moments) -> None:
    """Writes moments as safetensors, float64."""
    held = {"mean": moments.mean, "covariance": moments.covariance, "count": torch.tensor(moments.count)}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in held.items()}))


def open_reference(path: Path) -> Reference:
    """Opens a reference artefact. Raises InputError in one line where it is none, not whole or of another schema."""
    artifact = artifacts.read(path, "reference")
    index = Index.from_json(artifact.file(INDEX).read_text(encoding="utf-8"), str(path / INDEX))
    return Reference(path, index, artifact)
