"""What each figure makes of known faults: 500 real digits, spoilt in one way each, measured as a run's images are.

    python benchmarks/faults.py --output runs/benchmarks/faults.json

Builds the digits' dataset and reference in a temporary folder and prints a table for docs/stages/evaluate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from pipestill import mixes
from pipestill.config import DataParams, ExampleParams, OperationParams, ReferenceParams
from pipestill.data.store import Dataset, open_dataset
from pipestill.evaluation.matching import chosen, match
from pipestill.evaluation.measure import Figures, measure
from pipestill.evaluation.reference import Reference, open_reference
from pipestill.stages.dataset import build
from pipestill.stages.example import write_example
from pipestill.stages.reference import build_reference

Images = NDArray[np.uint8]
COUNT = 500
COLUMNS = (
    "fd_classifier",
    "fd_efficientnet_lite0",
    "precision_efficientnet_lite0",
    "recall_efficientnet_lite0",
    "class_accuracy",
    "diversity",
    "nearest_train_ratio",
)


def prepare(folder: Path) -> tuple[Dataset, Reference]:
    """The digits' dataset and reference, with the parameters of the demo."""
    os.environ["PIPESTILL_RUNS"] = str(folder / "runs")
    write_example(ExampleParams(kind="digits"), folder / "digits")
    params = DataParams(path=str(folder / "digits" / "images"), resolution=8, color="grey", transform="none")
    build(params, folder / "dataset")
    build_reference(
        ReferenceParams(),
        dataset=folder / "dataset",
        output=folder / "reference",
        operation=OperationParams(device="cpu"),
    )
    return open_dataset(folder / "dataset"), open_reference(folder / "reference")


def spoilt(data: Dataset) -> dict[str, tuple[Images, NDArray[np.int64]]]:
    """Images and the classes asked for, by fault."""
    train = data.split["train"]
    sizes = mixes.apportioned(data.train_counts, COUNT)
    rows = train[chosen(data.labels[train], sizes, seed=1, purpose="floor", draw=0).numpy()]
    images, labels = data.images(rows), data.labels[rows]
    noise = np.random.RandomState(0).randn(*images.shape) * 24

    def few(kept: int) -> Images:
        """So many images of each class, repeated."""
        members = [images[labels == index] for index in range(10)]
        return np.concatenate([np.resize(of_class[:kept], of_class.shape) for of_class in members])

    in_classes = np.sort(labels)
    return {
        "train images": (images, labels),
        "one image a class, repeated": (few(1), in_classes),
        "three images a class, repeated": (few(3), in_classes),
        "one class missing": (images[labels != 3], labels[labels != 3]),
        "noise of 24 grey levels": (np.clip(images + noise, 0, 255).astype(np.uint8), labels),
        "blurred (2x2 mean)": (uniform_filter(images, (1, 2, 2, 1)), labels),
        "wrong labels": (images, (labels + 1) % 10),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/faults.json"), metavar="FILE")
    options = parser.parse_args()
    output = options.output.absolute()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, reference = prepare(Path(folder))
        floor = reference.floor(COUNT, "balanced")
        found: dict[str, Figures] = {"floor": {key: floor[key] for key in COLUMNS}}
        for fault, (images, labels) in spoilt(data).items():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            features = {space: reference.extractor(space)(pixels) for space in reference.index.spaces}
            found[fault] = measure(reference, features, torch.from_numpy(labels), match=match(reference, "balanced"))
    print("| images | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for fault, figures in found.items():
        print(f"| {fault} | " + " | ".join(f"{figures[key]:.3g}" for key in COLUMNS) + " |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
