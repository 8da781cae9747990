"""The provenance chain as the page shows it: artefacts by group, each with what it was made from, down to the images.

Pure functions of a report's body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Link = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One artefact or outside file on the way down; `via` is the name under which it went in."""

    via: str
    name: str
    payload: str
    anchor: str
    inputs: tuple[Node, ...] = ()
    seen: bool = False  # its inputs have been listed before


@dataclass(frozen=True)
class Group:
    title: str
    links: tuple[Mapping[str, Any], ...]


def groups(chain: Sequence[Link]) -> list[Group]:
    """The chain's artefacts by the folder they stand in, upstream first, each with its anchor and its descent."""
    by_payload = {link["payload"]: link for link in reversed(chain)}
    members: dict[str, list[Mapping[str, Any]]] = {}
    for link in chain:
        below = tuple(_descend(name, entry, by_payload, set()) for name, entry in link["inputs"].items())
        members.setdefault(link["name"].partition("/")[0], []).append(
            dict(link) | {"anchor": anchor(link), "descent": below}
        )
    return [Group(title.capitalize(), tuple(links)) for title, links in members.items()]


def anchor(link: Link) -> str:
    """The id of an artefact on the page."""
    return f"artefact-{link['name'].replace('/', '-')}"


def _descend(via: str, entry: Mapping[str, str], by_payload: Mapping[str, Link], seen: set[str]) -> Node:
    link = by_payload.get(entry["payload"])
    if link is None:
        return Node(via, entry["kind"], entry["payload"], "")
    known = link["payload"] in seen
    seen.add(link["payload"])
    below = () if known else tuple(_descend(name, each, by_payload, seen) for name, each in link["inputs"].items())
    return Node(via, link["name"], link["payload"], anchor(link), below, seen=known)
