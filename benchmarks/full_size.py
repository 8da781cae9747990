"""NVIDIA's ImageNet-64 network at full size, with random weights: written, converted, loaded and sampled once.

    python benchmarks/full_size.py --output runs/benchmarks/full_size.json

The pickle is as NVIDIA's training writes it (295.9M parameters, 1.2 GB); each step is a process of its own, and its
peak memory is what the system says of it. Ten Euler steps of one image; its output is checked to be finite.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUT: dict[str, Any] = {
    "img_resolution": 64,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 1000,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
}
STEPS = ("write", "read", "convert", "sample")


def write(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from edm_files import random_tensors, write_edm_pickle

    tensors = random_tensors(LAYOUT)
    path = write_edm_pickle(folder / "edm.pkl", LAYOUT, tensors)
    return {"bytes": path.stat().st_size, "parameters": sum(t.numel() for n, t in tensors.items() if "filter" not in n)}


def read(folder: Path) -> dict[str, Any]:
    from pipestill.networks import checkpoints

    found = checkpoints.find(folder / "edm.pkl", "ema")
    return {"tensors": len(found.tensors)}


def convert(folder: Path) -> dict[str, Any]:
    """As the stage does it, without a dataset of a thousand classes beside it."""
    from pipestill.config import EdmParams
    from pipestill.networks import adm, checkpoints
    from pipestill.networks.model import ModelCard, save_model

    found = checkpoints.find(folder / "edm.pkl", "ema")
    unet = adm.build(found.layout)
    classes = tuple(f"n{index:08d}" for index in range(1000))
    card = ModelCard("teacher", 64, 3, classes, False, EdmParams().plain())
    (folder / "model").mkdir()
    save_model(folder / "model", card, unet, {"ema": adm.to_diffusers(found.tensors, found.layout, "edm.pkl")})
    return {"parameters": sum(tensor.numel() for tensor in unet.parameters())}


def sample(folder: Path) -> dict[str, Any]:
    import torch

    from pipestill.config import EdmParams
    from pipestill.diffusion.conditions import ClassCondition
    from pipestill.diffusion.samplers import SAMPLERS
    from pipestill.diffusion.schedules import karras
    from pipestill.networks.model import wrap
    from pipestill.networks.unet import EdmUNet2DModel
    from pipestill.sampling.items import sample_items

    begun = time.monotonic()
    unet = EdmUNet2DModel.from_pretrained(
        folder / "model", subfolder="unet", local_files_only=True, low_cpu_mem_usage=False
    )
    denoiser = wrap(unet.requires_grad_(False).eval(), EdmParams())
    loaded = time.monotonic()
    x0 = sample_items(
        denoiser,
        sampler=SAMPLERS["euler"],
        sigmas=karras(10, 0.002, 80.0, 7.0),
        condition=ClassCondition(torch.tensor([207]), None),
        seed=0,
        items=torch.tensor([0]),
        shape=(3, 64, 64),
        device=torch.device("cpu"),
    )
    assert bool(torch.isfinite(x0).all())
    return {
        "seconds_to_load": round(loaded - begun, 2),
        "seconds_an_evaluation": round((time.monotonic() - loaded) / 10, 3),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step: Callable[[Path], dict[str, Any]] = globals()[options.step]
        begun = time.monotonic()
        figures = step(options.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": round(time.monotonic() - begun, 1), "peak_gib": round(peak, 2)} | figures))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in STEPS:
            command = [sys.executable, __file__, "--step", name, "--folder", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
