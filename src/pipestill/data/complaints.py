"""Many bad files with the same fault as one line: the reason, how many there are, and a few of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipestill.userfiles import escaped

EXAMPLES = 5  # names in the report; a printed line has three


def grouped(bad: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Faults by falling count: `reason`, `count` and `examples` (names), of files with `name` and `reason`.

    Reasons that differ only in numbers (sizes, say) are one fault; numbers that differ are written as N.
    """
    found: dict[str, list[Mapping[str, str]]] = {}
    for file in bad:
        found.setdefault(re.sub(r"\d+", "0", file["reason"]), []).append(file)
    faults = [
        {
            "reason": _common([file["reason"] for file in files]),
            "count": len(files),
            "examples": [file["name"] for file in files[:EXAMPLES]],
        }
        for files in found.values()
    ]
    return sorted(faults, key=lambda fault: (-fault["count"], fault["examples"][0]))


def _common(reasons: Sequence[str]) -> str:
    numbers = zip(*(re.findall(r"\d+", reason) for reason in reasons), strict=True)
    shown = iter([found[0] if len(set(found)) == 1 else "N" for found in numbers])
    return re.sub(r"\d+", lambda _: next(shown), reasons[0])


def line(fault: Mapping[str, Any]) -> str:
    """A fault in one line: `a.png is …`, or `1,000 files: is … (a.png, b.png, c.png, …)`."""
    names = [escaped(name) for name in fault["examples"]]
    if fault["count"] == 1:
        return f"{names[0]} {fault['reason']}"
    more = ", …" if fault["count"] > 3 else ""
    return f"{fault['count']:,} files: {fault['reason']} ({', '.join(names[:3])}{more})"
