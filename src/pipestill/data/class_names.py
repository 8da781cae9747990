"""Names for classes that a source only numbers, and by them the order of labels that a teacher expects.

ImageNet's archives number their classes in different orders; by synset they are the same. Reads the list of names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipestill.data.source import Source, in_order
from pipestill.errors import InputError
from pipestill.userfiles import read_text, unreadable


def renamed(source: Source, path: Path) -> Source:
    """The source with named classes in the order that folders of these names have, its labels renumbered to match.

    The list has a class a line: `name`, the first line for the lowest number; or `name number …` as in ImageNet's
    map_clsloc.txt (`n02119789 1 kit_fox`). Raises InputError where it does not fit the source.
    """
    names = _read(path)
    if len(names) != len(source.classes):
        raise InputError(
            f"data.class_names={path} names {len(names)} classes, the images have labels for {len(source.classes)}"
        )
    classes = in_order(names)
    place = np.array([classes.index(name) for name in names], dtype=np.int64)
    files = source.files | {f"class names/{path.name}": path}  # so that the digest of the source covers them
    return replace(source, labels=place[source.labels], classes=classes, files=files)


def _read(path: Path) -> list[str]:
    """Names in the order of the source's numbers. Raises InputError."""
    try:
        lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise unreadable(f"data.class_names={path}", error) from None
    except UnicodeDecodeError:
        raise InputError(f"data.class_names={path} cannot be read (it is not UTF-8 text)") from None
    numbered = [len(words) > 1 and words[1].isdecimal() for words in lines]
    if any(numbered) and not all(numbered):
        line = numbered.index(False) + 1
        raise InputError(f"data.class_names={path}: line {line} has no number after its name, others have")
    if all(numbered) and lines:
        lines.sort(key=lambda words: int(words[1]))
        numbers = [int(words[1]) for words in lines]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise InputError(f"data.class_names={path}: its numbers are not consecutive, each once")
    names = [words[0] for words in lines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"data.class_names={path} names '{twice[0]}' twice")
    return names
