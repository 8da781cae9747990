"""Exponential moving averages of weights, by half-life in images or by a fixed decay an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from pipestill.config import EmaParams
from pipestill.distributed import World

FORGOTTEN = 0.01  # an average whose initial weights have at most this share has forgotten them
BUCKET = 1 << 24  # elements that are exchanged together, at least, as long as there are so many


def decay_at(params: EmaParams, *, update: int, batch: int) -> float:
    """The share of the average that update number `update` (from 0) of `batch` images keeps.

    With `kind: decay` at most (1 + t) / (10 + t) after t updates, if it warms up: TensorFlow's
    `ExponentialMovingAverage(num_updates=t)` and Diffusers' `EMAModel`. With `kind: half-life`
    0.5^(batch / half-life), the half-life at most `ramp_up` times the images seen (Karras et al. 2022, EDM's training).
    """
    if params.kind == "decay":
        return min(params.decay, (1 + update) / (10 + update)) if params.warmup else params.decay
    half_life = float(params.half_life)
    if params.ramp_up > 0:
        half_life = min(half_life, (update + 1) * batch * params.ramp_up)
    return float(0.5 ** (batch / max(half_life, 1e-8)))


def initial_share(params: EmaParams, *, updates: int, batch: int) -> float:
    """The weight that the initial weights still have in the average after so many updates, from 0 to 1.

    It is exact down to `FORGOTTEN`, and 0 below.
    """
    share = 1.0
    for update in range(updates):
        share *= decay_at(params, update=update, batch=batch)
        if share <= FORGOTTEN:
            return 0.0
    return share


def warnings(params: EmaParams, *, updates: int, batch: int) -> list[str]:
    """What to tell a user before a training whose average cannot forget the initial weights; empty if it can."""
    share = initial_share(params, updates=updates, batch=batch)
    if not share:
        return []
    if params.kind == "half-life":
        advice = "lower ema.half_life or set ema.ramp_up=0.05"
    else:
        advice = "lower ema.decay" if params.warmup else "lower ema.decay or set ema.warmup=true"
    held = f"the averaged weights will still be {share:.0%} initial weights after {updates} updates"
    return [f"{held}: train longer or {advice}"]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that are not empty, several of one type together: one collective for many small ones."""
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        bucket = waiting.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield waiting.pop(tensor.dtype)
    yield from waiting.values()


class Ema:
    """The average of a module's parameters and buffers, on the module's device, in their own type.

    Each rank keeps its own. They agree as long as the ranks' weights do; `sync_every` is how many updates pass between
    copies of the leader's to all others, 0 for none.
    """

    def __init__(self, module: nn.Module, sync_every: int = 0) -> None:
        self.sync_every = sync_every
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """average += (1 - decay)·(weights - average); what is not floating point is copied."""
        state = module.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floating], [state[n] for n in floating], 1 - decay)
        for name in state.keys() - set(floating):
            self.tensors[name].copy_(state[name])

    @torch.no_grad()
    def drift(self, world: World, *, mend: bool) -> float:
        """The largest difference between any rank's average and the leader's; where `mend`, all take the leader's."""
        furthest = torch.zeros((), dtype=torch.float64, device=next(iter(self.tensors.values())).device)
        for bucket in _buckets(self.tensors.values()):
            own = torch.cat([tensor.flatten() for tensor in bucket])
            theirs = world.from_leader(own.clone())
            # torch's maximum keeps a NaN, Python's loses it
            furthest = torch.maximum(furthest, (own.double() - theirs.double()).abs().max())
            if mend:
                for tensor, part in zip(bucket, theirs.split([each.numel() for each in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))
        return float(torch.tensor(world.gather(float(furthest))).max())

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
