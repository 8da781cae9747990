"""One line for what is wrong with a parameter: its full name, the allowed range, the nearest known name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

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
    key = ".".join(location)
    if problem["type"] == "extra_forbidden" and key in SHARED:
        return (
            f"{key} is shared by several entries only where parameters are composed (pipestill config, or a stage "
            f"without a params.yaml): here each entry has its own, {SHARED[key]}"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key} is not known" + nearest(location[-1], _names_at(section, location[:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    given = problem["input"]
    return f"{key}={given!r}: {message[:1].lower()}{message[1:]}"


def _names_at(section: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the section that a location leads to, through mappings and options."""
    current: Any = section
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return []
            current = current.model_fields[part].annotation
        else:
            current = _inner(current)
            continue
        if _mapping_value(current) is None:
            current = _inner(current)
    inner = _inner(current)
    return list(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else []


def _mapping_value(annotation: Any) -> Any:
    arguments: tuple[Any, ...] = getattr(annotation, "__args__", ())
    return arguments[1] if getattr(annotation, "__origin__", None) is dict else None


def _inner(annotation: Any) -> Any:
    """The section inside Optional[...], tuple[...] or dict[..., ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in reversed(getattr(annotation, "__args__", ())):
        found = _inner(argument)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
