"""Reads NVIDIA's pickles of networks (EDM's format) as data: nothing that they hold is imported or run.

The pickle machine is `inert_pickle`; here its records become networks with their tensors. Only reads the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipestill.errors import InputError
from pipestill.networks import inert_pickle
from pipestill.networks.inert_pickle import Held, Module, Refused, kind
from pipestill.userfiles import unreadable

DEEPEST = 64  # modules within modules


@dataclass(frozen=True)
class Network:
    """One pickled network: its class's name, its constructor's keywords, and its tensors by dotted name."""

    class_name: str
    arguments: Mapping[str, Any]
    positional: bool  # whether its constructor was given arguments by position too, which `arguments` lacks
    tensors: Mapping[str, Tensor]
    children: Mapping[str, Network]  # the networks directly below it, by attribute


def read_networks(path: Path) -> dict[str, Network]:
    """Every network that the pickle's top-level dict holds (`ema`, …), by key.

    Raises InputError, in one line with the offending name, where the file is not such a pickle.
    """
    try:
        with path.open("rb") as file:
            body = inert_pickle.load(file, path.stat().st_size)
        if not isinstance(body, dict):
            raise Refused(f"holds a {kind(body)}, a dict of networks was expected")
        found = {key: network for key, value in body.items() if (network := _network_at(str(key), value)) is not None}
        if not found:
            raise Refused(f"holds no network (its keys are: {', '.join(map(str, body)) or 'none'})")
        return found
    except OSError as error:
        raise unreadable(path, error) from error
    except Refused as refused:
        raise InputError(f"{path} {_line(str(refused))}; nothing in it was run") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; nothing in it was run") from None
    except MemoryError:
        raise InputError(f"{path} asks for more memory than there is; nothing in it was run") from None
    except Exception as error:  # whatever a damaged or hostile file makes the machine raise
        reason = _line(str(error)) or type(error).__name__
        raise InputError(f"{path} is no whole pickle in EDM's format ({reason}); nothing in it was run") from None


def _line(text: str) -> str:
    """A text from a file as a part of one line: printable, and not longer than a person reads."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]


def _network_at(name: str, value: Any) -> Network | None:
    """The network that a record describes; None where it is none (an augmentation pipe, a loss, a dict of options)."""
    if not isinstance(value, Module) or not isinstance(value.state.get("_modules"), dict):
        return None
    return _network(value.class_name, value.state, name, set(), 0)


def _network(class_name: str, state: dict[str, Any], name: str, seen: set[int], depth: int) -> Network:
    """A module with all below it; `seen` are the objects met so far, each of which may stand in one place alone."""
    if depth > DEEPEST:
        raise Refused(f"nests modules more than {DEEPEST} deep")
    tensors: dict[str, Tensor] = {}
    children: dict[str, Network] = {}
    for part, key, value in _members(state, name):
        where = f"{name}.{key}"
        if id(value) in seen:
            raise Refused(f"holds {where} twice")
        seen.add(id(value))
        if part != "_modules":
            if type(value) is not Held or not isinstance(value.value, Tensor):
                raise Refused(f"holds a {kind(value)} at {where}, where a tensor belongs")
            tensors[key] = value.value
            continue
        below = value.state if isinstance(value, Module) else getattr(value, "state", None)
        if not isinstance(below, dict) or not (isinstance(value, Module) or kind(value) == "ModuleDict"):
            raise Refused(f"holds a {kind(value)} at {where}, where a module belongs")
        children[key] = _network(kind(value), below, where, seen, depth + 1)
        tensors |= {f"{key}.{rest}": tensor for rest, tensor in children[key].tensors.items()}
    return Network(class_name, _arguments(state, name), bool(state.get("_init_args")), tensors, children)


def _members(state: dict[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """Parameters, buffers and modules of a module's state: which of them, the member's name, the member."""
    for part in ("_parameters", "_buffers", "_modules"):
        members = state.get(part, {})
        if not isinstance(members, dict) or not all(isinstance(key, str) for key in members):
            raise Refused(f"has {part} at {name} that are no dict by name")
        yield from ((part, key, value) for key, value in members.items() if value is not None)


def _arguments(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The keywords that a module was constructed with."""
    arguments = state.get("_init_kwargs") or {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise Refused(f"has constructor arguments at {name} that are no keywords")
    return dict(arguments)
