"""Distillation, sampling and measuring at full size with random weights: throughput, peak memory, share of the floor.

    python benchmarks/gpu.py --output runs/benchmarks/gpu.json            # one GPU: NVIDIA's ImageNet-64 network
    python benchmarks/gpu.py --small --output runs/benchmarks/small.json  # a CPU: a small network

(a) a turn of DMD2 at ten steps (generator, five fake-score updates, GAN), for each rollout and batch; (b) sampling at
ten steps and at 79 evaluations; (c) features and moments. Each beside its straightforward form in the same run: the
same networks in eager fp32 (TF32 products on a GPU), nothing compiled, `rollout: fresh`. `share` is the time that the
counted operations take at the measured rate of large matrix products in bf16, over the time taken. Figures are medians.
On a CPU peak memory is that of the process and grows only.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipestill import counter
from pipestill.config import EdmParams, GanParams, OptimizerParams, PoolParams, StudentParams
from pipestill.config.fields import Precision
from pipestill.config.students import Rollout
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.diffusion.schedules import karras
from pipestill.distillation.discriminator import FakeScore, build_head
from pipestill.distillation.dmd2 import Distillation
from pipestill.distributed import World
from pipestill.evaluation.extractors import efficientnet_lite0
from pipestill.evaluation.moments import Moments
from pipestill.networks import adm
from pipestill.networks.adm import Adm
from pipestill.networks.model import ModelCard, NativeSchedule, wrap
from pipestill.sampling.items import sample_items
from pipestill.training.ranks import autocast_type, prepare

FULL = Adm(64, 3, 1000, 192, (1, 2, 3, 4), 768, 3, (False, True, True, True))
SMALL = Adm(16, 3, 10, 32, (1, 2), 128, 1, (False, True))


class RealImages:
    """A batch of random real images, already on the device."""

    def __init__(self, layout: Adm, batch: int, device: torch.device) -> None:
        self.positions = torch.arange(batch, device=device)
        self.images = torch.rand(batch, layout.channels, layout.resolution, layout.resolution, device=device) * 2 - 1
        self.labels = self.positions % layout.classes

    def batch(self, step: int) -> RealImages:
        return self


class NoValidation:
    def distance(self, student: object, ema: object) -> float:
        return 0.0


class Bench:
    """One layout on one device; every measurement is timed the same way."""

    def __init__(self, layout: Adm, device: torch.device, repeats: int) -> None:
        self.layout, self.device, self.repeats = layout, device, repeats
        self.world = World(0, 1, device)
        classes = tuple(f"n{index:08d}" for index in range(layout.classes))
        native = NativeSchedule(10, "renoise", 80.0, 0.002, 7.0)
        self.card = ModelCard(
            "student", layout.resolution, layout.channels, classes, False, EdmParams().plain(), native
        )
        torch.manual_seed(0)
        self.network = adm.build(layout)
        self.rate = self.matrix_rate()

    def matrix_rate(self) -> float:
        """Operations a second of large bf16 matrix products on this device."""
        side = 8192 if self.device.type == "cuda" else 1024
        first, second = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = self.seconds(lambda: first @ second, warm=3)
        return 2 * side**3 / seconds

    def seconds(self, work: Callable[[], object], *, warm: int = 1) -> float:
        for _ in range(warm):
            work()
        taken = []
        for _ in range(self.repeats):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measured(self, work: Callable[[], object], units: int, floor: float) -> dict[str, Any]:
        """Units a second, peak memory, and the counted operations' share of the time."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(work)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "seconds": round(seconds, 4),
            "per_second": round(units / seconds, 3),
            "peak_gib": round(peak, 2),
            "share": round(floor / self.rate / seconds, 3),
        }

    def operations(self, work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counted:
            work()
        return float(counted.get_total_flops())

    # --- what is measured ---------------------------------------------------------------------------------------

    def distillation(self, *, batch: int, rollout: Rollout, precision: Precision, compiled: bool) -> Distillation:
        params = StudentParams(
            teacher="edm",
            init="edm",
            steps=10,
            transition="renoise",
            sigma_max=80.0,
            sigma_min=0.002,
            update_ratio=5,
            rollout=rollout,
            batch=batch,
            generator_lr=2e-6,
            fake_score_lr=2e-6,
            optimizer=OptimizerParams(betas=(0.9, 0.999), warmup=0),
            label_dropout=0.0,
            gan=GanParams(generator_weight=3e-3, discriminator_weight=1e-2),
            precision=precision,
            compile=compiled,
            deterministic=False,
        )
        autocast = autocast_type(params.precision)
        networks = [wrap(copy.deepcopy(self.network), EdmParams(), autocast) for _ in range(3)]
        teacher, student, score = networks
        teacher.requires_grad_(False).eval()
        for network in networks:
            prepare(network, params, self.world)
        fake = FakeScore(score, build_head(score).to(self.device), score)
        return Distillation(
            student=student,
            teacher=teacher,
            fake=fake,
            card=self.card,
            params=params,
            loader=RealImages(self.layout, batch, self.device),  # type: ignore[arg-type]
            validation=NoValidation(),  # type: ignore[arg-type]
            world=self.world,
            train_images=batch,
        )

    def turn(self, *, batch: int, rollout: Rollout, precision: Precision, compiled: bool) -> dict[str, Any]:
        """Updates, each of a generator's step and five of the fake score; of a pool, as many as one filling serves."""
        training = self.distillation(batch=batch, rollout=rollout, precision=precision, compiled=compiled)
        together = PoolParams().updates if rollout == "pool" else 1
        starts = iter(range(0, 100_000, together))

        def work() -> None:
            first = next(starts)
            for step in range(first, first + together):
                training.update(step)

        return self.measured(work, together * 5 * training.states, self.operations(work))

    def sampling(self, *, batch: int, sampler: str, steps: int, precision: Precision, compiled: bool) -> dict[str, Any]:
        denoiser = wrap(copy.deepcopy(self.network).eval(), EdmParams(), autocast_type(precision))
        denoiser.requires_grad_(False)
        settings = StudentParams(teacher="t", init="t", steps=1, compile=compiled, deterministic=False)
        prepare(denoiser, settings, self.world)
        items = torch.arange(batch)
        labels = (items % self.layout.classes).to(self.device)

        def work() -> Tensor:
            return sample_items(
                denoiser,
                sampler=SAMPLERS[sampler],
                sigmas=karras(steps, 0.002, 80.0, 7.0),
                condition=self.card.condition(labels),
                seed=0,
                items=items,
                shape=(self.layout.channels, self.layout.resolution, self.layout.resolution),
                device=self.device,
            )

        with torch.no_grad():
            return self.measured(work, batch, self.operations(work))

    def features(self, *, images: int) -> dict[str, Any]:
        """EfficientNet-Lite0's features and their moments; Inception's weights are not in any package."""
        extractor = efficientnet_lite0(self.device)
        pixels = counter.uniform(0, "bench", torch.arange(1000), (self.layout.channels, 64, 64))
        blocks = (pixels * 255).to(torch.uint8).to(self.device)

        def work() -> Moments:
            table = torch.cat([extractor(blocks[: min(1000, images - first)]) for first in range(0, images, 1000)])
            return Moments.of(table)

        begun = time.perf_counter()
        work()
        self.wait()
        seconds = time.perf_counter() - begun
        return {"images": images, "seconds": round(seconds, 2), "per_second": round(images / seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    parser.add_argument("--small", action="store_true", help="half a million parameters and small batches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the networks in ours")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(SMALL if options.small else FULL, device, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "parameters": sum(tensor.numel() for tensor in bench.network.parameters()),
        "bf16_matrix_tflops": round(bench.rate / 1e12, 2),
    }

    def record(group: str, key: str, figures: dict[str, Any]) -> None:
        results.setdefault(group, {})[key] = figures
        print(f"{group}, {key}: {json.dumps(figures)}", flush=True)

    for batch in (8, 16) if options.small else (32, 64):
        turns: list[tuple[str, Rollout, Precision, bool]] = [
            ("straightforward", "fresh", "fp32", False),
            ("fresh", "fresh", "bf16", options.compile),
            ("every_step", "every_step", "bf16", options.compile),
            ("pool", "pool", "bf16", options.compile),
        ]
        for key, rollout, precision, compiled in turns:
            figures = bench.turn(batch=batch, rollout=rollout, precision=precision, compiled=compiled)
            record(f"DMD2 turn, batch {batch}, states a second", key, figures)
    for sampler, steps, title in (("renoise", 10, "10 steps"), ("heun", 40, "79 evaluations")):
        batch = 16 if options.small else 128
        ways: list[tuple[str, Precision, bool]] = [
            ("straightforward", "fp32", False),
            ("ours", "bf16", options.compile),
        ]
        for key, precision, compiled in ways:
            figures = bench.sampling(batch=batch, sampler=sampler, steps=steps, precision=precision, compiled=compiled)
            record(f"sampling, {title}, images a second", key, figures)
    record("features and moments", "efficientnet_lite0", bench.features(images=2000 if options.small else 50_000))
    for group, figures in results.items():
        if isinstance(figures, dict) and "straightforward" in figures:
            base = figures["straightforward"]["per_second"]
            ratios = {key: round(found["per_second"] / base, 2) for key, found in figures.items()}
            results[group]["ratio"] = ratios
            print(f"{group}, ratio: {json.dumps(ratios)}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
