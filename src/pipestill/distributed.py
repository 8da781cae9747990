"""The group of ranks that does one stage: who this rank is, what ranks agree on, and how they fail together.

It reads the variables that torchrun sets, and nothing else of the launcher's; without them the world is one rank and
no process group exists. A control group over gloo carries small objects and stop requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.errors import InputError, Stopped
from pipestill.stopping import MARGIN, Interrupted, StopRequest

Value = TypeVar("Value")
LEFT = "pipestill/leader-left"  # key in the store
FAREWELLS = "pipestill/farewells"  # how many others have left since
FAREWELL_SECONDS = 10.0


@dataclass
class World:
    """One rank's view of the group."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # gloo process group for small objects; None when alone
    stop: StopRequest = field(default_factory=lambda: StopRequest())

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Value) -> Value:
        """The leader's value on every rank (small picklable objects)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, on every rank (small picklable objects)."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, on the tensor's own device."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """Every rank's rows [n, ...], in rank order, on every rank's own device; ranks may have different numbers."""
        if self.size == 1:
            return tensor
        counts = self.gather(len(tensor))
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        box = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(box, padded, group=self.control if tensor.device.type == "cpu" else None)
        return torch.cat([part[:count] for part, count in zip(box, counts, strict=True)])

    def await_leader(self, name: str) -> None:
        """Ranks wait here until the leader comes, however long it worked alone: no collective's time runs meanwhile.

        `name` is unique to this place and moment.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        if self.leader:
            store.set(name, "")
        _wait_for(store, [name])

    def await_all(self, name: str) -> None:
        """Ranks wait here until every one has come, however long each worked: as `await_leader`, for all of them."""
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{name}/{self.rank}", "")
        _wait_for(store, [f"{name}/{rank}" for rank in range(self.size)])

    def collect(self, value: Value) -> list[Value] | None:
        """Every rank's value, in rank order, on the leader; None on the others."""
        if self.size == 1:
            return [value]
        box: list[Any] | None = [None] * self.size if self.leader else None
        dist.gather_object(value, box, dst=0, group=self.control)
        return box

    def from_leader(self, tensor: Tensor) -> Tensor:
        """The leader's tensor on every rank, in place, on the tensor's own device."""
        if self.size > 1:
            dist.broadcast(tensor, 0, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether any rank has it: the same answer on every rank."""
        if self.size == 1:
            return wishes
        flags = torch.tensor(wishes, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(flag) for flag in flags.tolist())

    def counter(self, name: str) -> Counter:
        """A shared counter that hands out 0, 1, 2, … over all ranks, each number once."""
        return Counter(name, dist.distributed_c10d._get_default_store() if self.size > 1 else None)


class Counter:
    """Numbers handed to ranks as they become free, through the process group's store."""

    def __init__(self, name: str, store: Any) -> None:
        self._name, self._store, self._local = name, store, 0

    def next(self) -> int:
        if self._store is not None:
            return int(self._store.add(self._name, 1)) - 1
        self._local += 1
        return self._local - 1


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` takes a GPU where there is one. Raises InputError where the wanted device is missing."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("operation.device=cuda, but torch sees no GPU here: use auto or cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"rank {local_rank} of this node has no GPU of its own (there are {torch.cuda.device_count()}): "
            "lower operation.ranks"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(*, device: str = "auto", threads: int = 1, timeout: float = 600.0, margin: float = MARGIN) -> Iterator[World]:
    """Joins the group of ranks and leaves it at the end; `timeout` is how long a collective may take, in seconds.

    The work is asked to stop `margin` seconds before its job ends. Threads are set for every rank: another number of
    threads gives other bits.
    """
    torch.set_num_threads(threads)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    group = World(rank, size, chosen, stop=StopRequest(margin))
    with group.stop.listening(hand_back=size == 1):  # a launcher passes on a Ctrl-C that ranks have seen already
        if size == 1:
            yield group
            return
        limit = timedelta(seconds=timeout)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit)
        try:
            group.control = dist.new_group(backend="gloo", timeout=limit)
            yield group
            _await_leader(group)
        except (Stopped, Interrupted):
            if group.leader:  # those that wait for it may leave
                dist.distributed_c10d._get_default_store().set(LEFT, "")
            raise
        finally:
            dist.destroy_process_group()


def _wait_for(store: Any, keys: list[str]) -> None:
    """Waits until all keys are in the store, however long that takes."""
    pause = 0.001
    while not store.check(keys):
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)


def _await_leader(group: World) -> None:
    """Ranks leave after the leader, however long it works alone at the end: no collective waits for it.

    Where no launcher keeps the store, the leader does, so that it ends last: it waits for the others' farewell.
    """
    store = dist.distributed_c10d._get_default_store()
    if not group.leader:
        _wait_for(store, [LEFT])
        store.add(FAREWELLS, 1)
        return
    store.set(LEFT, "")
    limit = time.monotonic() + FAREWELL_SECONDS  # a rank that was lost says none
    while store.add(FAREWELLS, 0) < group.size - 1 and time.monotonic() < limit:
        time.sleep(0.02)
