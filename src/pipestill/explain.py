"""One line for what is wrong with a parameter: its full name, the allowed range, the nearest known name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, Tag, ValidationError

from pipestill.errors import nearest

SHARED = {  # conf/'s shared sections, and where params.yaml has what they say
    "network": "teachers.NAME.network",
    "training": "teachers.NAME.training",
    "tuning": "tune.NAME",
    "distillation.shared": "distillation.students.NAME",
    "sampling.shared": "sampling.runs.NAME",
}
GROUPS = ("experiment", "tracking")  # choices of conf/ that are no section's name


def explain(section: type[BaseModel], error: ValidationError, shared: Mapping[str, Any] | None = None) -> list[str]:
    """Each of pydantic's problems with a section once, as `key: what is wrong and what would be right`.

    Unknown names come first: what is missing may only be misspelt. `shared` is what the section was expanded from.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    return list(dict.fromkeys(_line(section, problem, shared) for problem in problems))


def unknown(section: type[BaseModel], error: ValidationError, shared: Mapping[str, Any]) -> list[str]:
    """As `explain`, of unknown names alone."""
    problems = [problem for problem in error.errors(include_url=False) if problem["type"] == "extra_forbidden"]
    return list(dict.fromkeys(_line(section, problem, shared) for problem in problems))


def _line(section: type[BaseModel], problem: Any, shared: Mapping[str, Any] | None) -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    key = _as_written(_without_kinds(section, location), shared)
    what, given = problem["type"], problem["input"]
    if what == "extra_forbidden" and key in GROUPS:
        return f"{key}={shown(given)} chooses a file of conf/: only pipestill config takes it"
    if what == "extra_forbidden" and key in SHARED:
        return (
            f"{key} is shared by several entries only where parameters are composed (pipestill config, or a stage "
            f"without a params.yaml): here each entry has its own, {SHARED[key]}"
        )
    if what == "extra_forbidden":
        return f"{key} is not known" + nearest(location[-1], _names_at(section, location[:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    if what == "union_tag_invalid":
        return f"{key}.kind={problem['ctx']['tag']!r}: one of {problem['ctx']['expected_tags']} was expected"
    if what == "missing":
        return f"{key} is missing"
    if what == "value_error":
        return f"{key}: {message}" if key else message
    stated = f"{key}={shown(given)}"
    if what == "tuple_type":
        return f"{stated}: a list is expected, write {key}=[{'' if given is None else shown(given)}]"
    if what in ("dict_type", "model_type", "model_attributes_type"):
        return f"{stated}: it has parameters of its own, write {key}.NAME=VALUE"
    if what == "string_type":
        return f"{stated}: text is expected, put it in quotes"
    return f"{stated}: {message[:1].lower()}{message[1:]}"


def shown(value: Any) -> str:
    """A value as a parameter file or an override states it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _as_written(location: list[str], tree: Mapping[str, Any] | None) -> str:
    """The full name of a parameter, that of the shared section where an entry has it only from there."""
    for shared, place in SHARED.items() if tree is not None else ():
        pattern = place.split(".")
        fits = all(part in ("NAME", own) for part, own in zip(pattern, location, strict=False))
        written = [*shared.split("."), *location[len(pattern) :]]
        if fits and len(location) > len(pattern) and not _leads(tree, location) and _leads(tree, written):
            return ".".join(written)
    return ".".join(location)


def _leads(node: Any, location: list[str]) -> bool:
    """Whether a tree states something at a location."""
    for part in location:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return isinstance(node, list) and part.isdigit()
    return True


def _without_kinds(section: type[BaseModel], location: list[str]) -> list[str]:
    """A location without the kinds of sections that pydantic notes in it; no parameter file states them so."""
    steps = list(_walk(section, location))
    return [part for part, (annotation, _) in zip(location, steps, strict=False) if part not in kinds(annotation)] + (
        location[len(steps) :]
    )


def _names_at(section: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the section that a location leads to, through mappings, options and kinds."""
    steps = list(_walk(section, location))
    if len(steps) < len(location):
        return []
    found = _inner(steps[-1][1]) if steps else section
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _walk(section: type[BaseModel], location: list[str]) -> Iterator[tuple[Any, Any]]:
    """For each part of a location, as far as it leads, the annotations before and after it."""
    current: Any = section
    for part in location:
        before = current
        if part in kinds(current):
            current = kinds(current)[part]
        elif isinstance(inner := _inner(current), type) and issubclass(inner, BaseModel) and not _holds_many(current):
            if part not in inner.model_fields:
                return
            current = inner.model_fields[part].annotation
        else:
            current = _inner(current)
        yield before, current


def _holds_many(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) in (dict, tuple)


def kinds(annotation: Any) -> dict[str, Any]:
    """The sections that a field may hold, by the `kind` that names each; empty where there is no choice."""
    return {
        part.tag: get_args(member)[0]
        for member in get_args(annotation)
        for part in getattr(member, "__metadata__", ())
        if isinstance(part, Tag)
    }


def _inner(annotation: Any) -> Any:
    """The section inside Optional[...], tuple[...] or dict[..., ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in reversed(getattr(annotation, "__args__", ())):
        found = _inner(argument)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
