"""What a training leaves for those who follow it: what it trains, and which states it saved, dropped ones too.

It may touch two files of the training's work folder, which outlive its states.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipestill.artifacts import InputEntry
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard, card_of
from pipestill.networks.unet import NETWORKS
from pipestill.networks.unet2d import UNet2DModel
from pipestill.work import Work, runs_root, write_atomic

DESCRIPTION, LISTING = "training.json", "saved.txt"


@dataclass(frozen=True)
class Description:
    """A training: the entry that it trains, the work that it is, and the network that its states fit into."""

    name: str
    stage: str
    key: str
    version: int
    updates: int  # of the whole training
    parameters: Mapping[str, Any]
    inputs: Mapping[str, InputEntry]
    output: Path  # where its model will be
    card: ModelCard
    network: Mapping[str, Any]  # the network's configuration

    def build(self) -> UNet2DModel:
        """The network, with weights of no meaning."""
        unet: UNet2DModel = NETWORKS[self.network["_class_name"]].from_config(dict(self.network))
        return unet


def describe(work: Work, name: str, updates: int, card: ModelCard, unet: UNet2DModel) -> None:
    """Writes down what the work trains."""
    body = {
        "name": name,
        "stage": work.stage,
        "key": work.key,
        "version": work.version,
        "updates": updates,
        "parameters": work.parameters,
        "inputs": {name: asdict(entry) for name, entry in work.inputs.items()},
        "output": str(work.output),
        "card": asdict(card),
        "network": json.loads(unet.to_json_string()),
    }
    write_atomic(work.folder / DESCRIPTION, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> Description:
    """What `describe` wrote. Raises InputError."""
    path = folder / DESCRIPTION
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        body["inputs"] = {name: InputEntry(**entry) for name, entry in body["inputs"].items()}
        return Description(**body | {"output": Path(body["output"]), "card": card_of(body["card"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): start the training again") from error


def find(place: Path) -> Path:
    """The work folder of a training, which is `place` itself, or whose model goes to `place`. Raises InputError."""
    if (place / DESCRIPTION).is_file():
        return place
    output = Path(os.path.abspath(place))
    found = [path for path in runs_root().glob(f"*/*/{DESCRIPTION}") if _output_of(path) == output]
    if not found:
        raise InputError(
            f"no training below {runs_root()} makes {place}: name its --output, or its folder there, once it has begun"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _output_of(description: Path) -> Path | None:
    """Where the training's model goes; None for a description of another version, which is nobody's."""
    try:
        return read(description.parent).output
    except InputError:
        return None


def note(folder: Path, *steps: int) -> None:
    """Adds saved steps to the listing. The file is whole at any moment."""
    known = noted(folder)
    if set(steps) - set(known):
        write_atomic(folder / LISTING, "".join(f"{step}\n" for step in sorted({*known, *steps})))


def noted(folder: Path) -> list[int]:
    """Every step that was saved, in order, whether its state is still there or not."""
    try:
        return [int(line) for line in (folder / LISTING).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
