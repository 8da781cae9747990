"""Conditions: small typed objects that say what to generate and know their own null form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Condition(Protocol):
    """What a denoiser is conditioned on, one entry a sample."""

    def __len__(self) -> int: ...

    def null(self) -> Self:
        """The condition that asks for nothing. Raises ValueError where the network has no unconditional branch."""
        ...

    def dropped(self, drop: Tensor) -> Self:
        """Null where `drop` [N] bool is true: label dropout, decided once a sample before all networks."""
        ...

    def cat(self, other: Self) -> Self: ...

    def select(self, index: Tensor | slice) -> Self: ...

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the network."""
        ...


@dataclass(frozen=True)
class ClassCondition:
    """Class indices [N] int64; `null_label` is the extra row 'no class', or None where none was trained."""

    labels: Tensor
    null_label: int | None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def null(self) -> ClassCondition:
        return ClassCondition(torch.full_like(self.labels, self._null()), self.null_label)

    def dropped(self, drop: Tensor) -> ClassCondition:
        return ClassCondition(self.labels.masked_fill(drop, self._null()), self.null_label)

    def cat(self, other: ClassCondition) -> ClassCondition:
        return ClassCondition(torch.cat([self.labels, other.labels]), self.null_label)

    def select(self, index: Tensor | slice) -> ClassCondition:
        return ClassCondition(self.labels[index], self.null_label)

    def inputs(self) -> dict[str, Tensor]:
        return {"class_labels": self.labels}

    def _null(self) -> int:
        if self.null_label is None:
            raise ValueError("this model has no unconditional branch: guidance and label dropout need one")
        return self.null_label


@dataclass(frozen=True)
class NoCondition:
    """An unconditional model: nothing to drop, nothing to pass on."""

    count: int

    def __len__(self) -> int:
        return self.count

    def null(self) -> NoCondition:
        raise ValueError("an unconditional model has nothing to guide by")

    def dropped(self, drop: Tensor) -> NoCondition:
        return self

    def cat(self, other: NoCondition) -> NoCondition:
        return NoCondition(self.count + other.count)

    def select(self, index: Tensor | slice) -> NoCondition:
        return NoCondition(int(torch.arange(self.count)[index].numel()))

    def inputs(self) -> dict[str, Tensor]:
        return {}
