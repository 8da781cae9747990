"""Measure a teacher's training: images a second over ranks, where an update's time goes, and what holds it up.

For each number of ranks it trains a little, once with the batch shared (strong scaling) and once with as many images a
rank as one alone has (weak), throws the weights away, and writes measurements.json and index.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import outputs, project
from pipestill.arguments import count, counts
from pipestill.errors import InputError, PipestillError, SurroundingsError
from pipestill.launch import Spread, start
from pipestill.outputs import Written
from pipestill.progress import say
from pipestill.stages.common import add_common, entry, load_params
from pipestill.stopping import handlers_kept
from pipestill.work import scratch

if TYPE_CHECKING:
    from pipestill.config import Params, TeacherParams

EXAMPLES = """\
  pipestill bench --name teacher --dataset artifacts/dataset --output bench --ranks 1,2
  pipestill bench --name teacher --dataset artifacts/dataset --output bench --ranks 1,2,4,8 --updates 100 \\
      teachers.teacher.training.batch=512 operation.cache=device
"""
SCALINGS = ("strong", "weak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, name="which entry of `teachers`")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="dataset artefact")
    parser.add_argument(
        "--output",
        type=Written(outputs.MEASUREMENTS),
        required=True,
        metavar="DIR",
        help="folder for the page and its figures",
    )
    parser.add_argument("--ranks", type=counts, default="1,2", metavar="N,N", help="numbers of ranks (default: 1,2)")
    parser.add_argument("--updates", type=count, default=20, metavar="N", help="updates a round, of five")
    parser.add_argument("--measure", choices=SCALINGS, help=argparse.SUPPRESS)  # what the ranks of one group are told


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    teacher = entry(params.teachers, options.name, "teachers")
    if teacher.network is None:
        raise InputError(f"teachers.{options.name} takes its network from {teacher.start}: measure that one")
    if options.measure is not None:
        _measure(options, params, teacher)
        return
    rows = []
    for ranks in options.ranks:
        for scaling in SCALINGS if ranks > 1 else SCALINGS[:1]:
            row = _measured(options, teacher, ranks, scaling)
            say(f"{scaling}, {ranks} ranks: {row['images_per_second']:.1f} images/s")
            rows.append(row)
    alone = [row | {"scaling": "weak"} for row in rows if row["ranks"] == 1]  # one rank is the start of both
    _write(options, params, teacher, [*rows, *alone])


def _measured(options: argparse.Namespace, teacher: TeacherParams, ranks: int, scaling: str) -> dict[str, Any]:
    """The measurement of one group of ranks, started for it."""
    batch = teacher.training.batch * (ranks if scaling == "weak" else 1)
    with scratch("bench") as folder:
        words = ["bench", "--name", options.name, "--dataset", str(options.dataset.absolute()), "--output", str(folder)]
        words += ["--ranks", str(ranks), "--updates", str(options.updates), "--measure", scaling]
        words += ["--params", str(options.params)] if options.params is not None else []
        words += [*options.overrides, f"teachers.{options.name}.training.batch={batch}"]
        with handlers_kept():  # a launch leaves its own
            code, message = start(Spread(ranks=ranks), words)
        if code:
            kind = next((kind for kind in PipestillError.__subclasses__() if kind.exit_code == code), SurroundingsError)
            raise kind(f"{ranks} ranks, {scaling} scaling: {message}")
        row: dict[str, Any] = json.loads(Path(folder, "row.json").read_text(encoding="utf-8"))
    return {"scaling": scaling} | row


def _measure(options: argparse.Namespace, params: Params, teacher: TeacherParams) -> None:
    """What each rank of one group does."""
    from pipestill import distributed
    from pipestill.data.store import open_dataset
    from pipestill.networks.unet import parameter_count
    from pipestill.sampling.preview import Previews
    from pipestill.stages.train import prepared
    from pipestill.training.measuring import measure
    from pipestill.training.tracking import Silent

    operation, training = params.operation, teacher.training
    with distributed.world(device=operation.device, threads=training.threads, timeout=operation.timeout) as world:
        data = open_dataset(options.dataset)
        trained, denoiser, card = prepared(teacher, data, world, operation.cache)
        with Previews(
            denoiser,
            card,
            trained.ema,
            operation.preview,
            folder=options.output / "previews",
            tracker=Silent(),
            world=world,
        ) as previews:
            label = f"{options.measure}, {world.size} ranks"
            found = measure(trained, previews, world, label=label, batch=training.batch, updates=options.updates)
        if world.leader:
            facts = {"parameters": parameter_count(denoiser.network), "device": _device(world.device.type)}
            body = asdict(found) | {"images_per_second": found.images_per_second} | facts
            Path(options.output, "row.json").write_text(json.dumps(body), encoding="utf-8")


def _device(kind: str) -> str:
    """The device's name, as its maker calls it."""
    import torch

    if kind == "cuda":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _write(options: argparse.Namespace, params: Params, teacher: TeacherParams, rows: list[dict[str, Any]]) -> None:
    from pipestill.reporting import scaling

    body = {
        "name": options.name,
        "command": shlex.join(["pipestill", *sys.argv[1:]]),
        "parameters": rows[0]["parameters"],
        "resolution": params.data.resolution,
        "precision": teacher.training.precision,
        "device": rows[0]["device"],
        "threads": teacher.training.threads,
        "updates": options.updates,
        "rows": rows,
    }
    with outputs.new_folder(options.output, outputs.MEASUREMENTS) as staging:
        (staging / "measurements.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        (staging / "index.html").write_text(scaling.render(body), encoding="utf-8")
    for line in scaling.words(rows):
        say(line)
    print(project.shown(options.output / "index.html", options.stood))
