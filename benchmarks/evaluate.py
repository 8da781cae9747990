"""Seconds from 10,000 images to the distance: `pipestill evaluate` beside torch-fidelity's command, in one run.

    python benchmarks/evaluate.py --output runs/benchmarks/evaluate.json

Both measure the same synthetic images by the same extractor (EfficientNet-Lite0, registered with torch-fidelity), as
whole commands with start-up, one thread a process. The real side is ready for both: a reference artefact for ours, a
cache of statistics (`--input2-cache-name`) for torch-fidelity. Ours reads a samples artefact, torch-fidelity a folder
of PNGs, which is how its command takes images. In `one process`, torch-fidelity decodes in its own process
(`--save-cpu-ram`); in `two cores`, it has its four decoding workers and ours two ranks. Ours always computes KID,
precision, recall and nearest training images too; torch-fidelity the distance alone (`--fid`), or, in `all figures`,
KID, precision and recall with the same settings. Each figure is the median of `--repeats` rounds in which the commands
take turns; CPU seconds (of a command and all its children) tell more than the clock where other work shares the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill import artifacts
from pipestill.artifacts import Manifest
from pipestill.data.store import Layout, write_dataset
from pipestill.sampling.store import write_samples

KEY, REAL = "fd_efficientnet_lite0", 2000
ALL = [
    "--kid",
    "--prc",
    "--kid-subsets",
    "50",
    "--kid-subset-size",
    "100",
    "--prc-neighborhood",
    "3",
    "--rng-seed",
    "0",
]
Seconds = tuple[float, float]  # by the clock, of CPU
PEER = """
import sys, torch
torch.set_num_threads(1)
from pipestill.evaluation.extractors import efficientnet_lite0
from pipestill.evaluation.fidelity import register
register("efficientnet-lite0", efficientnet_lite0, torch.float64)
from torch_fidelity.fidelity import main
sys.exit(main())
"""


def waves(count: int, side: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Noisy waves of random direction and phase, uint8 [count, side, side, channels]."""
    rng = np.random.RandomState(seed)
    row, column = np.mgrid[:side, :side]
    angle, phase, step = rng.rand(3, count, 1, 1)
    along = (np.cos(np.pi * angle) * row + np.sin(np.pi * angle) * column) * (0.4 + step)
    bright = 128 + 80 * np.sin(along + 2 * np.pi * phase)
    noisy: NDArray[np.float64] = np.clip(bright[..., None] + 10 * rng.randn(count, side, side, channels), 0, 255)
    return noisy.astype(np.uint8)


def publish(staging: Path, final: Path, kind: str) -> None:
    artifacts.publish(staging, final, Manifest(kind, "benchmark", 1, {}, {}, artifacts.describe_files(staging)))


def write_pngs(folder: Path, images: NDArray[np.uint8]) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{number:06d}.png")


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The same images in both forms, and our reference of the real ones (which is not timed)."""
    images = waves(options.images, options.side, options.channels, seed=0)
    real = waves(options.images + REAL, options.side, options.channels, seed=1)  # the floor is drawn from as many
    parts = np.repeat(np.array([0, 2], np.uint8), [options.images, REAL])
    (folder / "staging").mkdir()
    write_dataset(
        folder / "staging",
        [real],
        Layout(len(real), options.side, options.channels, len(real)),
        classes=(),
        labels=np.full(len(real), -1, np.int64),
        parts=parts,
        names=[str(number) for number in range(len(real))],
        digests=np.zeros((len(real), 32), np.uint8),
    )
    publish(folder / "staging", folder / "dataset", "dataset")
    (folder / "staging").mkdir()
    index = {"seeds": [0], "images_per_seed": len(images), "classes": [], "evaluations": 1, "guidance": 1.0}
    labels = np.full(len(images), -1, np.int64)
    write_samples(folder / "staging", [images], labels=labels, shape=images.shape[1:], index=index)
    publish(folder / "staging", folder / "samples", "samples")
    write_pngs(folder / "generated", images)
    write_pngs(folder / "real", real[options.images :])


def cpu_seconds() -> float:
    """CPU time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str], runs: Path) -> tuple[Seconds, str]:
    """Seconds of a whole command by the clock and of CPU, and what it printed."""
    variables = os.environ | {"PIPESTILL_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    started, used = time.perf_counter(), cpu_seconds()
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return (time.perf_counter() - started, cpu_seconds() - used), done.stdout


def ours(folder: Path, turn: str, ranks: int) -> tuple[Seconds, float]:
    """Seconds and the distance of `pipestill evaluate`."""
    output = folder / f"evaluation-{turn}"
    command = [sys.executable, "-m", "pipestill", "evaluate", "--name", "run", "--output", str(output)]
    command += ["--samples", str(folder / "samples"), "--reference", str(folder / "reference")]
    seconds, _ = timed([*command, "--ranks", str(ranks), "operation.device=cpu"], folder / f"runs-{turn}")
    return seconds, float(json.loads((output / "metrics.json").read_text(encoding="utf-8"))[KEY])


def peer(folder: Path, *more: str) -> tuple[Seconds, float]:
    """Seconds and the distance of torch-fidelity's command."""
    command = [
        sys.executable,
        "-c",
        PEER,
        "--cpu",
        "--fid",
        "--json",
        "--silent",
        "--input1",
        str(folder / "generated"),
    ]
    command += ["--input2", str(folder / "real"), "--input2-cache-name", "real", "--cache-root", str(folder / "cache")]
    seconds, said = timed([*command, "--feature-extractor", "efficientnet-lite0", *more], folder)
    return seconds, float(json.loads(said)["frechet_inception_distance"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipestill-benchmark-") as name:
        folder = Path(name)
        prepare(folder, options)
        build = ["reference", "--dataset", str(folder / "dataset"), "--output", str(folder / "reference")]
        build += ["operation.device=cpu", "reference.protocol.extractors=[efficientnet_lite0]", "sampling.runs={}"]
        build += [
            "tune={}",
            "distillation.students={}",
            f"reference.floor.counts=[{options.images}]",
            "reference.floor.draws=1",
        ]
        print("preparing the reference of both", file=sys.stderr)
        timed([sys.executable, "-m", "pipestill", *build], folder / "runs")
        peer(folder)  # fills its cache of the real side
        contenders = {
            "one process": (1, ["--save-cpu-ram"]),
            "one process, all figures": (1, ["--save-cpu-ram", *ALL]),
            "two cores": (2, []),
        }
        figures: dict[str, Any] = {"images": options.images, "side": options.side, "channels": options.channels}
        for case, (ranks, more) in contenders.items():
            seconds: dict[str, list[Seconds]] = {"pipestill": [], "torch-fidelity": []}
            for turn in range(options.repeats):
                a, distance = ours(folder, f"{case}-{turn}", ranks)
                b, other = peer(folder, *more)
                seconds["pipestill"].append(a)
                seconds["torch-fidelity"].append(b)
                print(f"{case}: pipestill {a[0]:.1f} s, torch-fidelity {b[0]:.1f} s", file=sys.stderr)
            figures[case] = {}
            for kind, of in (("seconds", 0), ("cpu_seconds", 1)):
                medians = {who: statistics.median(times[of] for times in taken) for who, taken in seconds.items()}
                figures[case][kind] = {who: round(value, 2) for who, value in medians.items()}
                figures[case][f"{kind}_ratio"] = round(medians["torch-fidelity"] / medians["pipestill"], 3)
            figures[case] |= {
                "distances": {"pipestill": distance, "torch-fidelity": other},
                "relative_difference": abs(distance / other - 1),
            }
    text = json.dumps(figures, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
