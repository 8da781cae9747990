"""Whether what lies in a project's folders is what its parameters describe: names say nothing of it, manifests do.

Reads manifests and imports nothing heavy. Sizes and digests of payloads are left to `pipestill status` and `doctor`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipestill.artifacts import MANIFEST, Manifest
from pipestill.config import Params
from pipestill.errors import InputError
from pipestill.evaluation.headline import is_file_of
from pipestill.versions import superseded

FLOOR = "floor"


@dataclass(frozen=True)
class Node:
    """One artefact that the parameters ask for: its folder, and the parameters of its stage."""

    folder: str
    kind: str
    parameters: Mapping[str, Any]


class Current:
    """The artefacts below `root/artifacts` beside the parameters that they should have been made with."""

    def __init__(self, root: Path, params: Params) -> None:
        self._root, self._params = root, params
        self._manifests: dict[str, Manifest | None] = {}
        self._judged: dict[str, str | None] = {}

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """Every artefact that the parameters ask for, by folder."""
        return {node.folder: node for node in self._nodes()}

    def problem(self, folder: str) -> str | None:
        """Why the artefact in `folder` is not what the parameters describe, in one line; None if it is."""
        if folder not in self._judged:
            self._judged[folder] = self._judge(self.nodes[folder])
        return self._judged[folder]

    def metrics_problem(self, run: str, body: Mapping[str, Any]) -> str | None:
        """Why a metrics file of a run, or of the floor, does not count."""
        folder = "reference" if run == FLOOR else f"evaluations/{run}"
        problem = self.problem(folder)
        if problem is not None:
            return problem
        if not is_file_of(body, self._metrics(folder)):
            stage = "reference" if run == FLOOR else "evaluate"
            return f"the file does not hold the metrics of artifacts/{folder}: run pipestill {stage} again"
        return None

    def sampling_key(self, run: str) -> str | None:
        """The key of the work that sampled a run, under which this machine recorded how long it took."""
        manifest = self._manifest(f"samples/{run}")
        return None if manifest is None else manifest.key

    def _nodes(self) -> Iterator[Node]:
        params = self._params
        yield Node("dataset", "dataset", params.data.plain())
        yield Node("reference", "reference", params.reference.plain())
        for name, fetched in params.fetched.items():
            yield Node(f"fetched/{name}", "files", fetched.plain())
        for section in (params.converted, params.teachers, params.distillation.students):
            for name, model in section.items():
                yield Node(f"models/{name}", "model", model.plain())
        for name, tune in params.tune.items():
            yield Node(f"tuned/{name}", "tuned", tune.plain())
        for name, run in params.sampling.runs.items():
            yield Node(f"samples/{name}", "samples", run.plain())
            yield Node(f"evaluations/{name}", "evaluation", params.evaluation.plain())

    def _judge(self, node: Node) -> str | None:
        manifest = self._manifest(node.folder)
        place = f"artifacts/{node.folder}"
        if manifest is None or manifest.kind != node.kind:
            return f"{place} is not here"
        old = superseded(manifest)
        if old is not None:
            return f"{place} {old}"
        if dict(manifest.parameters) != dict(node.parameters):
            return f"{place} was made with different parameters"
        kinds = {other.kind for other in self.nodes.values()}
        for name, entry in manifest.inputs.items():
            if entry.kind not in kinds:
                continue  # images and files from outside
            same = [folder for folder, other in self.nodes.items() if other.kind == entry.kind]
            sources = [folder for folder in same if self._payload(folder) == entry.payload]
            if not sources:
                return f"{place} was made from a different {entry.kind} ({name}) than the current one"
            problems = [self.problem(folder) for folder in sources]
            if None not in problems:  # equal payloads may lie in several places
                return problems[0]
        return None

    def _payload(self, folder: str) -> str | None:
        manifest = self._manifest(folder)
        return None if manifest is None else manifest.payload

    def _manifest(self, folder: str) -> Manifest | None:
        if folder not in self._manifests:
            try:
                text = (self._root / "artifacts" / folder / MANIFEST).read_text(encoding="utf-8")
                self._manifests[folder] = Manifest.from_json(text)
            except (OSError, ValueError, TypeError, KeyError):
                self._manifests[folder] = None
        return self._manifests[folder]

    def _metrics(self, folder: str) -> list[Mapping[str, Any]]:
        file = "floor.json" if folder == "reference" else "metrics.json"
        path = self._root / "artifacts" / folder / file
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): rebuild the artefact") from error
        return list(body.values()) if folder == "reference" else [body]
