"""The model card of an exported model: what it is, from what, how it was made, what was measured, under which licence.

Pure functions of manifests and metrics to Markdown.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipestill.artifacts import LICENCE
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard
from pipestill.reporting import figures
from pipestill.reporting.example import Example
from pipestill.reporting.licences import Terms
from pipestill.tracing import OUTSIDE, Link

NEEDED = ("torch", "diffusers", "safetensors", "numpy", "pillow")  # by an exported folder


def imposed_licences(chain: Link) -> list[str]:
    """Licences of the outside files that a model comes from, each once.

    Raises InputError where one of them states none, or the chain cannot be followed to its end.
    """
    found: dict[str, None] = {}
    for link in chain.walk():
        if link.artifact is None:
            if link.entry.kind not in OUTSIDE:
                raise InputError(
                    f"{link.name}, a {link.entry.kind} that the model comes from, is not here, so its licence is not "
                    "known: pull it (dvc pull), or run the pipeline"
                )
            continue
        manifest = link.artifact.manifest
        if manifest.kind == "files":
            if LICENCE not in manifest.files:
                raise InputError(
                    f"{link.artifact.path} states no licence, and what is made from it has to name it: set "
                    f"fetched.{link.artifact.path.name}.licence and fetch again"
                )
            licence = link.artifact.file(LICENCE).read_text(encoding="utf-8").strip()
            found[licence] = None
    return list(found)


def model_card(
    name: str,
    card: ModelCard,
    chain: Link,
    *,
    licence: str,
    terms: Terms,
    metrics: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[tuple[str, str]],
    example: Example,
    own_network: bool,
) -> str:
    """README.md of an exported model; `metrics` by run, `pictures` as (file, caption). Raises InputError.

    `own_network` says that the folder brings the network's class.
    """
    imposed = imposed_licences(chain)
    environment = Environment(
        loader=PackageLoader("pipestill.reporting"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    assert chain.artifact is not None  # the model itself
    return environment.get_template("card.md.jinja").render(
        name=name,
        card=card,
        noise=figures.noise_of(asdict(card)),
        example=example,
        own_network=own_network,
        requirements=_requirements(),
        licence=licence,
        terms=terms,
        imposed=imposed,
        unknown=[link.name for link in chain.walk() if link.artifact is None],
        table=_table(metrics),
        pictures=pictures,
        parameters=json.dumps(dict(chain.artifact.manifest.parameters), indent=1, sort_keys=True),
        stage=chain.artifact.manifest.stage,
        links=[(link.name, link.entry.kind, link.entry.payload, _made_by(link)) for link in chain.walk()],
    )


def _requirements() -> list[str]:
    """What an exported folder needs, in the versions that this package needs."""
    stated = importlib.metadata.requires("pipestill") or []
    named = {re.split(r"[^a-z-]", line)[0]: line.partition(";")[0].strip() for line in stated}
    return [shlex.quote(named.get(name, name)) for name in NEEDED]


def _made_by(link: Link) -> str:
    if link.artifact is None:
        return "outside"
    manifest = link.artifact.manifest
    return f"pipestill {manifest.stage}, version {manifest.version}"


def _cell(text: str) -> str:
    """A text with names that users chose, as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row a run, its head first: cost, distances beside their floors, accuracy and diversity where measured.

    The class mix stands there too where one is not balanced or has notes.
    """
    if not metrics:
        return []
    spaces = figures.extractors(metrics.values())
    head = ["run", "evaluations", "guidance"]
    for space in spaces:
        head += [f"distance, {figures.extractor_title(space)}", "floor"]
    mixes = {name: figures.class_mix(run) for name, run in metrics.items()}
    mixed = any(mix not in ("", "balanced") for mix in mixes.values())
    rows = [[*head, "class accuracy", "diversity", *(["class mix"] if mixed else [])]]
    for name in sorted(metrics):
        run = metrics[name]
        mix = [_cell(mixes[name] or figures.DASH)] if mixed else []
        row = [name, f"{figures.value(run, 'evaluations') or 0:g}", figures.short(figures.value(run, "guidance"))]
        for space in spaces:
            row += [figures.short(figures.value(run, f"fd_{space}")), figures.short(figures.floor_of(run, space))]
        rows.append([*row, *(figures.short(figures.value(run, key)) for key in ("class_accuracy", "diversity")), *mix])
    return rows
