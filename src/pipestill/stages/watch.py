"""Evaluate a training's saved states as they appear, each once, into one table; the best one is kept as a model.

It reads the training's folder and never writes there: a state is pinned by a hard link before it is read, so that the
training may drop it meanwhile. What was dropped earlier is named as pruned. It may touch the output folder alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import artifacts, digests, outputs
from pipestill.artifacts import Manifest
from pipestill.config import OperationParams, RunParams
from pipestill.errors import InputError, Stopped, SurroundingsError, nearest
from pipestill.progress import say, warn
from pipestill.work import locked, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pipestill.distributed import World
    from pipestill.evaluation.reference import Reference
    from pipestill.sampling.plan import Block
    from pipestill.sampling.recipe import Recipe
    from pipestill.training.following import Description

VERSION = 2
TABLE, SETTINGS, BEST, PENDING = "checkpoints.csv", outputs.WATCH.file, "best", "pending"
PUBLISHED = "published"  # the training's model, once that is there
EVALUATED, PRUNED, UNREADABLE, NOT_FINITE = "evaluated", "pruned", "unreadable", "not finite"
POLL = 1.0  # seconds between looks


def watch(
    run: RunParams,
    *,
    name: str,
    training: Path,
    reference: Path,
    output: Path,
    operation: OperationParams,
    by: str | None = None,
    dataset: Path | None = None,
) -> None:
    """Samples and measures the averages in every state of a training as a run says, until its model is published.

    `training` is where that model goes, or the training's folder below `$PIPESTILL_RUNS`. Raises InputError (training,
    run and reference do not fit, or the table is another's), SurroundingsError, and Stopped (what is done is kept).
    """
    from pipestill import distributed
    from pipestill.evaluation.reference import open_reference
    from pipestill.sampling.recipe import settle
    from pipestill.stages.sample import labels_of
    from pipestill.training import following

    folder = following.find(training)
    told = following.read(folder)
    if told.name != run.model:
        raise InputError(
            f"run {name} samples {run.model}, but {training} trains {told.name}: name a run of {told.name}"
        )
    if run.weights != "ema" or run.sigmas.startswith("tuned/"):
        raise InputError(
            f"run {name}: states are watched by their averages and in their own sigma range: "
            "name one with weights=ema and without tuned sigmas"
        )
    recipe, against = settle(run, told.card), open_reference(reference)
    if outputs.within(output, folder):
        raise InputError(f"{output} lies in the training's own folder, which a watch leaves alone: name another one")
    labels = labels_of(run, told.card, dataset)
    against.check_card(told.card.channels, told.card.resolution, told.card.classes)
    against.check_count(run.images)
    figure = _figure(by, against, run.plan)
    settings = {
        "version": VERSION,
        "training": told.key,
        "reference": against.payload,
        "by": figure,
        "run": run.plain(),
        "labels": digests.of_bytes(labels.tobytes()),
    }
    with (
        distributed.world(device=operation.device, threads=run.threads, timeout=operation.timeout) as world,
        locked(output.with_name(f".{output.name}.lock"), output) if world.leader else nullcontext(),
    ):
        table = Table(folder, told, output, settings) if world.leader else None
        waiting, done = False, 0
        while (task := world.broadcast(table.next() if table else "")) != "end":
            if world.agree(world.stop.requested())[0]:
                raise Stopped("stopped, what is done is kept: start it again to go on")
            if task == "wait":
                if table and not waiting:
                    say(f"waiting for states of {told.name}: {table.standing}")
                waiting = True
                time.sleep(POLL)
                continue
            waiting = False
            weights = _weights(task, output, told)
            if len(set(world.gather(weights is None))) > 1:
                raise SurroundingsError(
                    f"some ranks can read {task} and some cannot: is {output} on a shared file system? Start it again"
                )
            figures: dict[str, float] | None = {}
            if weights is not None:
                figures = _measured(weights, told, recipe, run, labels, against, output / PENDING / task, world)
            if table:
                table.add(task, figures, weights)
            done += 1
            world.await_leader(f"watch/{done}")  # it measures alone
        if table:
            say(f"{told.name} is published; {table.standing}")


def _figure(by: str | None, against: Reference, plan: str) -> str:
    """The figure that the best state is chosen by; unless named, the distance in the space that the field knows.

    Raises InputError for one that there is not, or not for runs of this plan.
    """
    from pipestill.evaluation.matching import match

    spaces = against.protocol.extractors
    known = [f"{measure}_{space}" for measure in ("fd", "kid") for space in spaces]
    if by is None:
        return "fd_" + next((space for space in ("inception", "efficientnet_lite0") if space in spaces), spaces[0])
    if by not in known:
        raise InputError(f"--by {by}: there is no such figure{nearest(by, known)}")
    if by.startswith("kid_"):
        reason = next((note for note in match(against, plan).notes if note.startswith("no KID")), None)
        if reason is not None:
            raise InputError(f"--by {by}: there is {reason}; choose a distance, fd_…")
    return by


def _weights(task: str, output: Path, told: Description) -> dict[str, Tensor] | None:
    """The averaged weights of a pinned state or of the published model; None where they cannot be read."""
    from pipestill.networks.model import load_model
    from pipestill.training.state import load_average

    try:
        if task == PUBLISHED:
            published: dict[str, Tensor] = load_model(told.output).unet.state_dict()
            return published
        return load_average(output / PENDING / f"{task}.pt", key=told.key)
    except InputError as error:
        warn(f"{task}: {error}")
        return None


def _measured(
    weights: dict[str, Tensor],
    told: Description,
    recipe: Recipe,
    run: RunParams,
    labels: NDArray[np.int64],
    against: Reference,
    folder: Path,
    world: World,
) -> dict[str, float] | None:
    """Figures of a network with these weights, means over the run's seeds, on the leader; finished blocks are kept.

    None where a sample is not finite: a note says so beside the blocks, so that a restart knows it too.
    """
    import numpy as np
    import torch

    from pipestill.config import denoiser_params
    from pipestill.evaluation import measure
    from pipestill.evaluation.matching import match
    from pipestill.networks.model import wrap
    from pipestill.sampling.features import by_space, in_spaces
    from pipestill.sampling.place import place
    from pipestill.sampling.plan import blocks
    from pipestill.sampling.runner import read_blocks, run_blocks
    from pipestill.training.ranks import autocast_type

    unet = told.build()
    unet.load_state_dict(weights)
    wrapped = wrap(unet, denoiser_params(told.card.denoiser), autocast_type(run.precision))
    denoiser = place(wrapped.requires_grad_(False).eval(), world.device)
    extractors = [against.extractor(space, world.device) for space in against.index.spaces]
    parts = blocks(run.seeds, run.images, run.micro_batch)
    diverged = folder / "not-finite"

    def compute(block: Block, items: Tensor, classes: Tensor) -> Tensor:
        x0 = recipe.sample(denoiser, seed=block.seed, items=items, labels=classes, device=world.device)
        if torch.isfinite(x0).all():
            return x0
        write_atomic(diverged, "")
        return torch.zeros_like(x0)

    run_blocks(
        compute,
        parts,
        labels,
        micro_batch=run.micro_batch,
        folder=folder,
        world=world,
        name=f"watch/{folder.name}",
        product=in_spaces(extractors),
    )
    if diverged.exists():
        return None
    if not world.leader:
        return {}
    size = sum(extractor.dimension for extractor in extractors)
    rows = np.concatenate(list(read_blocks(folder, parts, (size,))))
    shown = torch.from_numpy(np.tile(labels, len(run.seeds)))
    matched = match(against, run.plan)
    found = measure.by_seed(against, by_space(rows, extractors), shown, run.seeds, matched, world.device)
    return measure.summarise(list(found.values()))[0]


class Table:
    """The leader's books: which states there were, what became of each, and what is to be done next."""

    def __init__(self, folder: Path, told: Description, output: Path, settings: Mapping[str, Any]) -> None:
        """Goes on with the table in `output`, if there is one. Raises InputError where it is another's."""
        self._folder, self._told, self._output, self._figure = folder, told, output, str(settings["by"])
        self._rows: dict[str, dict[str, Any]] = {}
        wanted = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        outputs.WATCH.check(output)
        if (output / SETTINGS).exists() and (output / SETTINGS).read_text(encoding="utf-8") != wanted:
            raise InputError(f"{output} is of another training, run, reference or --by: name another folder")
        write_atomic(output / SETTINGS, wanted)
        if (output / TABLE).exists():
            with (output / TABLE).open(newline="", encoding="utf-8") as file:
                self._rows = {row["checkpoint"]: row for row in csv.DictReader(file)}
        (output / PENDING).mkdir(exist_ok=True)
        for partial in (output / PENDING).glob("*.partial"):
            partial.unlink()
        for name in self._rows:
            self._forget(name)

    def next(self) -> str:
        """`wait`, `end`, or what to evaluate now: a pinned state by its name, the oldest first, or `published`."""
        from pipestill.training import following, state

        finished = self._published()  # looked at before the states, which go when the model comes
        noted = [f"state-{step:09d}" for step in following.noted(self._folder)]
        there = [path for path in state.saved(self._folder / "state") if path.stem not in self._rows]
        pinned = [path.stem for path in (self._output / PENDING).glob("state-*.pt")]
        for path in there:  # one is held at a time: a slow watch must not fill the disk with states
            if not pinned and self._pin(path):
                pinned = [path.stem]
        known = {*self._rows, *pinned, *(path.stem for path in there if path.exists())}
        gone = [name for name in noted if name not in known]
        if gone:
            self._rows |= {name: self._row(name, PRUNED) for name in gone}
            self._write()
            warn(f"{len(gone)} states were pruned before they could be evaluated: {', '.join(gone)}")
        if pinned:
            return pinned[0]
        if not finished:
            return "wait"
        return "end" if PUBLISHED in self._rows else PUBLISHED

    def add(
        self,
        name: str,
        figures: Mapping[str, float] | None,
        weights: dict[str, Tensor] | None,
    ) -> None:
        """Writes down what became of a state; weights of the best one so far are published as `best`.

        `weights` are None where they could not be read, `figures` where a sample was not finite.
        """
        status = UNREADABLE if weights is None else EVALUATED if figures else NOT_FINITE
        if figures and weights is not None and math.isfinite(figures[self._figure]):
            best = self._best()
            if best is None or figures[self._figure] < float(best[self._figure]):
                self._keep(name, weights, figures)
        self._rows[name] = self._row(name, status) | dict(figures or {})
        self._write()
        self._forget(name)
        found = f"{self._figure} {figures[self._figure]:.4g}; {self.standing}" if figures else status
        say(f"{name}: {found}")

    @property
    def standing(self) -> str:
        """The best so far, in words."""
        best, counts = self._best(), [row["status"] for row in self._rows.values()]
        told = f"{counts.count(EVALUATED)} evaluated, {counts.count(PRUNED)} pruned"
        return told if best is None else f"{told}, best {best['checkpoint']} with {float(best[self._figure]):.4g}"

    def _best(self) -> dict[str, Any] | None:
        evaluated = [row for row in self._rows.values() if row["status"] == EVALUATED]
        found = [row for row in evaluated if math.isfinite(float(row[self._figure]))]
        return min(found, key=lambda row: float(row[self._figure]), default=None)

    def _published(self) -> bool:
        try:
            return artifacts.read(self._told.output, "model").manifest.key == self._told.key
        except InputError:
            return False

    def _pin(self, path: Path) -> bool:
        """Takes hold of a state; False where it went meanwhile."""
        pin = self._output / PENDING / path.name
        try:
            os.link(path, pin)
        except FileNotFoundError:
            return False
        except OSError:  # another file system, or one without links
            partial = pin.with_suffix(".partial")
            try:
                shutil.copyfile(path, partial)
            except FileNotFoundError:
                return False
            os.replace(partial, pin)
        return True

    def _forget(self, name: str) -> None:
        (self._output / PENDING / f"{name}.pt").unlink(missing_ok=True)
        shutil.rmtree(self._output / PENDING / name, ignore_errors=True)

    def _row(self, name: str, status: str) -> dict[str, Any]:
        if name == PUBLISHED:
            summary = artifacts.read(self._told.output, "model").manifest.summary
            step = summary.get("best_step", self._told.updates)  # a student's weights are its best ones
        else:
            step = int(name.removeprefix("state-"))
        return {"step": step, "checkpoint": name, "status": status}

    def _write(self) -> None:
        rows = sorted(self._rows.values(), key=lambda row: (int(row["step"]), row["checkpoint"]))
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._output / TABLE, text.getvalue())

    def _keep(self, name: str, weights: dict[str, Tensor], figures: Mapping[str, float]) -> None:
        """Publishes weights as the model `best`; the manifest says which state of which training they are."""
        from pipestill.networks.model import save_model

        staging = self._output / f".{BEST}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_model(staging, self._told.card, self._told.build(), {"ema": weights})
        manifest = Manifest(
            kind="model",
            stage="evaluate",
            version=VERSION,
            parameters={self._told.stage: self._told.parameters, "checkpoint": name, "by": self._figure},
            inputs=self._told.inputs,
            files=artifacts.describe_files(staging),
            summary={"step": self._row(name, EVALUATED)["step"], self._figure: figures[self._figure]},
        )
        artifacts.publish(staging, self._output / BEST, manifest)
