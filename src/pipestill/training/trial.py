"""A few timed steps of each network that a project trains or samples, on made-up images: what an estimate starts from.

Nothing is written, and the weights that come of it are worth nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pipestill.artifacts import Artifact, Manifest
from pipestill.config import Params, StudentParams, TeacherParams
from pipestill.data.store import Dataset, Layout
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.estimating import Sizes, Speeds, threads_of
from pipestill.training.measuring import seconds_of

if TYPE_CHECKING:
    from pipestill.diffusion.denoiser import Denoiser
    from pipestill.networks.model import ModelCard

IMAGES = 256  # made-up images that a training sees
STEPS = 20  # timed steps at most, for one network and kind of step
EACH = 0.3  # seconds of timed steps, for one network and kind of step
BRIEFLY = 0.3  # the same, for what is no network that is trained or sampled
LARGE = 1.0  # seconds of a forward pass from which on larger batches and updates are not tried


class Trial:
    """Measures what is asked for until the budget is spent, then falls back on what was measured of that network."""

    def __init__(self, params: Params, classes: int, world: World, *, budget: float) -> None:
        self.params, self.world = params, world
        self._budget = budget
        self._until = math.inf
        self._data = _made_up(params, classes)
        self._teachers: dict[str, tuple[Any, Denoiser, ModelCard]] = {}
        self._forwards: dict[tuple[str, int], float] = {}

    def speeds(
        self, stages: Collection[tuple[str, str | None]], sizes: Sizes | None, start: float, decode: float
    ) -> Speeds:
        """The speeds that these stages need."""
        featured = [name for name, run in self.params.sampling.runs.items() if run.store == "features"]
        measuring = [(stage, entry) for stage, entry in stages if stage != "sample" or entry in featured]
        measured = self._threads(measuring, "reference", "tune", "distill", "sample", "evaluate")
        compared = self._threads(stages, "reference", "evaluate")
        # briefly what is always timed, beside the budget
        features = {threads: found for threads in measured if (found := self._features(threads)) is not None}
        classifier = self._classifier(sizes) if self._threads(stages, "reference") else 0.0
        metrics = {threads: self._metrics(sizes, threads) for threads in compared}
        self._until = time.process_time() + self._budget
        forward: dict[tuple[str, int], float] = {}
        update: dict[str, float] = {}
        for stage, entry in stages:
            model = self._evaluated(stage, entry or "")
            teacher = None if model is None else self._teacher_of(model)
            if model is not None and teacher is not None:
                threads = threads_of(self.params, stage, entry)
                forward[model, threads] = self._forward(teacher, threads)
        for stage, entry in stages:
            known = forward.get((entry or "", threads_of(self.params, stage, entry)))
            if known is not None and entry is not None and stage in ("train", "distill"):
                update[entry] = (self._teacher_update if stage == "train" else self._student_update)(entry, known)
        return Speeds(
            start=start,
            decode=decode,
            features=features,
            classifier=classifier,
            metrics=metrics,
            forward=forward,
            update=update,
        )

    def _threads(self, stages: Collection[tuple[str, str | None]], *kinds: str) -> list[int]:
        """The numbers of threads with which those of the stages compute that are of these kinds, each once."""
        found = [threads_of(self.params, stage, entry) for stage, entry in stages if stage in kinds]
        return list(dict.fromkeys(found))

    def _evaluated(self, stage: str, entry: str) -> str | None:
        """The model whose network a stage evaluates."""
        if stage == "sample":
            return self.params.sampling.runs[entry].model
        return entry if stage in ("train", "tune", "distill") else None

    def _teacher_of(self, model: str) -> str | None:
        """The teacher whose network a model has; None for one from outside."""
        while model in self.params.distillation.students:
            model = self.params.distillation.students[model].teacher
        return model if model in self.params.teachers and self._described(model) is not None else None

    def _described(self, name: str) -> TeacherParams | None:
        """A teacher with the network that it has, which may be stated by the one that it starts from."""
        teacher: TeacherParams | None = self.params.teachers[name]
        stated = teacher
        while stated is not None and stated.network is None:
            stated = self.params.teachers.get(str(stated.start).removeprefix("models/"))
        return None if teacher is None or stated is None else teacher.model_copy(update={"network": stated.network})

    def _built(self, name: str) -> tuple[Any, Denoiser, ModelCard]:
        if name not in self._teachers:
            from pipestill.stages.train import prepared

            teacher = self._described(name)
            assert teacher is not None
            own = teacher.model_copy(update={"start": "dataset"})
            self._teachers[name] = prepared(own, self._data, self.world, "host")
        return self._teachers[name]

    def _repeated(self, step: Callable[[int], object], threads: int) -> float | None:
        """Seconds of a step with so many threads, the first one left out; None if there is no time left for it."""
        return self._timed(step, threads) if time.process_time() <= self._until else None

    def _timed(self, step: Callable[[int], object], threads: int, each: float = EACH) -> float:
        """The same, timed at least once, and for about `each` seconds."""
        torch.set_num_threads(threads)
        self._seconds(lambda: step(0))
        taken = [self._seconds(lambda: step(1))]
        while sum(taken) < each and len(taken) < STEPS and time.process_time() + taken[0] < self._until:
            taken.append(self._seconds(lambda: step(1 + len(taken))))
        return min(taken)  # what else runs here only adds to it

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a piece of work: on a CPU those that it computes, so that what else runs here does not count."""
        if self.world.device.type != "cpu":
            return seconds_of(self.world, work)
        begun = time.process_time()
        work()
        return (time.process_time() - begun) / torch.get_num_threads()

    def _forward(self, name: str, threads: int) -> float:
        """Seconds of an image and evaluation of a teacher's network, measured once."""
        if (name, threads) not in self._forwards:
            self._forwards[name, threads] = self._measured_forward(name, threads)
        return self._forwards[name, threads]

    def _measured_forward(self, name: str, threads: int) -> float:
        """In as large batches as runs use, if there is time."""
        _, denoiser, card = self._built(name)
        found = 0.0
        for batch in (4, 64):
            x = torch.randn(batch, card.channels, card.resolution, card.resolution, device=self.world.device)
            sigma = torch.ones(batch, device=self.world.device)
            condition = card.condition(torch.zeros(batch, dtype=torch.int64, device=self.world.device))
            if found * batch > LARGE:
                break  # a large network: a small batch keeps it busy

            def step(_: int, x: Any = x, sigma: Any = sigma, condition: Any = condition) -> None:
                with torch.no_grad():
                    denoiser(x, sigma, condition)

            timed = self._repeated if found else self._timed
            found = (timed(step, threads) or found * batch) / batch
        return found

    def _teacher_update(self, name: str, forward: float) -> float:
        training, _, _ = self._built(name)
        params = self.params.teachers[name].training
        usual = 3 * forward * params.batch  # a backward pass takes two forward ones
        return usual if usual > 3 * LARGE else self._repeated(training.update, params.threads) or usual

    def _student_update(self, name: str, forward: float) -> float:
        student = self.params.distillation.students[name]
        turns = student.update_ratio * (1 + 3)  # the rollout's share of a state, and the fake score
        usual = forward * student.batch * (turns + 3 + 1 + (1 if student.dm.guidance == 1 else 2))
        if usual > 3 * LARGE:
            return usual
        training = self._distillation(student)
        return self._repeated(lambda step: training.update(step + student.gan.start), student.threads) or usual

    def _distillation(self, student: StudentParams) -> Any:
        from dataclasses import replace

        from pipestill.data.loader import Loader
        from pipestill.distillation.discriminator import FakeScore, build_head
        from pipestill.distillation.dmd2 import Distillation
        from pipestill.networks.model import NativeSchedule

        _, real, card = self._built(self._teacher_of(student.teacher) or student.teacher)
        native = NativeSchedule(
            student.steps, student.transition, student.sigma_max, student.sigma_min, student.rho, student.spacing
        )
        generator, score = (copy.deepcopy(real).requires_grad_(True) for _ in range(2))
        source = real if student.gan.features == "teacher" else score
        head = build_head(score).to(self.world.device) if student.gan.on else None
        loader = Loader(self._data, "train", batch=student.batch, seed=0, cache="host", device=self.world.device)
        return Distillation(
            student=generator,
            teacher=copy.deepcopy(real).requires_grad_(False),
            fake=FakeScore(score, head, source),
            card=replace(card, role="student", native=native, unconditional_branch=True),
            params=student,
            loader=loader,
            mix=np.ones(len(card.classes), dtype=np.int64),
            validation=None,  # type: ignore[arg-type]  # only updates are made
            world=self.world,
            train_images=IMAGES,
        )

    def _features(self, threads: int) -> float | None:
        """Seconds of an image in every space but the classifier's, which is small; None while weights are not here."""
        from pipestill.evaluation.reference import make_extractor

        protocol, batch, total = self.params.reference.protocol, 8, 0.0
        data = self.params.data
        images = torch.zeros(
            batch, 1 if data.color == "grey" else 3, data.resolution, data.resolution, dtype=torch.uint8
        )
        for name in protocol.extractors:
            if name != "classifier":
                try:
                    extractor = make_extractor(name, self.world.device, protocol.inception_weights)
                except InputError:
                    return None
                taken = self._timed(lambda _, run=extractor: run(images.to(self.world.device)), threads, BRIEFLY)  # type: ignore[misc]
                total += taken / batch
        return total

    def _classifier(self, sizes: Sizes | None) -> float:
        """Seconds of an update."""
        from pipestill.evaluation import classifier

        if "classifier" not in self.params.reference.protocol.extractors:
            return 0.0
        params = self.params.reference.classifier
        data = self.params.data
        count = min((sizes.train if sizes is not None else 0) or IMAGES, params.batch)
        images = torch.zeros(
            count, 1 if data.color == "grey" else 3, data.resolution, data.resolution, dtype=torch.uint8
        )
        labels = torch.zeros(count, dtype=torch.int64)
        steps = params.model_copy(update={"iterations": 3})
        classes = len(self._data.classes) or 1
        threads = self.params.reference.threads
        taken = self._timed(lambda _: classifier.train(steps, images, labels, classes), threads, BRIEFLY)
        return taken / steps.iterations

    def _metrics(self, sizes: Sizes | None, threads: int) -> float:
        """A set of metrics in the widest space: a Fréchet distance and what grows with the number of pairs."""
        from pipestill.evaluation.metrics import kid, precision_recall
        from pipestill.evaluation.moments import Moments, frechet_distance

        protocol = self.params.reference.protocol
        if not self.params.reference.floor.counts:
            return 0.0  # there are no runs
        generator = torch.Generator().manual_seed(0)
        test = 2000 if sizes is None else min(max(sizes.test, 2), 2000)
        table = torch.randn(min(max(self.params.reference.floor.counts), 2000), 1280, generator=generator)
        real = torch.randn(test, 1280, generator=generator)

        def step(number: int) -> None:
            own, other = (x if number else x[:, :64] for x in (table, real))  # the first one warms up
            frechet_distance(Moments.of(own), Moments.of(other))
            size = min(protocol.kid_subset_size, len(own), len(other))
            kid(own, other, subsets=protocol.kid_subsets, size=size, seed=0)
            precision_recall(own, other, neighbours=protocol.neighbours)

        return self._timed(step, threads, BRIEFLY)


class MadeUp(Dataset):
    """Noise in place of images, all of it in the train part, of evenly many images per class."""

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        shape = (len(np.asarray(indices)), self.resolution, self.resolution, self.channels)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _made_up(params: Params, classes: int) -> MadeUp:
    data = params.data
    numbers = np.arange(IMAGES)
    return MadeUp(
        artifact=Artifact(Path("made up"), Manifest("dataset", "trial", 0, {}, {}, {}, {})),
        layout=Layout(IMAGES, data.resolution, 1 if data.color == "grey" else 3, 1),
        classes=tuple(f"class-{number:05d}" for number in range(classes)),
        labels=numbers % classes if classes else np.full(IMAGES, -1),
        parts=np.zeros(IMAGES, dtype=np.uint8),
        pixel_std=0.5,
    )
