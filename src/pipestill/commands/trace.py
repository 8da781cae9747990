"""Print the chain from a figure or an artefact back to the images, with every digest.

PATH is an artefact's folder, a file in one, or a file of metrics. Inputs are found by their digests among the project's
artefacts; --verify recomputes the digest of every file on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipestill import tracing

EXAMPLES = """\
  pipestill trace metrics/student-4.json
  pipestill trace --verify artifacts/samples/student-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="artefact, file in one, or metrics/RUN.json")
    parser.add_argument("--verify", action="store_true", help="recompute every file's digest")


def main(options: argparse.Namespace) -> None:
    root = Path.cwd()
    chain = tracing.trace(options.path, root)
    for line in tracing.lines(chain, root, verify=options.verify):
        print(line)
    if options.verify:
        print(tracing.verdict(chain))
