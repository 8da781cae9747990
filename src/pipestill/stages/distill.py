"""Distil a student from a teacher with DMD2: any number of steps, backward simulation, optional GAN and guidance.

The student's schedule (steps, transition, sigma range) is stored with it, so that sampling walks as training did.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipestill import artifacts
from pipestill.config import OperationParams, StudentParams
from pipestill.errors import InputError
from pipestill.fitting import require_fit
from pipestill.launch import Spread
from pipestill.progress import say
from pipestill.stages.common import (
    add_common,
    add_launch,
    entry,
    load_params,
    run_training,
    spread_of,
    summary_of,
    work_over_ranks,
)
from pipestill.work import writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact
    from pipestill.data.store import Dataset
    from pipestill.diffusion.denoiser import Denoiser
    from pipestill.distillation.dmd2 import Distillation
    from pipestill.distributed import World
    from pipestill.networks.model import ModelCard

VERSION = 6
EXAMPLES = """\
  pipestill distill --name student-4 --dataset artifacts/dataset --reference artifacts/reference \\
      --teacher artifacts/models/teacher --output artifacts/models/student-4
  pipestill distill --name student-4 --dataset artifacts/dataset --reference artifacts/reference \\
      --teacher artifacts/models/teacher --init artifacts/models/student-10 --output /tmp/student \\
      distillation.students.student-4.generator_lr=1e-5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, makes="model", name="which entry of `distillation.students`")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="dataset artefact")
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="reference artefact")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="the teacher's model artefact")
    parser.add_argument(
        "--init", type=Path, metavar="DIR", help="model whose weights start the student (default: the teacher)"
    )
    add_launch(parser)


def spread(options: argparse.Namespace) -> Spread:
    return spread_of(options, "distill")


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    distill(
        entry(params.distillation.students, options.name, "distillation.students"),
        name=options.name,
        dataset=options.dataset,
        reference=options.reference,
        teacher=options.teacher,
        init=options.init or options.teacher,
        output=options.output,
        operation=params.operation,
    )


def distill(
    student: StudentParams,
    *,
    name: str,
    dataset: Path,
    reference: Path,
    teacher: Path,
    init: Path,
    output: Path,
    operation: OperationParams,
) -> Artifact | None:
    """Distils the student that the parameters describe; returns its artefact on the leader.

    Raises InputError (models and data do not fit), SurroundingsError (NaN, full disk, lost rank) and Stopped.
    """
    inputs = {
        "dataset": artifacts.read(dataset, "dataset").as_input,
        "reference": artifacts.read(reference, "reference").as_input,
        "teacher": artifacts.read(teacher, "model").as_input,
        "init": artifacts.read(init, "model").as_input,
    }
    with work_over_ranks(
        kind="model",
        stage="distill",
        version=VERSION,
        parameters=student.plain(),
        inputs=inputs,
        output=output,
        threads=student.threads,
        operation=operation,
    ) as (world, work):
        if work.done is not None:
            return work.done

        from pipestill.networks.model import save_model
        from pipestill.networks.unet import parameter_count

        training, denoiser, card = prepared(
            student,
            dataset=dataset,
            reference=reference,
            teacher=teacher,
            init=init,
            world=world,
            cache=operation.cache,
        )
        if world.leader:
            say(f"{name}: {student.steps} steps, {parameter_count(denoiser.network):,} parameters, {world.size} ranks")
        curves = run_training(training, denoiser, card, work, world, operation, name=name)
        if not world.leader:
            return None
        staging = work.staging()
        save_model(staging, card, denoiser.network, training.best)
        with writing(staging):
            curves.write(staging / "curves.csv")
        best = {"best_step": training.best_step, "validation_distance": float(f"{training.best_distance:.6g}")}
        artifact = work.publish(staging, summary_of(training, parameters=parameter_count(denoiser.network), **best))
        work.record(finished=True, updates=student.iterations, ranks=world.size)
        return artifact


def prepared(
    student: StudentParams,
    *,
    dataset: Path,
    reference: Path,
    teacher: Path,
    init: Path,
    world: World,
    cache: Literal["device", "host", "none"],
) -> tuple[Distillation, Denoiser, ModelCard]:
    """The distillation on this rank's device, ready for its first update; the student's denoiser and its card.

    Raises InputError where models and data do not fit.
    """
    from pipestill import mixes
    from pipestill.data.loader import Loader
    from pipestill.data.store import open_dataset
    from pipestill.distillation.discriminator import FakeScore, build_head
    from pipestill.distillation.dmd2 import Distillation
    from pipestill.distillation.validation import Validation
    from pipestill.evaluation.reference import open_reference
    from pipestill.networks.model import NativeSchedule, load_model
    from pipestill.networks.unet import architecture
    from pipestill.training.ranks import autocast_type, prepare, seed_torch

    images = open_dataset(dataset)
    autocast = autocast_type(student.precision)
    real = load_model(teacher, device=world.device, autocast=autocast)
    start = load_model(init, device=world.device, autocast=autocast)
    check_fit(real.card, images, student, teacher)
    if architecture(start.unet) != architecture(real.unet):
        raise InputError(f"{init} has another network than {teacher}: a student starts from an equal one")
    if (start.card.denoiser, start.card.classes) != (real.card.denoiser, real.card.classes):
        raise InputError(f"{init} has other classes or another denoiser than {teacher}: it cannot start its student")

    native = NativeSchedule(
        student.steps, student.transition, student.sigma_max, student.sigma_min, student.rho, student.spacing
    )
    try:
        native.sigmas(real.denoiser)
    except ValueError as error:
        raise InputError(f"{teacher} cannot be walked so: {error}") from error
    card = replace(
        real.card,
        role="student",
        native=native,
        unconditional_branch=real.card.unconditional_branch and student.label_dropout > 0,
        empty=images.empty,
    )
    # the null class is trained only where labels are dropped, but every condition may name it
    training_card = replace(card, unconditional_branch=real.card.unconditional_branch)
    generator = start.denoiser.requires_grad_(True)
    score = copy.deepcopy(real.denoiser).requires_grad_(True)
    prepare(real.denoiser, student, world)
    prepare(generator, student, world)
    prepare(score, student, world)
    seed_torch(student.seed, 0, 0)  # the head's start
    source = real.denoiser if student.gan.features == "teacher" else score
    head = build_head(score).to(world.device) if student.gan.on else None
    fake = FakeScore(score, head, source)
    mix = mixes.of_plan(student.plan, images.train_counts)
    loader = None
    if student.gan.on:
        loader = Loader(
            images,
            "train",
            batch=student.batch,
            seed=student.seed,
            rank=world.rank,
            size=world.size,
            cache=cache,
            device=world.device,
            balanced=student.gan.real == "plan" and not mixes.agree(images.train_counts, mix),
        )
    validation = Validation(open_reference(reference), card, student.validation, student.plan, world)
    training = Distillation(
        student=generator,
        teacher=real.denoiser,
        fake=fake,
        card=training_card,
        params=student,
        loader=loader,
        validation=validation,
        world=world,
        train_images=len(images.split["train"]),
        mix=mix,
    )
    return training, generator, card


def check_fit(card: ModelCard, data: Dataset, student: StudentParams, teacher: Path) -> None:
    """Raises InputError, in one line, where the teacher and the data, or the wish for guidance, do not fit."""
    require_fit(teacher, card, data.artifact.path, data, "train the teacher on this dataset")
    if not card.classes and student.dm.guidance != 1:
        raise InputError(f"{teacher} has no classes, so there is nothing to guide towards: set dm.guidance=1")
    if not card.unconditional_branch and card.classes and (student.label_dropout > 0 or student.dm.guidance != 1):
        raise InputError(
            f"{teacher} has no unconditional branch: it cannot teach 'no class'; set label_dropout=0 and "
            "dm.guidance=1, or train a teacher with label_dropout"
        )
