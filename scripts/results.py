"""Writes the results of metrics/*.json into README.md, between its marks, as a table.

    python scripts/results.py            # write it
    python scripts/results.py --check    # only say whether it is current (exit 1 if it is not)

Runs, columns and order are those of `pipestill report --print-table`, without times. Nothing is written if a metrics
file does not belong to the artefacts that are there now; `--committed` trusts the files, for a clone without artefacts.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pipestill.errors import InputError
from pipestill.reporting import figures
from pipestill.reporting.table import TIME, table

ROOT = Path(__file__).resolve().parent.parent
BEFORE, AFTER = "<!-- results -->", "<!-- /results -->"
HEADS = {"": "run", "class_accuracy": "class accuracy", "diversity": "diversity"}
NONE = "No results are committed yet: `make demo` makes them."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README.md is not current")
    parser.add_argument("--committed", action="store_true", help="do not compare the metrics with artefacts")
    parser.add_argument("--metrics", type=Path, default=ROOT / "metrics", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    try:
        wanted = filled(text, results(options.metrics, judge=not options.committed))
    except InputError as error:
        raise SystemExit(f"results.py: {error}") from None
    if options.check or wanted == text:
        print(f"{options.readme.name} is {'current' if wanted == text else 'not current: python scripts/results.py'}")
        return int(wanted != text)
    options.readme.write_text(wanted, encoding="utf-8")
    print(f"wrote the results of {options.metrics.name}/ into {options.readme.name}")
    return 0


def results(folder: Path, *, judge: bool = True) -> str:
    """The Markdown table of a folder of metrics; one line that says so if there are none.

    Raises InputError if a file does not belong to the artefacts that are there now.
    """
    if not any(folder.glob("*.json")):
        return NONE
    found = table(folder, judge=judge)
    for name, note in zip(found.columns[0][1], found.notes, strict=True):
        if note is not None:
            raise InputError(f"{name}: {note} (--committed takes the files as they are)")
    made = [(head, cells) for head, cells in found.columns if head != TIME]
    heads = [_head(key) for key, _ in made]
    aligned = ["---"] + ["---:"] * (len(made) - 1)
    rows = zip(*(cells for _, cells in made), strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, aligned, *rows])


def filled(text: str, block: str) -> str:
    """The page with `block` between the marks."""
    pattern = re.compile(f"{re.escape(BEFORE)}.*?{re.escape(AFTER)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"the page must hold {BEFORE} … {AFTER} once")
    return pattern.sub(lambda _: f"{BEFORE}\n{block}\n{AFTER}", text)


def _head(key: str) -> str:
    if key.startswith("fd_"):
        return f"distance, {figures.extractor_title(key.removeprefix('fd_'))}"
    return HEADS.get(key, key)


if __name__ == "__main__":
    raise SystemExit(main())
