"""Export a model: a folder that plain Diffusers loads, with a model card.

The card has an example with the settings of the metrics, pictures, the recipe, provenance and licences. The licence
has to be stated; those of outside files that the model comes from (a fetched teacher) are added to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import artifacts, outputs, tracing
from pipestill.errors import InputError
from pipestill.outputs import Written
from pipestill.progress import say
from pipestill.standing import figures_of
from pipestill.tracing import Link

if TYPE_CHECKING:
    from pipestill.networks.model import ModelCard
    from pipestill.reporting.example import Example

EXAMPLES = """\
  pipestill export --model artifacts/models/student-4 --output student-4 --licence Apache-2.0 \\
      --metrics metrics/student-4.json --samples artifacts/samples/student-4
  pipestill export --model artifacts/models/student-10 --output student-10 --licence CC-BY-NC-SA-4.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model artefact")
    parser.add_argument(
        "--output",
        type=Written(outputs.EXPORT),
        required=True,
        metavar="DIR",
        help="the folder to write; an earlier export there is replaced",
    )
    parser.add_argument(
        "--licence", required=True, metavar="NAME", help="the model's licence, best an SPDX identifier (Apache-2.0)"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights (default: ema)")
    parser.add_argument(
        "--metrics",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="metrics/RUN.json to show; the card's example has the settings of the first one",
    )
    parser.add_argument("--samples", type=Path, nargs="*", default=[], metavar="DIR", help="samples whose grid to show")


def main(options: argparse.Namespace) -> None:
    export(
        options.model,
        options.output,
        licence=options.licence,
        weights=options.weights,
        metrics=options.metrics,
        samples=options.samples,
    )


def export(
    model: Path, output: Path, *, licence: str, weights: str = "ema", metrics: list[Path], samples: list[Path]
) -> Path:
    """Writes the folder whole or not at all; returns it.

    Raises InputError: no licence, a file of the chain that states none, metrics or pictures of another model, an output
    that is there and is no earlier export.
    """
    from pipestill.networks.model import SUBFOLDERS, read_card
    from pipestill.reporting import example, licences
    from pipestill.reporting.card import imposed_licences, model_card
    from pipestill.sampling import standalone

    if not licence.strip() or not licence.isprintable():
        raise InputError("--licence is empty or not one line: a model is not handed over without one")
    for paths in (metrics, samples):
        if len({path.stem for path in paths}) < len(paths):
            raise InputError(f"two of {', '.join(map(str, paths))} have the same name: show one of them")
    outputs.EXPORT.check(output)
    artifact, card = read_card(model)
    artifacts.verify(artifact)
    root = _root(model)
    chain = tracing.trace(model, root)
    payload = artifact.manifest.payload
    for path in metrics:
        _require_metrics(path)
    for path in samples:
        artifacts.read(path, "samples")
    sampled = {path: _samples_link(path, root, payload, weights) for path in [*metrics, *samples]}
    shown = {path.stem: _all_metrics(path, root) for path in metrics}
    network = json.loads(artifact.file(f"{SUBFOLDERS[weights]}/config.json").read_text(encoding="utf-8"))
    own_network = network["_class_name"] != "UNet2DModel"
    terms = licences.terms(licence.strip(), imposed_licences(chain))
    text = model_card(
        output.name,
        card,
        chain,
        licence=licence.strip(),
        terms=terms,
        metrics=shown,
        pictures=[(f"pictures/{path.name}.png", path.name) for path in samples],
        example=_example(next(iter(sampled.values())), card) if sampled else example.unmeasured(card.filled),
        own_network=own_network,
    )
    with outputs.new_folder(output, outputs.EXPORT) as staging:
        shutil.copyfile(artifact.file("model.json"), staging / "model.json")
        shutil.copytree(artifact.path / SUBFOLDERS[weights], staging / "unet")
        body = json.loads(artifact.file("model_index.json").read_text(encoding="utf-8"))
        body["_class_name"] = [standalone.PIPELINE, "PixelPipeline"]
        if own_network:
            body["unet"] = [standalone.NETWORK, network["_class_name"]]
            (staging / "unet" / f"{standalone.NETWORK}.py").write_text(standalone.network_source(), encoding="utf-8")
        _write_json(staging / "model_index.json", body)
        (staging / f"{standalone.PIPELINE}.py").write_text(standalone.pipeline_source(), encoding="utf-8")
        (staging / "README.md").write_text(text, encoding="utf-8")
        if terms.text:
            (staging / terms.file).write_text(terms.text, encoding="utf-8")
        if metrics:
            _write_json(staging / "metrics.json", shown)
        for path in samples:
            (staging / "pictures").mkdir(exist_ok=True)
            shutil.copyfile(artifacts.read(path, "samples").file("grid.png"), staging / f"pictures/{path.name}.png")
    say(f"{output}: {card.role} {artifact.path.name}, {licence.strip()}")
    return output


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _root(model: Path) -> Path:
    """The project that a model lies in: where its artefacts are; the working folder where it lies in none."""
    return next((folder for folder in model.absolute().parents if (folder / "artifacts").is_dir()), Path.cwd())


def _require_metrics(path: Path) -> None:
    """Raises InputError unless a file of a run's metrics, or its evaluation, is there."""
    if path.is_dir():
        artifacts.read(path, "evaluation")
    elif not outputs.METRICS.recognises(path):
        raise InputError(f"--metrics {path} is no file of a run's metrics: name metrics/RUN.json")


def _all_metrics(path: Path, root: Path) -> dict[str, Any]:
    """All metrics of the evaluation that a metrics file is the short form of."""
    evaluation = tracing.trace(path, root).artifact
    assert evaluation is not None  # a chain begins with an artefact that is here
    return figures_of(evaluation)[0]


def _samples_link(path: Path, root: Path, payload: str, weights: str) -> Link:
    """The samples that a path is, or whose metrics it holds, if they are of this model and these weights.

    Raises InputError.
    """
    links = list(tracing.trace(path, root).walk())
    found = next((link for link in links if link.artifact and link.entry.kind == "samples"), None)
    if found is None:
        raise InputError(f"{path} leads to no samples that are here: name metrics/RUN.json of this model")
    assert found.artifact is not None
    samples = found.artifact
    if samples.manifest.inputs["model"].payload != payload:
        raise InputError(f"{samples.path} was not sampled from this model: name its own samples and figures")
    if samples.manifest.parameters["weights"] != weights:
        raise InputError(
            f"{samples.path} was sampled with the model's {samples.manifest.parameters['weights']} weights"
        )
    return found


def _example(link: Link, card: ModelCard) -> Example:
    """The call that samples as these samples were made. Raises InputError if their tuned sigma range is not here."""
    import numpy as np

    from pipestill.config import RunParams
    from pipestill.reporting.example import measured
    from pipestill.sampling.recipe import solver_key

    assert link.artifact is not None
    run = RunParams.model_validate(dict(link.artifact.manifest.parameters))
    tuned = None
    if run.sigmas.startswith("tuned/"):
        artifact = next((below.artifact for below in link.inputs if below.entry.kind == "tuned"), None)
        if artifact is None:
            raise InputError(
                f"{link.artifact.path} was sampled in the range of {run.sigmas}, which is not here: pull it (dvc pull)"
            )
        chosen = json.loads(artifact.file("tuned.json").read_text(encoding="utf-8"))
        tuned = chosen[solver_key(run.sampler, run.steps or 0)]
    labels = np.load(link.artifact.file("labels.npy"))
    return measured(link.artifact.path.name, run, labels.tolist()[: run.images], tuned)
