"""Sampling: images a second beside a Diffusers pipeline, and two ranks of which one is slowed fourfold.

    python benchmarks/sampling.py --output runs/benchmarks/sampling.json

The pipeline is Diffusers' own loop (EDMEulerScheduler) around the same UNet2DModel, latents, batch and number of
steps; both end with uint8 images in .npy files, and their images are compared. Each figure, the ratio too, is the
median of `--repeats` rounds in which the two take turns. The slowed rank sleeps three times as long as it computed,
after each block; the ideal is the time that ranks of the measured speeds would need if no moment were wasted. Start-up
is in no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from torch import Tensor

from pipestill.config import EdmParams, NetworkParams, RunParams
from pipestill.distributed import World, world
from pipestill.networks.model import ModelCard, wrap
from pipestill.networks.unet import build_unet, parameter_count
from pipestill.sampling import plan
from pipestill.sampling.items import latents
from pipestill.sampling.plan import Block
from pipestill.sampling.recipe import Recipe, settle
from pipestill.sampling.runner import read_blocks, run_blocks

CPU = torch.device("cpu")
CLASSES = tuple("0123456789")
NETWORKS = {  # resolution, channels of the images, network
    "8x8": (8, 1, NetworkParams(channels=(16, 32), layers=1)),
    "32x32": (32, 3, NetworkParams(channels=(32, 64, 64), layers=1, attention=(False, False, True))),
}
SLOWER = 4


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """A class-conditional pixel pipeline as Diffusers writes them (its DDPMPipeline with class labels)."""

    def __init__(self, unet: UNet2DModel, scheduler: EDMEulerScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels: Tensor, steps: int, noise: Tensor) -> np.ndarray:
        self.scheduler.set_timesteps(steps, device=self.device)
        sample = noise * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(sample, t)
            output = self.unet(scaled, t, class_labels=labels).sample
            sample = self.scheduler.step(output, t, sample).prev_sample
        image = (sample / 2 + 0.5).clamp(0, 1)
        pixels: np.ndarray = (image.cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
        return pixels


def build(name: str, steps: int) -> tuple[Any, Recipe]:
    """A denoiser with random weights, the same each time, and a recipe to sample it."""
    resolution, channels, network = NETWORKS[name]
    torch.manual_seed(0)
    unet = build_unet(network, resolution=resolution, channels=channels, classes=len(CLASSES)).eval()
    params = EdmParams()
    card = ModelCard("teacher", resolution, channels, CLASSES, True, params.plain())
    run = RunParams(model="teacher", sampler="euler", steps=steps, sigmas="models/teacher")
    return wrap(unet.requires_grad_(False), params), settle(run, card)


def ours(images: int, batch: int, folder: Path, group: World, compute: Any) -> float:
    """Seconds of the product's own runner for `images` images."""
    return run_blocks(
        compute,
        plan.blocks((0,), images, batch),
        np.arange(images) % len(CLASSES),
        micro_batch=batch,
        folder=folder,
        world=group,
        name=f"benchmark/{folder.name}",
    ).seconds


def sampled(denoiser: Any, recipe: Recipe) -> Any:
    def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        return recipe.sample(denoiser, seed=block.seed, items=items, labels=labels, device=CPU)

    return compute


def beside_diffusers(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of both, the ratio, and how far their images are apart."""
    batch, steps = options.batch, options.steps
    denoiser, recipe = build(name, steps)
    images = max(batch, options.images * 8 // recipe.card.resolution)
    own = EdmParams()
    pipeline = Pipeline(
        denoiser.network, EDMEulerScheduler(own.sigma_min, own.sigma_max, own.sigma_data, final_sigmas_type="zero")
    )
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.from_numpy(np.arange(images) % len(CLASSES))

    def peer(target: Path) -> float:
        target.mkdir()
        started = time.perf_counter()
        for first in range(0, images, batch):
            items = torch.arange(first, min(first + batch, images))
            made = pipeline(labels[items], steps, latents(0, items, recipe.shape))
            np.save(target / f"{first:06d}.npy", made)
        return time.perf_counter() - started

    group = World(0, 1, CPU)
    seconds: dict[str, list[float]] = {"pipestill": [], "diffusers": []}
    for turn in range(options.repeats + 1):  # the first one warms up
        a = ours(images, batch, folder / f"ours-{turn}", group, sampled(denoiser, recipe))
        b = peer(folder / f"peer-{turn}")
        if turn:
            seconds["pipestill"].append(a)
            seconds["diffusers"].append(b)
    side, channels = recipe.card.resolution, recipe.card.channels
    blocks = plan.blocks((0,), images, batch)
    made = np.concatenate(list(read_blocks(folder / "ours-0", blocks, (side, side, channels))))
    theirs = np.concatenate([np.load(path) for path in sorted((folder / "peer-0").iterdir())])
    rates = {who: round(images / statistics.median(times), 1) for who, times in seconds.items()}
    ratios = [theirs_took / took for took, theirs_took in zip(*seconds.values(), strict=True)]
    return {
        "parameters": parameter_count(denoiser.network),
        "images": images,
        "batch": batch,
        "steps": steps,
        "images_per_second": rates,
        "ratio": round(statistics.median(ratios), 3),
        "levels_apart_at_most": int(np.abs(made.astype(int) - theirs.astype(int)).max()),
    }


def slowed(slow_rank: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of two ranks of which one is slowed, against the ideal for the speeds that they showed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--rank-of", str(folder), "--slow-rank", str(slow_rank)]
    command += ["--slow-images", str(options.slow_images), "--batch", str(options.batch), "--steps", str(options.steps)]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    if any(rank.wait() for rank in ranks):
        raise SystemExit("a rank failed: see its output above")
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def as_rank(options: argparse.Namespace) -> None:
    """One of two ranks; the leader leaves the figures."""
    with world(device="cpu", threads=1) as group:
        denoiser, recipe = build("8x8", options.steps)
        plain, own = sampled(denoiser, recipe), []
        plain(Block(0, 0, options.batch), torch.arange(options.batch), torch.zeros(options.batch, dtype=torch.int64))

        def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
            started = time.perf_counter()
            x0: Tensor = plain(block, items, labels)
            if group.rank == options.slow_rank:
                time.sleep((SLOWER - 1) * (time.perf_counter() - started))
            own.append(time.perf_counter() - started)
            return x0

        folder = Path(options.rank_of)
        taken = ours(options.slow_images, options.batch, folder / "blocks", group, compute)
        each = group.gather((len(own), statistics.mean(own)))
        blocks = sum(count for count, _ in each)
        ideal = blocks / sum(1 / seconds for _, seconds in each)
        figures = {
            "images": options.slow_images,
            "slow_rank": options.slow_rank,
            "blocks_by_rank": [count for count, _ in each],
            "seconds_a_block_by_rank": [round(seconds, 4) for _, seconds in each],
            "seconds": round(taken, 3),
            "ideal_seconds": round(ideal, 3),
            "over_ideal": round(taken / ideal, 3),
            "equal_shares_over_ideal": round(max(blocks / 2 * seconds for _, seconds in each) / ideal, 3),
        }
        if group.leader:
            (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="of 8x8; fewer of larger ones")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-images", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--slow-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        as_rank(options)
        return
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"beside_diffusers": {}, "one_rank_slowed_fourfold": []}
    with tempfile.TemporaryDirectory(prefix="pipestill-benchmark-") as name:
        for network in NETWORKS:
            folder = Path(name, network)
            folder.mkdir()
            figures["beside_diffusers"][network] = beside_diffusers(network, options, folder)
        for slow_rank in (0, 1):
            folder = Path(name, f"slow-{slow_rank}")
            folder.mkdir()
            figures["one_rank_slowed_fourfold"].append(slowed(slow_rank, options, folder))
    text = json.dumps(figures, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
