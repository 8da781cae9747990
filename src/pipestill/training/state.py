"""Saved states: what a training needs to go on as if nothing had happened, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import InputError, SurroundingsError
from pipestill.progress import warn
from pipestill.work import atomically


def save(folder: Path, step: int, state: dict[str, Any], *, key: str) -> None:
    """Writes `state-<step>.pt`. Raises SurroundingsError (full disk)."""
    with atomically(folder / f"state-{step:09d}.pt") as file:
        torch.save({"key": key, "step": step, "state": state}, file)


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Drops all but the newest `keep` states up to the one of `step`, and any of a later step.

    Later ones are left by a run that went further and could not be gone on from.
    """
    there = saved(folder)
    place = [step_of(path) for path in there].index(step) + 1
    for old in (*there[: max(place - keep, 0)], *there[place:]):
        old.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """The updates that a state was saved after, from its file's name."""
    return int(path.stem.removeprefix("state-"))


def saved(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    return sorted(folder.glob("state-*.pt"))


def load_newest(folder: Path, *, key: str, device: torch.device) -> tuple[int, dict[str, Any]] | None:
    """The newest readable state as (step, state), or None. Raises InputError for one of other parameters."""
    for path in reversed(saved(folder)):
        try:
            body = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            warn(f"{path} cannot be read ({type(error).__name__}): going on from the state before it")
            continue
        if body["key"] != key:
            raise InputError(f"{path} belongs to other parameters or inputs: remove {folder} to begin anew")
        return int(body["step"]), body["state"]
    return None


def load_average(path: Path, *, key: str) -> dict[str, Tensor]:
    """The averaged weights in a state, on the CPU; nothing else of it is read. Raises InputError where it has none."""
    try:
        body = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if body["key"] != key:
            raise InputError(f"{path} belongs to other parameters or inputs")
        return {name: tensor.clone() for name, tensor in body["state"]["training"]["ema"].items()}
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})") from error
    except OSError as error:
        raise SurroundingsError(f"{path} cannot be read now ({error.strerror}): start again") from error
