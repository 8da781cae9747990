"""Distillation, sampling and measuring at full size with random weights: throughput, peak memory, share of the floor.

    python benchmarks/gpu.py --output runs/benchmarks/gpu.json            # one GPU: NVIDIA's ImageNet-64 network
    python benchmarks/gpu.py --small --output runs/benchmarks/small.json  # a CPU: a small network
    python benchmarks/gpu.py --only distill sample --compile --minutes 5  # two parts, compiled, in five minutes

The parts: `distill`, a DMD2 iteration at ten steps (one generator update, five fake-score updates, GAN) for each
rollout and batch size; `sample`, ten steps and 79 evaluations; `features`, EfficientNet-Lite0's features and their
moments. Each is measured beside its straightforward form in the same run: the same networks in eager fp32 (TF32
products on a GPU), nothing compiled, `rollout: fresh`. `first` is the first call in seconds, with everything that is
tried or compiled in it; `share` is the time that the counted operations take at the measured rate of large matrix
products in bf16, over the time taken. The figures are medians, written as they come. On a CPU, peak memory is that of
the process and only grows.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
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
PARTS = ("distill", "sample", "features")
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

    def seconds(self, work: Callable[[], object], *, warm: int = 0) -> float:
        for _ in range(warm):
            work()
        return statistics.median(self.once(work) for _ in range(self.repeats))

    def once(self, work: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measured(self, work: Callable[[], object], units: int, count: Callable[[], float] | None) -> dict[str, Any]:
        """The first call, units per second, peak memory, and the counted operations' share of the time."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.once(work)
        seconds = self.seconds(work)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures = {
            "first": round(first, 2),
            "seconds": round(seconds, 4),
            "per_second": round(units / seconds, 3),
            "peak_gib": round(peak, 2),
        }
        return figures if count is None else figures | {"share": round(count() / self.rate / seconds, 3)}

    def operations(self, work: Callable[[], object]) -> float:
        """Floating-point operations of one call in eager mode; no algorithms are tried for them."""
        with torch.backends.cudnn.flags(benchmark=False), FlopCounterMode(display=False) as counted:
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
            mix=np.ones(len(self.card.classes), dtype=np.int64),
        )

    def iteration(self, *, batch: int, rollout: Rollout, precision: Precision, compiled: bool) -> dict[str, Any]:
        """One generator update and five of the fake score; with a pool, as many of these as one filling serves."""
        training = self.distillation(batch=batch, rollout=rollout, precision=precision, compiled=compiled)
        together = PoolParams().updates if rollout == "pool" else 1
        starts = iter(range(0, 100_000, together))

        def work() -> None:
            first = next(starts)
            for step in range(first, first + together):
                training.update(step)

        count = None if compiled else functools.partial(self.operations, work)
        return self.measured(work, together * 5 * training.states, count)

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
            return self.measured(work, batch, None if compiled else functools.partial(self.operations, work))

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
    parser.add_argument("--output", type=Path, help="write the results there as JSON, after each figure")
    parser.add_argument("--small", action="store_true", help="half a million parameters and small batches")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes of distillation (default: 32 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per figure (default: 3)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no figure after so many minutes")
    parser.add_argument("--compile", action="store_true", help="measure each way compiled as well")
    options = parser.parse_args()
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(SMALL if options.small else FULL, device, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "parameters": sum(tensor.numel() for tensor in bench.network.parameters()),
        "bf16_matrix_tflops": round(bench.rate / 1e12, 2),
    }
    print(json.dumps(results), flush=True)
    for group, key, measure in figures_of(bench, options):
        if time.monotonic() - begun > 60 * options.minutes:
            print(f"out of time: not measured: {group}, {key}")
            continue
        found = measure()
        rows = results.setdefault(group, {})
        rows[key] = found
        if "straightforward" in rows:
            found["ratio"] = round(found["per_second"] / rows["straightforward"]["per_second"], 2)
        print(f"{group}, {key}: {json.dumps(found)}", flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def figures_of(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """What is to be measured, in order: the group, the way, and what measures it."""
    compiled = (False, True) if options.compile else (False,)
    if "distill" in options.only:
        rollouts: tuple[Rollout, ...] = ("fresh", "every_step", "pool")
        for batch in options.batch or ((8, 16) if options.small else (32, 64)):
            group = f"DMD2 iteration, batch {batch}, student states per second"
            iteration = functools.partial(bench.iteration, batch=batch)
            plain = functools.partial(iteration, rollout="fresh", precision="fp32", compiled=False)
            yield group, "straightforward", plain
            for way, rollout in itertools.product(compiled, rollouts):
                measure = functools.partial(iteration, rollout=rollout, precision="bf16", compiled=way)
                yield group, rollout + (", compiled" if way else ""), measure
    if "sample" in options.only:
        for sampler, steps, title in (("renoise", 10, "10 steps"), ("heun", 40, "79 evaluations")):
            group = f"sampling, {title}, images per second"
            sampling = functools.partial(
                bench.sampling, batch=16 if options.small else 128, sampler=sampler, steps=steps
            )
            yield group, "straightforward", functools.partial(sampling, precision="fp32", compiled=False)
            for way in compiled:
                measure = functools.partial(sampling, precision="bf16", compiled=way)
                yield group, "ours" + (", compiled" if way else ""), measure
    if "features" in options.only:
        images = 2000 if options.small else 50_000
        yield (
            "features and moments, images per second",
            "efficientnet_lite0",
            functools.partial(bench.features, images=images),
        )


if __name__ == "__main__":
    main()
