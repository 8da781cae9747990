"""The stages as DVC resolves them from one dvc.yaml: what Snakemake's rules, record, sync and doctor go by.

It reads that dvc.yaml, params.yaml and the stages' declared versions through DVC, and imports DVC only when asked.
Other pipelines of the same repository are none of its business.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from pipestill import config
from pipestill.artifacts import MANIFEST
from pipestill.errors import InputError, SurroundingsError
from pipestill.started import ABSENT, value_at
from pipestill.work import write_atomic


@dataclass(frozen=True)
class Stage:
    """One resolved stage; paths are relative to the project's root."""

    name: str  # as in dvc.yaml: distill
    entry: str | None  # which of its entries: student-10
    command: str
    inputs: tuple[str, ...]
    parameters: Mapping[str, Any]  # what DVC tracks, by full name
    version: int | None
    output: str  # the artefact's folder
    metrics: tuple[str, ...]

    @property
    def address(self) -> str:
        """DVC's name of the stage: distill@student-10."""
        return self.name if self.entry is None else f"{self.name}@{self.entry}"

    @property
    def manifest(self) -> str:
        return f"{self.output}/{MANIFEST}"

    @cached_property
    def options(self) -> dict[str, str]:
        """The command's `--option value` pairs."""
        words = shlex.split(self.command)
        return {word[2:]: after for word, after in pairwise(words) if word.startswith("--")}


@dataclass(frozen=True)
class Pipeline:
    """All stages of a project, in DVC's order."""

    root: Path
    stages: tuple[Stage, ...]
    text: str = ""  # of the params.yaml that they were resolved from

    def dumped(self) -> str:
        """The stages as JSON, for `restored`."""
        return json.dumps([asdict(stage) for stage in self.stages], indent=1) + "\n"

    def named(self, name: str) -> list[Stage]:
        """The entries of one stage of dvc.yaml."""
        return [stage for stage in self.stages if stage.name == name]

    def get(self, name: str, entry: str | None = None) -> Stage:
        for stage in self.stages:
            if (stage.name, stage.entry) == (name, entry):
                return stage
        raise InputError(f"dvc.yaml resolves to no stage {name}{'@' + entry if entry else ''}")

    def sources(self, path: str) -> list[Stage]:
        """The stages that make `path`, a folder around it, or what lies in it."""
        wanted = PurePosixPath(path)
        found = []
        for stage in self.stages:
            made = PurePosixPath(stage.output)
            if made == wanted or made in wanted.parents or wanted in made.parents:
                found.append(stage)
        return found

    def upstream(self, stage: Stage) -> list[Stage]:
        """The stages whose artefacts a stage reads, each once."""
        found = {source.address: source for path in stage.inputs for source in self.sources(path)}
        return list(found.values())

    def input_files(self, stage: Stage) -> list[str]:
        """One file that stands for each input: an artefact's manifest, or the path of what no stage makes."""
        files: dict[str, None] = {}
        for path in stage.inputs:
            sources = self.sources(path)
            files.update(dict.fromkeys([source.manifest for source in sources] or [path]))
        return list(files)

    def absent(self) -> dict[str, str]:
        """Inputs from outside that are not there, each with the address of the first stage that waits for it."""
        found: dict[str, str] = {}
        for stage in self.stages:
            for path in () if (self.root / stage.manifest).exists() else stage.inputs:
                if not self.sources(path) and not (self.root / path).exists():
                    found.setdefault(path, stage.address)
        return found

    def strangers(self, stage: Stage) -> list[str]:
        """Artefacts in folders that a stage reads as a whole (the report) which no stage makes any more."""
        known = {made.output for made in self.stages}
        found = []
        for path in stage.inputs:
            if any(PurePosixPath(path) in PurePosixPath(made).parents for made in known):
                for folder in sorted((self.root / path).glob("*/")):
                    name = f"{path}/{folder.name}"
                    if name not in known and not folder.name.startswith("."):
                        found.append(name)
        return found


def load(root: Path) -> Pipeline:
    """Resolves the project's dvc.yaml. Raises InputError in one line where it cannot."""
    root = root.resolve()
    if not (root / "dvc.yaml").is_file():
        raise InputError(f"{root} has no dvc.yaml: run this at the root of a pipestill checkout")
    if not _in_git(root):
        raise InputError(
            f"{root} is no git checkout, and DVC and Snakemake need one: clone it, or run git init && git add -A there"
        )
    text = _parameters(root)
    with dvc_stages(root) as found:
        stages = tuple(_stage(stage, root) for stage in found if stage.cmd)
    if _parameters(root) != text:
        raise InputError("params.yaml changed while it was being read: start this again")
    return Pipeline(root, stages, text)


def restored(root: Path, dumped: str, text: str) -> Pipeline:
    """The pipeline that was resolved earlier, from `dumped`."""
    rows = [row | {name: tuple(row[name]) for name in ("inputs", "metrics")} for row in json.loads(dumped)]
    return Pipeline(root.resolve(), tuple(Stage(**row) for row in rows), text)


def recorded_parameters(root: Path) -> dict[str, Mapping[str, Any]]:
    """What dvc.lock says that each recorded stage was made with, by the stage's address."""
    return {address: stage.get("params", {}).get("params.yaml", {}) for address, stage in recorded(root).items()}


def recorded(root: Path) -> dict[str, Any]:
    """The entries of dvc.lock, by the stage's address."""
    stages: dict[str, Any] = _declared(str(root / "dvc.lock")).get("stages") or {}
    return stages


def record_again(root: Path, entries: Mapping[str, Any]) -> None:
    """Puts earlier entries back into dvc.lock, and removes those that are None, under DVC's lock.

    What others have recorded meanwhile stays. Raises SurroundingsError where the lock cannot be had.
    """
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    lock = root / "dvc.lock"
    with _repository(root, locked=True):
        if not lock.exists():
            return
        body = parse_yaml_for_update(lock.read_text(encoding="utf-8"), str(lock))
        if all(body["stages"].get(address) == entry for address, entry in entries.items()):
            return
        for address, entry in entries.items():
            if entry is None:
                body["stages"].pop(address, None)
            else:
                body["stages"][address] = entry
        if body["stages"]:
            write_atomic(lock, dumps_yaml(body))
        else:
            lock.unlink()


def _parameters(root: Path) -> str:
    try:
        return (root / "params.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # DVC says what is wrong


@contextmanager
def dvc_stages(root: Path, *, locked: bool = False) -> Iterator[list[Any]]:
    """DVC's own objects for the stages of `root/dvc.yaml`, whatever else its repository holds.

    `locked` holds DVC's lock meanwhile, and waits for it where another of its commands has it. Raises InputError in
    one line, or, under the lock, SurroundingsError.
    """
    with _repository(root, locked=locked) as repo:
        from dvc.repo.index import Index

        stages: list[Any] = Index.from_file(repo, str(root / "dvc.yaml")).stages
        _read_parameters_once(stages)
        yield stages


@contextmanager
def _repository(root: Path, *, locked: bool) -> Iterator[Any]:
    """DVC's object for the repository around `root`; see `dvc_stages`."""
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.scm import SCMError
    except ImportError as error:
        raise InputError(f"DVC is not installed here ({error}): pip install 'pipestill[workflow]'") from None
    try:
        # as --wait-for-lock does: a pipeline beside this one, or a colleague, may be recording
        with Repo(str(root), _wait_for_lock=True) as repo, repo.lock if locked else nullcontext():
            yield repo
    except (DvcException, SCMError) as error:
        cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
        said = f"{' '.join(str(error).split())}{cause}"
        if locked:  # it resolved before: another process is at these artefacts
            raise SurroundingsError(f"DVC cannot compare artefacts with dvc.lock: {said}") from None
        raise InputError(f"dvc.yaml cannot be resolved: {said}") from None


def _read_parameters_once(stages: list[Any]) -> None:
    """Parses each parameter file once; DVC parses it anew for every stage, which is most of record's time."""
    from dvc.dependency import ParamsDependency

    bodies: dict[str, Any] = {}

    def reader(dependency: Any) -> Callable[..., dict[str, Any]]:
        def read_params(flatten: bool = True, **_: Any) -> dict[str, Any]:
            path = dependency.fs_path
            if path not in bodies:
                bodies[path] = _declared(path)
            found = {key: value_at(bodies[path], key) for key in dependency.params}
            return {key: value for key, value in found.items() if value is not ABSENT}

        return read_params

    for stage in stages:
        for dependency in stage.deps:
            if isinstance(dependency, ParamsDependency):
                dependency.read_params = reader(dependency)


def _in_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def _stage(stage: Any, root: Path) -> Stage:
    """One DVC stage in plain terms."""
    from dvc.dependency import ParamsDependency

    name, _, entry = stage.name.partition("@")
    inputs: dict[str, None] = {}
    parameters: dict[str, Any] = {}
    version = None
    for dependency in stage.deps:
        if not isinstance(dependency, ParamsDependency):
            inputs[_relative(dependency.fs_path, root)] = None
        elif dependency.fs_path.endswith(".py"):
            version = dependency.read_params().get("VERSION")
        else:
            parameters |= dict.fromkeys(dependency.params) | dependency.read_params()
    outputs = [_relative(out.fs_path, root) for out in stage.outs if not out.metric]
    if len(outputs) != 1:
        raise InputError(f"dvc.yaml: stage {stage.name} must have one output folder, it has {outputs}")
    return Stage(
        name=name,
        entry=entry or None,
        command=stage.cmd,
        inputs=tuple(inputs),
        parameters=parameters,
        version=version,
        output=outputs[0],
        metrics=tuple(_relative(out.fs_path, root) for out in stage.outs if out.metric),
    )


def _relative(path: str, root: Path) -> str:
    """Relative to the root where it lies below it, else absolute."""
    relative = os.path.relpath(path, root)
    return path if relative.startswith("..") else PurePosixPath(relative).as_posix()


def _declared(path: str) -> Any:
    """What DVC reads from a parameter file: YAML, or the constants of a Python module."""
    from dvc.fs import LocalFileSystem
    from dvc.utils.serialize import load_path

    try:
        return load_path(path, LocalFileSystem())
    except FileNotFoundError:
        return {}


def output_patterns(root: Path) -> dict[str, str]:
    """The folder that each stage of dvc.yaml makes, with `{name}` for an entry; also of stages without entries."""
    stages = config.parse_yaml((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: _output(body).replace("${key}", "{name}") for name, body in stages.items()}


def _output(body: Mapping[str, Any]) -> str:
    (out, *_) = body.get("do", body)["outs"]
    return out if isinstance(out, str) else str(next(iter(out)))
