"""The small classifier that judges class-conditional samples: trained on the train part alone, the same bits each time.

Its weights, its order of images and its start are functions of a seed; it touches nothing but tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill import counter
from pipestill.config import ClassifierParams
from pipestill.evaluation.extractors import CPU_BATCH, Extractor

SIDE = 32  # pixels: larger images are averaged down to this side
POOLED = 2  # side of the last feature map


class Classifier(nn.Module):
    """Two 3x3 convolutions a level, halving between levels, then `features` numbers, then one logit a class."""

    def __init__(self, params: ClassifierParams, channels: int, classes: int) -> None:
        super().__init__()
        sizes = (channels, *params.channels)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU()
            )
            for before, after in itertools.pairwise(sizes)
        )
        self.penultimate = nn.Linear(sizes[-1] * POOLED * POOLED, params.features)
        self.last = nn.Linear(params.features, classes)
        self._start(params.seed)
        self.to(memory_format=torch.channels_last)

    def _start(self, seed: int) -> None:
        """He's normal weights (He et al. 2015), zero biases, drawn by the counter."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                    continue
                gain = 1.0 if name.startswith("last") else 2.0
                noise = counter.normal(seed, "classifier start", torch.tensor([index]), parameter.shape)[0]
                parameter.copy_(noise * math.sqrt(gain / parameter[0].numel()))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, float32 [n, features], of uint8 [n, C, H, W]."""
        x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        if max(x.shape[-2:]) > SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="area")
        for index, level in enumerate(self.levels):
            if index and min(x.shape[-2:]) > POOLED:
                x = F.max_pool2d(x, 2)
            x = level(x)
        return F.silu(self.penultimate(F.adaptive_avg_pool2d(x, POOLED).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [n, classes], of uint8 [n, C, H, W]."""
        return self.last(self.features(images))  # type: ignore[no-any-return]


class Images(Protocol):
    """Images by position: a uint8 tensor [n, C, H, W], or what reads like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor) -> Tensor: ...


@dataclass
class ClassifierTraining:
    """The classifier's training: updates one by one, with a state to go on from.

    On the CPU wherever the stage runs: it is small, and the same bits are worth more than seconds, since every figure
    of the pipeline hangs on it.
    AdamW with a cosine schedule; each batch is a slice of a permutation that is a function of (seed, epoch).
    """

    params: ClassifierParams
    images: Images  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]
    classes: int
    done: int = 0  # updates

    def __post_init__(self) -> None:
        channels = self.images[torch.tensor([0])].shape[1]
        self.network = Classifier(self.params, channels, self.classes)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.params.learning_rate, weight_decay=0.01, foreach=True
        )

    def updates(self) -> Iterator[None]:
        """Makes the updates that are left; yields after each."""
        params = self.params
        count, batch = len(self.images), min(params.batch, len(self.images))
        per_epoch = count // batch
        ordered, order = -1, torch.arange(0)
        while self.done < params.iterations:
            epoch, place = divmod(self.done, per_epoch)
            if epoch != ordered:
                keys = counter.words(params.seed, "classifier order", torch.arange(count), 1, draw=epoch)[:, 0]
                ordered, order = epoch, torch.argsort(keys, stable=True)
            chosen = order[place * batch : (place + 1) * batch]
            for group in self.optimizer.param_groups:
                group["lr"] = params.learning_rate * (1 + math.cos(math.pi * self.done / params.iterations)) / 2
            loss = F.cross_entropy(self.network(self.images[chosen]), self.labels[chosen])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.done += 1
            yield

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(params: ClassifierParams, images: Images, labels: Tensor, classes: int) -> Classifier:
    """A classifier trained on uint8 images [n, C, H, W] and int64 labels [n], in eval mode."""
    training = ClassifierTraining(params, images, labels, classes)
    for _ in training.updates():
        pass
    return training.network.requires_grad_(False).eval()


def logits(network: Classifier, images: Tensor) -> Tensor:
    """Logits [n, classes] on the network's device, in blocks."""
    device = next(network.parameters()).device
    block = CPU_BATCH if device.type == "cpu" else 1024
    with torch.inference_mode():
        parts = [network(images[first : first + block].to(device)) for first in range(0, len(images), block)]
    return torch.cat(parts) if parts else torch.empty(0, network.last.out_features, device=device)


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier puts into their class."""
    return float((logits(network, images).argmax(1).cpu() == labels.cpu()).double().mean())


def extractor(network: Classifier, device: torch.device | str = "cpu") -> Extractor:
    """The classifier's penultimate features as an extractor."""
    device = torch.device(device)
    network = network.to(device)
    dimension = network.penultimate.out_features
    return Extractor(
        name="classifier",
        dimension=dimension,
        device=device,
        protocol=f"penultimate features, {dimension}-d, of a small classifier trained on the train part alone",
        forward=network.features,
        batch=CPU_BATCH if device.type == "cpu" else 1024,
    )
