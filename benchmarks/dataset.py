"""Build and read rate of a dataset, side by side with torchvision's ImageFolder and webdataset in one run.

    python benchmarks/dataset.py --output runs/benchmarks/dataset.json

The images are crops of scikit-image's colour photographs, as PNGs by class. Every reader gives shuffled batches of 128
float32 images in [-1, 1] with labels; the files are in the page cache for all of them. Each figure is the median of
`--repeats` rounds in which the readers take turns. Needs the `peers` extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

BATCH = 128
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
Read = Callable[[], Iterator[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading for each figure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pipestill-benchmark-") as folder:
        os.chdir(folder)
        photos = write_photos(Path("photos"), options.images, options.side)
        builds: dict[str, list[float]] = {name: [] for name in BUILDERS}
        for _ in range(options.repeats):
            for name, builder in BUILDERS.items():
                started = time.perf_counter()
                builder(photos, options.side, options.workers)
                builds[name].append(options.images / (time.perf_counter() - started))
        readers = make_readers(photos, options.workers)
        reads: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, read in readers.items():
                reads[name].append(rate(read, options.seconds))
        bytes_stored = {
            "PNG files": sum(file.stat().st_size for file in photos.rglob("*.png")),
            "pipestill": Path("built/images.lmdb").stat().st_size,
            "webdataset": sum(file.stat().st_size for file in Path("shards").iterdir()),
        }
    figures = {
        "images": options.images,
        "side": options.side,
        "workers": options.workers,
        "cores": len(os.sched_getaffinity(0)),
        "build_images_per_second": medians(builds),
        "read_images_per_second": medians(reads),
        "bytes": bytes_stored,
    }
    show("build", figures["build_images_per_second"], "webdataset, pack only")
    show("read", figures["read_images_per_second"], f"ImageFolder, {options.workers} workers")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def write_photos(root: Path, count: int, side: int) -> Path:
    """Crops at random places, one class a photograph."""
    from skimage import data

    generator = np.random.default_rng(0)
    for index, name in enumerate(islice(cycle(PHOTOGRAPHS), count)):
        photograph = getattr(data, name)()
        row, column = (int(generator.integers(0, size - side)) for size in photograph.shape[:2])
        file = root / name / f"{index:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[row : row + side, column : column + side]).save(file)
    return root


# ---- builds ----


def build_pipestill(photos: Path, side: int, workers: int) -> None:
    """The whole command: start, digests of all files, decoding, validation, the store, the report."""
    shutil.rmtree("built", ignore_errors=True)
    shutil.rmtree("runs", ignore_errors=True)
    settings = [f"data.path={photos}", f"data.resolution={side}", "data.transform=none", "data.color=rgb"]
    settings += ["data.split.validation=0", "data.split.test=0", f"operation.workers={workers}"]
    command = [sys.executable, "-m", "pipestill", "dataset", "--output", "built", *settings]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def build_webdataset(photos: Path, side: int, workers: int) -> None:
    """Packs the files as they are into tar shards; decodes nothing, checks nothing."""
    import webdataset

    shutil.rmtree("shards", ignore_errors=True)
    Path("shards").mkdir()
    classes = sorted(folder.name for folder in photos.iterdir())
    with webdataset.ShardWriter("shards/%05d.tar", maxcount=1000, verbose=0) as writer:
        for file in np.random.default_rng(0).permutation(sorted(photos.rglob("*.png"))):
            label = classes.index(file.parent.name)
            writer.write({"__key__": file.stem, "png": file.read_bytes(), "cls": str(label)})


def scan_imagefolder(photos: Path, side: int, workers: int) -> None:
    """Lists the files and decodes each once, in worker processes: what a check of a folder needs at least."""
    for _ in imagefolder(photos, workers, shuffle=False)():
        pass


BUILDERS: dict[str, Callable[[Path, int, int], None]] = {
    "pipestill dataset": build_pipestill,
    "webdataset, pack only": build_webdataset,
    "ImageFolder, decode once": scan_imagefolder,
}


# ---- readers ----


def make_readers(photos: Path, workers: int) -> dict[str, Read]:
    readers: dict[str, Read] = {}
    for cache in ("none", "host", "device"):
        readers[f"pipestill, cache {cache}, no workers"] = pipestill(cache)
    readers["ImageFolder, no workers"] = imagefolder(photos, 0)
    readers[f"ImageFolder, {workers} workers"] = imagefolder(photos, workers)
    readers["webdataset, no workers"] = webdataset_reader(0)
    readers[f"webdataset, {workers} workers"] = webdataset_reader(workers)
    return readers


def pipestill(cache: Any) -> Read:
    from pipestill.data.loader import Loader
    from pipestill.data.store import open_dataset

    dataset = open_dataset(Path("built"))
    loader = Loader(dataset, "train", batch=BATCH, seed=0, cache=cache, device=torch.device("cpu"))
    return lambda: ((batch.images, batch.labels) for batch in map(loader.batch, itertools.count()))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """What torchvision's ToTensor and Normalize(0.5, 0.5) give."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def imagefolder(photos: Path, workers: int, *, shuffle: bool = True) -> Read:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(photos, transform=to_tensor)
    return lambda: iter(DataLoader(folder, BATCH, shuffle=shuffle, num_workers=workers))


def webdataset_reader(workers: int) -> Read:
    import webdataset

    shards = sorted(map(str, Path("shards").iterdir()))

    def read() -> Iterator[Any]:
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=len(shards))
            .shuffle(1000)
            .decode("pil")
            .to_tuple("png", "cls")
            .map_tuple(to_tensor, int)
            .batched(BATCH)
        )
        return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))

    return read


def rate(read: Read, seconds: float) -> float:
    """Images a second, the start of workers and the first batch aside; starts over where an epoch ends."""
    batches = (batch for _ in iter(int, 1) for batch in read())
    next(batches)
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        images, _ = next(batches)
        count += len(images)
    return count / spent


def medians(rates: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def show(what: str, rates: dict[str, float], against: str) -> None:
    print(f"\n| {what} | images/s | against {against} |\n| --- | ---: | ---: |")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value / rates[against]:.2f} |")


if __name__ == "__main__":
    main()
