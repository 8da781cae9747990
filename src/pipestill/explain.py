"""One line for what is wrong with a parameter: its full name, the allowed range, the nearest known name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, Tag

from pipestill.errors import nearest

SHARED = {  # conf/'s shared sections, and where params.yaml has what they say
    "network": "teachers.NAME.network",
    "training": "teachers.NAME.training",
    "tuning": "tune.NAME",
    "distillation.shared": "distillation.students.NAME",
    "sampling.shared": "sampling.runs.NAME",
}


def explain(section: type[BaseModel], problem: Any) -> str:
    """One of pydantic's problems with a section, as `key: what is wrong and what would be right`."""
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(_without_kinds(section, location))
    if problem["type"] == "extra_forbidden" and key in SHARED:
        return (
            f"{key} is shared by several entries only where parameters are composed (pipestill config, or a stage "
            f"without a params.yaml): here each entry has its own, {SHARED[key]}"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key} is not known" + nearest(location[-1], _names_at(section, location[:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind={problem['ctx']['tag']!r}: one of {problem['ctx']['expected_tags']} was expected"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    given = problem["input"]
    return f"{key}={given!r}: {message[:1].lower()}{message[1:]}"


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
