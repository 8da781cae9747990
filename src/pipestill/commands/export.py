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

    if not licence.strip():
        raise InputError("--licence is empty: a model is not handed over without one")
    if os.path.lexists(output):
        raise InputError(f"{output} is there already: name another --output, or remove it")
    artifact, card = read_card(model)
    artifacts.verify(artifact)
    chain = tracing.trace(model, Path.cwd())
    shown = {path.stem: _figures_of(path, artifact.manifest.payload) for path in metrics}
    pictures = [(f"pictures/{path.name}.png", path.name) for path in samples]
    text = model_card(output.name, card, chain, licence=licence.strip(), metrics=shown, pictures=pictures)
    staging = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    with writing(staging):
        staging.mkdir(parents=True)
        for name in ("model.json", "model_index.json"):
            shutil.copyfile(artifact.file(name), staging / name)
        shutil.copytree(artifact.path / SUBFOLDERS[weights], staging / "unet")
        (staging / "README.md").write_text(text)
        if shown:
            (staging / "metrics.json").write_text(json.dumps(shown, indent=1, sort_keys=True) + "\n")
        for path, (picture, _) in zip(samples, pictures, strict=True):
            (staging / picture).parent.mkdir(exist_ok=True)
            shutil.copyfile(_samples_of(path, artifact.manifest.payload).file("grid.png"), staging / picture)
        os.rename(staging, output)
    say(f"{output}: {card.role} {artifact.path.name}, {licence.strip()}")
    return output


def _figures_of(path: Path, payload: str) -> dict[str, Any]:
    """A metrics file of this model's samples. Raises InputError."""
    chain = tracing.trace(path, Path.cwd())
    if payload not in {link.entry.payload for link in chain.walk()}:
        raise InputError(f"{path} was not measured on samples of this model: name its own runs")
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def _samples_of(path: Path, payload: str) -> artifacts.Artifact:
    found = artifacts.read(path, "samples")
    if found.manifest.inputs["model"].payload != payload:
        raise InputError(f"{path} was not sampled from this model: name its own samples")
    return found
