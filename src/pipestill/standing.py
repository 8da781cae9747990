"""Whether an artefact is what its stage, as resolved now, would make: the check before record and sync sign anything.

It reads manifests and metrics; of a dataset's outside source it asks the digest anew.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipestill import artifacts, config
from pipestill.artifacts import MANIFEST, Artifact, InputEntry
from pipestill.config import Params, Section
from pipestill.errors import InputError
from pipestill.evaluation.headline import is_file_of
from pipestill.pipeline import Pipeline, Stage


class Standing:
    """The standing of each stage's artefact, judged once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._problems: dict[str, str | None] = {}

    @cached_property
    def params(self) -> Params:
        return config.check(config.parse_yaml(self.pipeline.text, "params.yaml"), "params.yaml", whole=True)

    def problem(self, stage: Stage) -> str | None:
        """Why the artefact is not what the stage would make from what lies there now; None where it is."""
        if stage.address not in self._problems:
            try:
                self._problems[stage.address] = self._judge(stage)
            except InputError as error:
                self._problems[stage.address] = str(error)
        return self._problems[stage.address]

    def examine(self, addresses: Collection[str]) -> None:
        """Judges these stages by every byte of their artefacts, where sizes alone are asked for otherwise."""
        for stage in self.pipeline.stages:
            if stage.address in addresses and self.problem(stage) is None:
                try:
                    artifacts.verify(open_any(self.pipeline.root / stage.output))
                except InputError as error:
                    self._problems[stage.address] = str(error)

    def missing(self, stage: Stage) -> bool:
        return not (self.pipeline.root / stage.manifest).exists()

    def current(self) -> list[Stage]:
        """Stages that stand, and that all they come from stands as well."""
        sound: dict[str, bool] = {}

        def stands(stage: Stage) -> bool:
            if stage.address not in sound:
                sound[stage.address] = self.problem(stage) is None and all(
                    stands(source) for source in self.pipeline.upstream(stage)
                )
            return sound[stage.address]

        return [stage for stage in self.pipeline.stages if stands(stage)]

    def _judge(self, stage: Stage) -> str | None:
        manifest = open_any(self.pipeline.root / stage.output).manifest
        if manifest.stage != stage.name:
            return f"{stage.output} was made by pipestill {manifest.stage}"
        if manifest.version != stage.version:
            return f"{stage.output} was made by version {manifest.version} of the stage, it is {stage.version} now"
        wanted = self._parameters(stage)
        different = _first_difference(wanted, manifest.parameters)
        if different is not None:
            return f"{stage.output} was made with other parameters ({different})"
        return self._inputs_problem(stage, manifest.inputs) or self._metrics_problem(stage)

    def _parameters(self, stage: Stage) -> dict[str, Any]:
        """The section that decides the stage's result, as manifests hold it."""
        key = next(iter(stage.parameters))
        node: Any = self.params
        for part in key.split("."):
            node = getattr(node, part) if isinstance(node, Section) else node[part]
        assert isinstance(node, Section)
        return node.plain()

    def _inputs_problem(self, stage: Stage, inputs: Mapping[str, InputEntry]) -> str | None:
        """Each input that a manifest names must be what lies at its place now; none may have joined since."""
        for name, entry in inputs.items():
            if name in stage.options:
                places = [stage.options[name]]
            else:
                places = [*stage.inputs, *stage.options.values(), *texts(self._parameters(stage))]
            if entry.kind == "extractors":
                is_there = any(entry == self._measures(place) for place in places)
            else:
                is_there = any(entry in self._at(place) for place in places)
            if not is_there:
                return f"{stage.output} was made from another {entry.kind} as its {name} than there is now"
        used = set(inputs.values())
        for path in stage.inputs:
            for source in self.pipeline.sources(path):
                is_member = source.output != path and path in map(str, PurePosixPath(source.output).parents)
                if is_member and not used.issuperset(self._at(source.output)):
                    return f"{stage.output} was made without {source.output}"
        return None

    def _at(self, path: str) -> list[InputEntry]:
        """What lies at a path, as manifests name it: one artefact, all of a folder's, or an outside source."""
        sources = self.pipeline.sources(path)
        if sources:
            there = [open_any(self.pipeline.root / source.output) for source in sources if not self.missing(source)]
            return [artifact.as_input for artifact in there] + [
                InputEntry("file", entry.sha256)  # a single file of fetched ones, which a reference names
                for artifact in there
                for name, entry in artifact.manifest.files.items()
                if artifact.path / name == self.pipeline.root / path
            ]
        outside = self.pipeline.root / path
        if path == self.params.data.path and outside.exists():
            from pipestill.data.identity import input_of
            from pipestill.data.sources import open_source

            return [input_of(open_source(self.params.data), Path(path))]
        return [artifacts.outside_input(outside)] if outside.is_file() else []

    def _measures(self, path: str) -> InputEntry | None:
        """What a run that keeps features depends on of the reference at a path."""
        from pipestill.evaluation.reference import open_reference

        folder = self.pipeline.root / path
        return open_reference(folder).measures if (folder / MANIFEST).exists() else None

    def _metrics_problem(self, stage: Stage) -> str | None:
        """The metrics file must hold the artefact's metrics."""
        originals = figures_of(open_any(self.pipeline.root / stage.output)) if stage.metrics else []
        for path in stage.metrics:
            try:
                copy = json.loads((self.pipeline.root / path).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return f"{path} is missing or cannot be read: pipestill {stage.name} writes it"
            if not is_file_of(copy, originals):
                return f"{path} does not hold the metrics of {stage.output}: run pipestill {stage.name} again"
        return None


def open_any(path: Path) -> Artifact:
    """Opens an artefact of whatever kind. Raises InputError."""
    try:
        kind = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "whole"
    return artifacts.read(path, kind)


def figures_of(artifact: Artifact) -> list[dict[str, Any]]:
    """The sets of metrics that an evaluation (one) or a reference (its floors, one a count) holds."""
    if artifact.manifest.kind == "evaluation":
        return [json.loads(artifact.file("metrics.json").read_text(encoding="utf-8"))]
    if artifact.manifest.kind == "reference":
        return list(json.loads(artifact.file("floor.json").read_text(encoding="utf-8")).values())
    return []


def texts(value: Any) -> Iterator[str]:
    """Every text among parameters: an outside file may be named there."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for below in value:
            yield from texts(below)


def _first_difference(wanted: Any, given: Any, key: str = "") -> str | None:
    """The first name whose value differs, with both values."""
    if isinstance(wanted, Mapping) and isinstance(given, Mapping):
        for name in sorted({*wanted, *given}):
            below = _first_difference(wanted.get(name), given.get(name), f"{key}.{name}".lstrip("."))
            if below is not None:
                return below
        return None
    return None if wanted == given else f"{key} is {json.dumps(wanted)} now, it was {json.dumps(given)}"
