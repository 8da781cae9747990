"""Hand a model over: a Diffusers pipeline folder with a model card (recipe, figures, pictures, provenance, licence).

The licence has to be stated; those of outside files that the model comes from (a fetched teacher) are added to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipestill import artifacts, tracing
from pipestill.errors import InputError
from pipestill.modes import follow_umask
from pipestill.progress import say
from pipestill.work import writing

EXAMPLES = """\
  pipestill export --model artifacts/models/student-4 --output student-4 --licence Apache-2.0 \\
      --metrics metrics/student-4.json --samples artifacts/samples/student-4
  pipestill export --model artifacts/models/student-10 --output student-10 --licence CC-BY-NC-SA-4.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model artefact")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--licence", required=True, metavar="NAME", help="under which the model is handed over")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights (default: ema)")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], metavar="FILE", help="metrics/RUN.json to show")
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

    Raises InputError: no licence, a file of the chain that states none, figures or pictures of another model, a folder
    that is there already.
    """
    from pipestill.networks.model import SUBFOLDERS, read_card
    from pipestill.reporting.card import model_card

    if not licence.strip() or not licence.isprintable():
        raise InputError("--licence is empty or not one line: a model is not handed over without one")
    for paths in (metrics, samples):
        if len({path.stem for path in paths}) < len(paths):
            raise InputError(f"two of {', '.join(map(str, paths))} have the same name: show one of them")
    if os.path.lexists(output):
        raise InputError(f"{output} is there already: name another --output, or remove it")
    artifact, card = read_card(model)
    artifacts.verify(artifact)
    root = _root(model)
    chain = tracing.trace(model, root)
    payload = artifact.manifest.payload
    shown = {path.stem: _figures_of(path, root, payload, weights) for path in metrics}
    grids = [_samples_of(artifacts.read(path, "samples"), payload, weights).file("grid.png") for path in samples]
    pictures = [(f"pictures/{path.name}.png", path.name) for path in samples]
    text = model_card(output.name, card, chain, licence=licence.strip(), metrics=shown, pictures=pictures)
    staging = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    with writing(staging):
        staging.mkdir(parents=True)
        for name in ("model.json", "model_index.json"):
            shutil.copyfile(artifact.file(name), staging / name)
        shutil.copytree(artifact.path / SUBFOLDERS[weights], staging / "unet")
        (staging / "README.md").write_text(text, encoding="utf-8")
        if shown:
            (staging / "metrics.json").write_text(json.dumps(shown, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for grid, (picture, _) in zip(grids, pictures, strict=True):
            (staging / picture).parent.mkdir(exist_ok=True)
            shutil.copyfile(grid, staging / picture)
        follow_umask(staging)
        os.rename(staging, output)
    say(f"{output}: {card.role} {artifact.path.name}, {licence.strip()}")
    return output


def _root(model: Path) -> Path:
    """The project that a model lies in: where its artefacts are; the working folder where it lies in none."""
    return next((folder for folder in model.absolute().parents if (folder / "artifacts").is_dir()), Path.cwd())


def _figures_of(path: Path, root: Path, payload: str, weights: str) -> dict[str, Any]:
    """A metrics file of this model's samples. Raises InputError."""
    links = list(tracing.trace(path, root).walk())
    sampled = next((link.artifact for link in links if link.artifact and link.entry.kind == "samples"), None)
    if sampled is None:
        raise InputError(f"{path} leads to no samples that are here: name metrics/RUN.json of this model")
    _samples_of(sampled, payload, weights)
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return body


def _samples_of(samples: artifacts.Artifact, payload: str, weights: str) -> artifacts.Artifact:
    """The samples, if they are of this model and these weights. Raises InputError."""
    if samples.manifest.inputs["model"].payload != payload:
        raise InputError(f"{samples.path} was not sampled from this model: name its own samples and figures")
    if samples.manifest.parameters["weights"] != weights:
        raise InputError(
            f"{samples.path} was sampled with the model's {samples.manifest.parameters['weights']} weights"
        )
    return samples
