"""What the processes of one training say to each other: weights, mean gradients, statistics, sums."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_fast.errors import UserError
from cifar_fast.hardware.device import cores
from cifar_fast.training.alone import Alone
from cifar_fast.training.gradients import in_memory_order

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a collective waits for a missing rank before it fails; the caller that started the ranks notices earlier."""


@dataclass
class Ranks(Alone):
    """One rank's place among `world_size` processes that talk over a process group of torch's."""

    tell: Callable[[Any], None] = lambda message: None
    """Sends a message to the process that started this one, where there is one."""
    ticks: int = field(default=0, init=False)
    """Counts what this rank has done, so that others see progress."""
    waiting: bool = field(default=False, init=False)
    """Whether this rank is waiting for the others at this moment."""
    settled: bool = field(default=False, init=False)
    """Whether its work has become regular: set-up and the first step, which may include a compilation, are over."""
    longest_work: float = field(default=0.0, init=False)
    """Longest piece of work since then, in seconds, without the time spent waiting."""
    _since: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """Forget what an earlier task has done."""
        self.ticks, self.waiting, self.settled, self.longest_work = 0, False, False, 0.0

    def tick(self) -> None:
        """Note that a regular piece of work is done: a step, a batch of an evaluation."""
        self._note_work()
        self.settled = True

    @contextmanager
    def slow_work(self) -> Iterator[None]:
        """Mark work that may take longer than any step, such as writing to a slow disk."""
        self._note_work()
        self.settled = False
        yield
        self.tick()

    def _note_work(self) -> None:
        now = time.monotonic()
        if self.settled:
            self.longest_work = max(self.longest_work, now - self._since)
        self.ticks, self._since = self.ticks + 1, now

    @contextmanager
    def _together(self) -> Iterator[None]:
        self._note_work()
        self.waiting = True
        yield  # after an exception the rank goes on counting as waiting: what failed is another one's failure
        self.waiting = False
        self.ticks, self._since = self.ticks + 1, time.monotonic()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    def agree(self, value: T) -> T:
        """Return rank 0's `value`, which has to be small and picklable, on every rank."""
        if self.world_size == 1:
            return value
        coded = bytearray(pickle.dumps(value))
        # Bytes as a tensor, because broadcast_object_list would leave the device to guesswork.
        size = self._broadcast(torch.tensor([len(coded)]))
        content = (
            torch.frombuffer(coded, dtype=torch.uint8) if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        )
        return pickle.loads(bytes(self._broadcast(content).tolist()))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        there = tensor.to(self.device)
        with self._together():
            dist.broadcast(there, src=0)
            return there.cpu()

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, which has to be small and picklable, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        coded = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size)
        sizes[self.rank] = len(coded)
        lengths = [int(size) for size in self.sum(sizes)]
        # A row a rank, to which the others add zeros: a sum is all that this needs of a backend.
        rows = torch.zeros(self.world_size, max(lengths))
        rows[self.rank, : len(coded)] = coded
        gathered = self.sum(rows).to(torch.uint8)
        return [pickle.loads(bytes(row[:n].tolist())) for row, n in zip(gathered, lengths, strict=True)]

    def all(self, condition: bool) -> bool:
        """Say on every rank whether `condition` holds on each."""
        return self.sum(torch.tensor(float(condition))).item() == self.world_size

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values`, of any shape, over the ranks, in float64 on the CPU."""
        if self.world_size == 1:
            return values.double().cpu()
        total = values.to(self.device, torch.float64)
        with self._together():
            dist.all_reduce(total)
            return total.cpu()

    @torch.no_grad()
    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank rank 0's weights and buffers."""
        if self.world_size == 1:
            return
        for value in model.state_dict().values():
            there = value.contiguous()
            with self._together():
                dist.broadcast(there, src=0)
            value.copy_(there)

    @torch.no_grad()
    def average_gradients(self, model: nn.Module, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Replace every gradient by its mean over the ranks: one flat buffer, one all-reduce.

        Arguments:
            model: a network whose gradients are there on every rank.
            half_precision: send float16, half the bytes; then `scale` lifts the gradients above its smallest numbers.
            scale: factor on the gradients while they travel, for instance the number of images behind their mean.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # In each gradient's own memory order, channels-last or not, so that nothing is moved about to flatten it.
        flat = torch.cat([in_memory_order(gradient) for gradient in gradients])
        # Divided before they are added: a sum could leave float16's range where the mean does not.
        buffer = flat.mul_(scale / self.world_size).to(torch.float16 if half_precision else flat.dtype)
        with self._together():
            dist.all_reduce(buffer)
        if scale != 1.0 or half_precision:
            buffer = buffer.to(flat.dtype).div_(scale)
        parts = buffer.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            in_memory_order(gradient).copy_(mean)

    @torch.no_grad()
    def average_buffer(self, flat: Tensor, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Do the same for gradients that are views of `flat`, as `flat_gradients` lays them: nothing to gather first.

        Of one process too, if it has a backend: a step is recorded as it is, whatever the number of ranks.
        """
        buffer = flat.mul_(scale / self.world_size).to(torch.float16 if half_precision else flat.dtype)
        with self._together():
            dist.all_reduce(buffer)
        flat.copy_(buffer).div_(scale)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Replace the running means and variances of every batch norm by their mean over the ranks.

        They are linear in what each rank has seen, so this gives what one process would have gathered.
        """
        if self.world_size == 1:
            return
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        flat = torch.cat(buffers).div_(self.world_size)
        with self._together():
            dist.all_reduce(flat)
        for buffer, mean in zip(buffers, flat.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(mean)


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """Return the backend for processes on `device`: the one asked for if it can be, else NCCL on GPUs, gloo on CPUs."""
    if backend not in (None, "nccl", "gloo"):
        raise UserError(f"backend {backend!r} is not known; choose nccl (GPUs) or gloo")
    if backend == "nccl" and device.type != "cuda":
        raise UserError("backend 'nccl' connects GPUs, and the device is the CPU; choose gloo, or leave it out")
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("this build of torch has no NCCL; choose --backend gloo")
    return backend or ("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo")


def set_threads(n_processes: int) -> None:
    """Give this process its share of the cores that `n_processes` on this machine divide among themselves."""
    torch.set_num_threads(max(1, cores() // n_processes))


def rank_device(device: str | None, local_rank: int) -> torch.device:
    """Return the device of one rank of a machine: its own GPU, or the CPU where `device` says so or there is no GPU."""
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device not in (None, "cuda"):
        raise UserError(f"device {device!r} is one device, and each process takes its own: use cuda or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: torch can use {torch.cuda.device_count()}; start fewer "
            "processes, or use --device cpu, where they talk over gloo"
        )
    on = torch.device("cuda", local_rank)
    torch.cuda.set_device(on)
    return on
