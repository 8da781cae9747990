"""Composing parameters: Hydra's groups in conf/ become the one resolved, fully expanded params.yaml.

Shared settings are merged into each teacher, student and run, what follows from others is filled in, and the result
is checked. It reads conf/ and reads and writes parameter files; nothing else.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipestill import config, digests, outputs
from pipestill.config import Override, Params
from pipestill.errors import InputError, nearest
from pipestill.explain import unknown

DIGEST = "# digest of what follows: "
MISSING = "???"  # Hydra's word for a value that is still to be given


def conf_folder() -> Path:
    """Where the groups are: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError("the packaged conf/ is missing: install pipestill again")


def compose(overrides: Sequence[str] = (), *, whole: bool = True, needs: Sequence[str] = ()) -> Params:
    """Composes conf/ with overrides, expands and checks. Raises InputError in one line.

    Without `whole`, for one stage, only the sections in `needs` must be complete, and sections may contradict others.
    """
    folder, given = conf_folder(), config.parse_overrides(overrides)
    chosen = [override for override in given if not override.remove and _is_choice(override, folder)]
    tree = _composed([f"{override.key}={override.value}" for override in chosen], folder)
    config.apply(tree, [override for override in given if override not in chosen])
    missing = [key for key in sorted(_missing(tree)) if whole or key.split(".")[0] in needs]
    if missing:
        _nothing_unknown(tree)
        raise InputError(f"{missing[0]} has no value yet: add {missing[0]}=...")
    return config.check(expand(tree), "parameters", shared=tree, whole=whole)


def _composed(choices: list[str], folder: Path) -> dict[str, Any]:
    """The tree that Hydra composes from choices, as plain values; those still to be given are `???`."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            body = OmegaConf.to_container(compose("config", overrides=choices), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None
    assert isinstance(body, dict)
    return {str(key): value for key, value in body.items()}


def _is_choice(override: Override, folder: Path) -> bool:
    """Whether an override chooses a file of a group in conf/. Raises InputError for names that are neither."""
    key, value = override.key, str(override.value)
    group = folder / key
    if group.is_dir() and not isinstance(override.value, dict):
        if not (group / f"{value}.yaml").is_file():
            there = sorted(file.stem for file in group.glob("*.yaml"))
            raise InputError(f"{key}={value}: there is no such choice{nearest(value, there)}")
        return True
    if "." not in key and not group.is_dir() and key not in Params.model_fields:
        groups = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise InputError(f"{key} is neither a group nor a section{nearest(key, groups)}")
    return False


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    """The full names of values that are still to be given."""
    if node == MISSING:
        yield prefix
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield from _missing(value, f"{prefix}.{key}" if prefix else str(key))


def _nothing_unknown(tree: Mapping[str, Any]) -> None:
    """Raises InputError for names that nothing knows: what is missing may only be misspelt."""
    try:
        Params.model_validate(expand(tree))
    except ValidationError as error:
        if lines := unknown(Params, error, tree):
            raise InputError("parameters: " + "; ".join(lines)) from None


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The composed tree with every entry complete and every derived value filled in.

    `network` and `training` are shared by all teachers, `tuning` by all entries of tune, `distillation.shared` by
    students, `sampling.shared` by runs. `like: NAME` in an entry takes over what NAME states.
    """
    body = {key: value for key, value in tree.items() if key not in ("network", "training", "tuning")}
    shared_teacher = {key: tree[key] for key in ("network", "training") if key in tree}
    body["teachers"] = _entries(tree.get("teachers"), shared_teacher, "teachers")
    for name, teacher in body["teachers"].items():
        if "network" not in (tree["teachers"][name] or {}) and str(teacher.get("start", "")).startswith("models/"):
            teacher["network"] = None  # it comes with the model
    for section, entries in (("distillation", "students"), ("sampling", "runs")):
        given = dict(tree.get(section) or {})
        shared = given.pop("shared", None) or {}
        body[section] = given | {entries: _entries(given.get(entries), shared, f"{section}.{entries}")}
    runs = body["sampling"]["runs"]
    usual = _mix((tree.get("sampling") or {}).get("shared") or {})
    for name, student in body["distillation"]["students"].items():
        if "teacher" in student:
            student.setdefault("init", student["teacher"])
        student.setdefault("plan", next((_mix(run) for run in runs.values() if run.get("model") == name), usual))
    for run in runs.values():
        if "model" in run:
            run.setdefault("sigmas", f"models/{run['model']}")
        if run.get("store") == "features":
            run.setdefault("extractors", "reference")
    body["tune"] = _tune(tree, runs)
    reference = tree.get("reference") or {}
    floor = {"counts": _counts(runs), "plans": sorted({_mix(run) for run in runs.values()}) or [usual]}
    body["reference"] = _merged({"floor": floor, "files": _files(reference)}, reference)
    return body


def _files(reference: Mapping[str, Any]) -> str:
    """The fetched entry in which the reference's outside files lie; `dataset`, which it waits for anyway, for none."""
    protocol = reference.get("protocol")
    named = [protocol.get("inception_weights") if isinstance(protocol, Mapping) else None, reference.get("statistics")]
    parts = [Path(os.path.relpath(name)).parts for name in named if isinstance(name, str) and name]
    entries = {place[2] for place in parts if place[:2] == ("artifacts", "fetched") and len(place) > 3}
    if len(entries) > 1:
        raise InputError(
            f"the reference's files lie in several entries of fetched ({', '.join(sorted(entries))}): use one"
        )
    return f"fetched/{entries.pop()}" if entries else "dataset"


def _entries(given: Any, shared: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    own = {str(name): dict(entry or {}) for name, entry in (given or {}).items()}
    return {name: _merged(shared, _own(name, own, where, ())) for name in own}


def _own(name: str, own: Mapping[str, dict[str, Any]], where: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """What an entry states, after what the entry that it is `like` states."""
    if name in seen:
        raise InputError(f"{where}.{name}.like goes round in a circle: {' -> '.join((*seen, name))}")
    entry = {key: value for key, value in own[name].items() if key != "like"}
    like = own[name].get("like")
    if like is None:
        return entry
    if like not in own:
        raise InputError(f"{where}.{name}.like: there is no '{like}'{nearest(str(like), own)}")
    return _merged(_own(str(like), own, where, (*seen, name)), entry)


def _tune(tree: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of tune: those stated, and one for each teacher that a run's `tuned/<teacher>` asks for."""
    asked: dict[str, list[dict[str, Any]]] = {}
    mixes: dict[str, str] = {}
    for run in runs.values():
        kind, _, teacher = str(run.get("sigmas", "")).partition("/")
        if kind == "tuned":
            mixes.setdefault(teacher, _mix(run))
            solver = {"sampler": run.get("sampler"), "steps": run.get("steps")}
            solvers = asked.setdefault(teacher, [])
            if solver not in solvers:
                solvers.append(solver)
    stated = {str(name): dict(entry or {}) for name, entry in (tree.get("tune") or {}).items()}
    shared = tree.get("tuning") or {}
    return {
        name: _merged(
            _merged({"solvers": asked.get(name, []), "plan": mixes.get(name, "balanced")}, shared), stated.get(name, {})
        )
        for name in dict.fromkeys([*asked, *stated])
    }


def _mix(run: Mapping[str, Any]) -> str:
    """RunParams.mix of an entry that is not yet checked."""
    return config.mix_of(str(run.get("plan", config.RunParams.model_fields["plan"].default)))


def _counts(runs: Mapping[str, Any]) -> list[int]:
    counts = {run.get("images", config.RunParams.model_fields["images"].default) for run in runs.values()}
    return sorted(count for count in counts if isinstance(count, int))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def render(params: Params, overrides: Sequence[str] = ()) -> str:
    """The text of params.yaml: sections in order, entries by name as stated, each value explicit."""
    body = config.dump_yaml(params.plain(), width=120, default_flow_style=None)
    command = shlex.join(["pipestill", "config", *overrides])
    return f"# Written by: {command}\n{DIGEST}{digests.of_bytes(body.encode())}\n{body}"


def edited(text: str) -> bool:
    """Whether a parameter file holds anything that `render` did not write."""
    head, found, rest = text.partition(DIGEST)
    digest, _, body = rest.partition("\n")
    return not (found and head.startswith("# Written by: ") and head.count("\n") == 1) or (
        digests.of_bytes(body.encode()) != digest
    )


def schema() -> str:
    """The JSON schema of params.yaml, for editors and for Snakemake's check."""
    body = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Params.model_json_schema()
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def experiment_of(text: str) -> str | None:
    """The `experiment=NAME` with which `render` wrote a parameter file; None where none was given."""
    command = text.partition("\n")[0].removeprefix("# Written by: ")
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    return next((word for word in words if word.startswith("experiment=")), None)


def write(path: Path, text: str, *, force: bool = False) -> bool:
    """Writes a parameter file and returns whether it changed.

    Raises InputError if `path` holds anything but parameters, if edits would be lost, and if the new command does not
    name the file's experiment.
    """
    outputs.PARAMETERS.check(path)
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if old == text:
            return False
        if edited(old) and not force:
            raise InputError(f"{path} holds edits that pipestill config did not make: keep them, or add --force")
        before = experiment_of(old)
        if before is not None and experiment_of(text) is None and not force:
            raise InputError(
                f"{path} was written with {before}, and pipestill config starts from conf/ each time: repeat {before} "
                "with all that belongs to it, edit the file, or add --force"
            )
    outputs.write_file(path, outputs.PARAMETERS, text)
    return True
