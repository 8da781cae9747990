"""Choose the sigma range of each of a teacher's samplers: the one whose samples lie nearest the validation part.

Runs that say `sigmas: tuned/<teacher>` then take it from here. The test part is never looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipestill import artifacts
from pipestill.config import OperationParams, TuneParams
from pipestill.progress import say
from pipestill.stages.common import add_common, add_deadline, entry, load_params
from pipestill.work import open_work, writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact

VERSION = 3
EXAMPLES = """\
  pipestill tune --name teacher --model artifacts/models/teacher --reference artifacts/reference \\
      --output artifacts/tuned/teacher
  pipestill tune --name teacher --model artifacts/models/teacher --reference artifacts/reference \\
      --output /tmp/tuned "tune.teacher.solvers=[{sampler: 2m, steps: 8}]"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, makes="tuned", name="which entry of `tune`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model artefact")
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="reference artefact")
    add_deadline(parser)


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    tune(
        entry(params.tune, options.name, "tune"),
        name=options.name,
        model=options.model,
        reference=options.reference,
        output=options.output,
        operation=params.operation,
    )


def tune(
    params: TuneParams, *, name: str, model: Path, reference: Path, output: Path, operation: OperationParams
) -> Artifact:
    """Measures every candidate range and publishes the best of each solver; returns the artefact.

    Raises InputError (model and reference do not fit), SurroundingsError (NaN, full disk) and Stopped.
    """
    sources = {"model": artifacts.read(model, "model"), "reference": artifacts.read(reference, "reference")}
    from pipestill import distributed

    with (
        distributed.world(device=operation.device, threads=params.threads, margin=operation.margin) as world,
        open_work(
            kind="tuned",
            stage="tune",
            version=VERSION,
            parameters=params.plain(),
            inputs={key: source.as_input for key, source in sources.items()},
            output=output,
        ) as work,
    ):
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done
        from pipestill.evaluation.reference import open_reference
        from pipestill.networks.model import load_model
        from pipestill.sampling.place import place
        from pipestill.sampling.plan import labels_in
        from pipestill.sampling.tuning import as_csv, candidates, choose, measure_all

        against = open_reference(reference)
        loaded = load_model(model)
        wanted = candidates(params, loaded.denoiser.sigma_min, loaded.denoiser.sigma_max)
        against.check_card(loaded.card.channels, loaded.card.resolution, loaded.card.classes)
        target, mix = against.in_mix("validation", params.extractor, params.plan)
        say(f"{name}: {len(wanted)} candidates of {params.images} images, by {params.extractor}")
        distances = measure_all(
            wanted,
            place(loaded.denoiser, world.device),
            loaded.card,
            params,
            features=against.extractor(params.extractor, world.device),
            target=target,
            labels=labels_in(mix, params.images),
            state=work.state / "candidates",
            world=world,
        )
        chosen = choose(distances, params.rho)
        staging = work.staging()
        with writing(staging):
            (staging / "tuned.json").write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            (staging / "tuned.csv").write_text(as_csv(distances), encoding="utf-8")
        artifact = work.publish(staging, {key: found["distance"] for key, found in chosen.items()})
        work.record(finished=True, candidates=len(wanted))
        return artifact
