"""What a training run asks of the other ranks, answered by a process that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from cifar_fast.hardware.device import has_float64

T = TypeVar("T")


@dataclass
class Alone:
    """One rank of `world_size` that talks to nobody: every mean, sum and agreement is its own value.

    With `world_size` above 1 it computes one rank's share of the work without the others, which is how a step is
    measured for machines that are not here. `distributed.ranks.Ranks` is the same thing for processes that do talk.
    """

    rank: int = 0
    world_size: int = 1
    backend: str | None = None
    """`nccl`, `gloo`, or None for a process that talks to nobody."""
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def tick(self) -> None:
        """Note that a regular piece of work is done: a step, a batch of an evaluation."""

    @contextmanager
    def slow_work(self) -> Iterator[None]:
        """Mark work that may take longer than any step, such as writing to a slow disk."""
        yield

    def barrier(self) -> None:
        """Wait for all ranks."""

    def agree(self, value: T) -> T:
        """Return rank 0's `value`, which has to be small and picklable, on every rank."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, which has to be small and picklable, in the order of the ranks."""
        return [value]

    def all(self, condition: bool) -> bool:
        """Return whether `condition` holds on every rank."""
        return condition

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values`, of any shape, over the ranks: float64, on the CPU."""
        return (values if has_float64(values.device) else values.cpu()).double().cpu()

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""

    def average_gradients(self, model: nn.Module, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Replace every gradient by its mean over the ranks."""

    def average_buffer(self, flat: Tensor, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Do the same for gradients that are all views of the buffer `flat`."""

    def average_statistics(self, model: nn.Module) -> None:
        """Replace the running means and variances of every batch norm by their mean over the ranks."""


ALONE = Alone()
