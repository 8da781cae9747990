"""Pictures during a training: the same items each time, shared over the ranks, in a bounded share of its time.

No collective's time limit runs while ranks sample, an item that fails takes nothing else with it, and weights, mode and
random state are afterwards what they were. It may touch the training's folder of previews alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipestill import counter
from pipestill.classes import numbers
from pipestill.config import PreviewParams
from pipestill.diffusion.denoiser import Denoiser
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.diffusion.schedules import karras
from pipestill.distributed import World
from pipestill.networks.model import ModelCard
from pipestill.progress import warn
from pipestill.sampling.background import PictureWriter
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.pictures import grid, pick_classes
from pipestill.training.ema import Ema
from pipestill.training.ranks import averaged
from pipestill.training.tracking import Tracker

HEUN_STEPS = 18  # of a teacher, which has no schedule of its own
FINITE_START = 80.0  # where Heun starts for a teacher that begins with pure noise
BATCH = 16  # items that a rank samples together
PREVIEWS = 40  # in a training, where nothing else is asked for
TIMED = 3  # evaluations of the network that estimate a first preview
GRID_SIDE = 256  # a picture is made smaller than this, by a whole factor, for the grid

Picture = NDArray[np.uint8]  # [H, W, 1 or 3]


class Previews:
    """Samples `each` pictures of each class from the averaged weights; every rank does a contiguous share of the items.

    Their time is bounded by `params.share`: a preview starts once all so far and the longest of them again (the first
    is estimated) fit into that share of the time since this object was made. Written below `folder`:
    `step-00000200/epoch_0010_rank_0_sample_00.png` for each item, and the leader's grid `step-00000200.png`, which also
    goes to the trackers. Raises InputError where a class is unknown.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        card: ModelCard,
        ema: Ema,
        params: PreviewParams,
        *,
        folder: Path,
        tracker: Tracker,
        world: World,
        updates: int = PREVIEWS,
    ) -> None:
        """`updates` is the length of the training."""
        self._denoiser, self._card, self._ema, self._params = denoiser, card, ema, params
        self._folder, self._tracker, self._world = folder, tracker, world
        self._shape = (card.channels, card.resolution, card.resolution)
        rows = _rows(card, params)
        self._labels = torch.tensor(rows or [0] * params.rows).repeat_interleave(params.each)
        count, rank, size = len(self._labels), world.rank, world.size
        self._own = range(rank * count // size, (rank + 1) * count // size)
        self._writer = PictureWriter(params.patience, sweep=folder if world.leader else None)
        self._updates = updates
        self._wanted = False
        self._began = time.monotonic()
        self._spent = 0.0  # seconds
        self._estimated = 0.0  # seconds of a first one
        self._longest = 0.0  # seconds of those made

    @property
    def count(self) -> int:
        """Pictures in a preview, over all ranks."""
        return len(self._labels)

    @property
    def unlimited(self) -> bool:
        return self._params.share == 1

    @property
    def seconds(self) -> float:
        """What previews have cost so far: time on this rank, and the processor time of the thread that writes."""
        return self._spent + self._writer.seconds

    def wanted(self, step: int, epoch: int, epoch_before: int) -> bool:
        """Whether pictures are wanted after update `step`, in `epoch`; one update earlier it was `epoch_before`.

        Once wanted they stay so until they are made. Called after every update, the same answer on every rank.
        """
        every = self._params.every
        if every and self._params.unit == "epochs":
            due = epoch // every > epoch_before // every
        else:
            due = step % (every or math.ceil(self._updates / PREVIEWS)) == 0 or (not every and step == self._updates)
        self._wanted |= due
        return self._wanted

    def estimate(self) -> None:
        """Estimates what a first preview will take. Called once, on the rank that is asked what is affordable."""
        if not self.unlimited:
            self._estimated = self._estimate()

    def affordable(self) -> bool:
        """Whether another preview stays within the share of the time so far. Asked on one rank, for all."""
        if self.unlimited:
            return True
        expected = self._longest or self._estimated
        return self.seconds + expected <= self._params.share * (time.monotonic() - self._began)

    def make(self, step: int, epoch: int) -> None:
        """Makes the pictures of one moment; every rank calls it there."""
        self._wanted = False
        before, began = self.seconds, time.monotonic()
        try:
            self._make(step, epoch)
        finally:
            self._spent += time.monotonic() - began
            self._longest = max(self._longest, self.seconds - before)
        self._tracker.log(step, {"preview_seconds": self.seconds})

    def _make(self, step: int, epoch: int) -> None:
        what = f"preview after update {step}"
        own = self._sampled(what)
        folder = self._folder / f"step-{step:08d}"
        first = self._own.start
        names = {item: f"epoch_{epoch:04d}_rank_{self._world.rank}_sample_{item - first:02d}.png" for item in own}
        self._writer.put(what, {folder / names[item]: picture for item, picture in own.items()})
        self._world.await_all(f"{folder.name}/{epoch}")  # ranks come at their own times, and no collective waits
        parts = self._world.collect({item: _small(picture) for item, picture in own.items()})
        if parts is None:
            return
        pictures = {item: picture for part in parts for item, picture in part.items()}
        if not pictures:
            return
        blank = np.full_like(next(iter(pictures.values())), 255)
        cells = np.stack([pictures.get(item, blank) for item in range(len(self._labels))])
        whole = grid(cells, columns=self._params.each)
        self._writer.put(what, {self._folder / f"{folder.name}.png": whole})
        self._tracker.image(step, "samples", whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for pictures that are being written, `params.patience` seconds at most, and not after an error."""
        self._writer.close(self._params.patience if kind is None else 0.0)

    def _estimate(self) -> float:
        """Seconds of a first preview: one evaluation of the network, timed, as often as the sampler makes them.

        The least of a few, since the first is slower than those that follow.
        """
        began = time.monotonic()
        items = list(range(min(BATCH, self.count)))
        evaluations = self._card.native.steps if self._card.native else 2 * HEUN_STEPS - 1
        share = max(math.ceil(self.count / self._world.size), 1)
        try:
            with self._aside(), torch.no_grad():
                latents = counter.normal(self._params.seed, "preview/estimate", torch.tensor(items), self._shape)
                sigma = torch.ones(len(items), device=self._world.device)
                condition = self._card.condition(self._labels[items].to(self._world.device))
                x = latents.to(self._world.device)
                seconds = math.inf
                for _ in range(TIMED):
                    timed = time.monotonic()
                    self._denoiser(x, sigma, condition).cpu()
                    seconds = min(seconds, time.monotonic() - timed)
        except Exception as error:
            warn(f"previews cannot be estimated ({_words(error)}): the training goes on without them")
            return math.inf
        finally:
            self._spent += time.monotonic() - began
        return seconds * evaluations * math.ceil(share / BATCH)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The network in eval mode with the averaged weights, uncompiled; the training's random state is kept."""
        devices = [self._world.device] if self._world.device.type == "cuda" else []
        with (
            averaged(self._denoiser.network, self._ema),
            torch.random.fork_rng(devices),
            _uncompiled(self._denoiser.network),
        ):
            yield

    def _sampled(self, what: str) -> dict[int, Picture]:
        """This rank's items, by number; those that fail are named and left out."""
        found: dict[int, Picture] = {}
        try:
            with self._aside():
                for first in range(self._own.start, self._own.stop, BATCH):
                    found |= self._made(list(range(first, min(first + BATCH, self._own.stop))), what)
        except Exception as error:  # no room for the averaged weights
            warn(f"{what} failed ({_words(error)}): the training goes on")
        return found

    def _made(self, items: list[int], what: str) -> dict[int, Picture]:
        """Some items together, or one by one where that fails, with the memory that the failure held let go."""
        try:
            return self._pictures(items)
        except Exception as error:
            reason = _words(error)
        if len(items) == 1:
            warn(f"{what}: item {items[0]} failed ({reason}): the others go on")
            return {}
        return {item: picture for one in items for item, picture in self._made([one], what).items()}

    @torch.no_grad()
    def _pictures(self, items: list[int]) -> dict[int, Picture]:
        card, device = self._card, self._world.device
        x0 = sample_items(
            self._denoiser,
            sampler=SAMPLERS[card.native.transition if card.native else "heun"],
            sigmas=card.native.sigmas(self._denoiser) if card.native else _teachers_sigmas(self._denoiser),
            condition=card.condition(self._labels[items].to(device)),
            seed=self._params.seed,
            items=torch.tensor(items),
            shape=self._shape,
            device=device,
        )
        if not bool(torch.isfinite(x0).all()):
            raise ArithmeticError("a pixel is not finite")
        pixels = to_uint8(x0).permute(0, 2, 3, 1).cpu().numpy()
        return dict(zip(items, pixels, strict=True))


def _uncompiled(network: nn.Module) -> AbstractContextManager[object]:
    """Runs a compiled network uncompiled: another batch size would compile it again. Does not import the compiler."""
    if network._compiled_call_impl is None:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _rows(card: ModelCard, params: PreviewParams) -> list[int]:
    """The classes of the grid's rows; none where the model has none. Raises InputError."""
    if params.classes:
        return numbers(params.classes, card.classes, "operation.preview.classes")
    return pick_classes(card.filled, params.rows)


def _teachers_sigmas(denoiser: Denoiser) -> Tensor:
    return karras(HEUN_STEPS, denoiser.sigma_min, min(denoiser.sigma_max, FINITE_START))


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _small(picture: Picture) -> Picture:
    factor = -(-picture.shape[0] // GRID_SIDE)
    return picture[::factor, ::factor]
