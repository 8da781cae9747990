"""What trainings over several ranks share: DDP wrapping, accumulation, per-update seeds, averaged weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipestill import counter
from pipestill.config.fields import Precision
from pipestill.diffusion.denoiser import Denoiser
from pipestill.distributed import World
from pipestill.networks.unet2d import mark_for_compiling
from pipestill.training.ema import Ema


class NumericParams(Protocol):
    """What decides how a network computes, whatever it is trained for."""

    @property
    def compile(self) -> bool: ...
    @property
    def checkpointing(self) -> bool: ...
    @property
    def deterministic(self) -> bool: ...


def autocast_type(precision: Precision) -> torch.dtype | None:
    """The type that networks run in, or None for that of their weights."""
    return torch.bfloat16 if precision == "bf16" else None


def prepare(denoiser: Denoiser, params: NumericParams, world: World) -> None:
    """Puts a denoiser on its device as the parameters say: deterministic, checkpointed, compiled, channels last."""
    torch.use_deterministic_algorithms(params.deterministic)
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not params.deterministic
        denoiser.to(memory_format=torch.channels_last)
    denoiser.to(world.device)
    if params.checkpointing:
        denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]
    if params.compile:
        mark_for_compiling()
        denoiser.network.compile()


def distributed(module: nn.Module, world: World) -> nn.Module:
    """The module under DDP where there are several ranks, else itself."""
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def synchronised(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients are summed over ranks in the last accumulation step only."""
    if isinstance(module, DistributedDataParallel) and not last:
        held: AbstractContextManager[None] = module.no_sync()
        return held
    return nullcontext()


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Seeds torch's own generators for one update, for dropout inside networks: a function of update and rank."""
    word = counter.words(seed, "torch", torch.tensor([step * 65536 + rank]), 2)[0]
    torch.manual_seed(int(word[0]) | int(word[1] & 0x7FFFFFFF) << 32)


@contextmanager
def averaged(network: nn.Module, ema: Ema) -> Iterator[None]:
    """The network in eval mode with the average's weights, and as it was afterwards, whatever happens."""
    was_training = network.training
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        network.load_state_dict(ema.tensors)
        network.eval()
        yield
    finally:
        network.load_state_dict(own)
        network.train(was_training)
