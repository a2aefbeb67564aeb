"""What the processes of one training run exchange: weights, mean gradients, statistics, sums."""

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
from torch.nn.modules.batchnorm import _NormBase

from cifar_fast.errors import UserError
from cifar_fast.hardware.device import cores
from cifar_fast.training.alone import Alone
from cifar_fast.training.gradients import in_memory_order
from cifar_fast.training.model import tensors

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a collective waits for a missing rank before it fails; the caller that watches the ranks notices earlier."""


@dataclass
class Ranks(Alone):
    """One of `world_size` processes that talk over torch's process group."""

    report: Callable[[Any], None] = lambda message: None
    """Sends a message to the process that started this one, if there is one."""
    ticks: int = field(default=0, init=False)
    """Counts the pieces of work and the waits of this task, so that the caller sees progress."""
    waiting: bool = field(default=False, init=False)
    """Whether this rank is waiting for the others now."""
    settled: bool = field(default=False, init=False)
    """Whether work has become regular: set-up and the first step, which may include a compilation, are over."""
    longest_work: float = field(default=0.0, init=False)
    """Longest piece of work since then, in seconds, without the time spent waiting."""
    _work_began: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """Start counting for a new task."""
        self.ticks, self.waiting, self.settled, self.longest_work = 0, False, False, 0.0

    def tick(self) -> None:
        """Note that a regular piece of work is done: a training step or an evaluated batch."""
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
            self.longest_work = max(self.longest_work, now - self._work_began)
        self.ticks, self._work_began = self.ticks + 1, now

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Count this rank as waiting for the others during the block."""
        self._note_work()
        self.waiting = True
        yield  # after an exception `waiting` stays True: another rank has failed, not this one
        self.waiting = False
        self.ticks, self._work_began = self.ticks + 1, time.monotonic()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    def agree(self, value: T) -> T:
        """Return rank 0's `value`, which has to be small and picklable, on every rank."""
        if self.world_size == 1:
            return value
        # Bytes in a tensor of our own, because broadcast_object_list would have to guess the device.
        coded = _to_bytes(value)
        size = int(self._broadcast(torch.tensor([len(coded)])))
        return _from_bytes(self._broadcast(coded if self.is_main else torch.empty(size, dtype=torch.uint8)))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        there = tensor.to(self.device)
        with self._collective():
            dist.broadcast(there, src=0)
            return there.cpu()

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, which has to be small and picklable, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        coded = _to_bytes(value)
        sizes = torch.zeros(self.world_size)
        sizes[self.rank] = len(coded)
        lengths = [int(size) for size in self.sum(sizes)]
        # Each rank fills a row of its own, and zeros elsewhere, so that the sum holds all rows. Every backend can sum.
        rows = torch.zeros(self.world_size, max(lengths))
        rows[self.rank, : len(coded)] = coded
        gathered = self.sum(rows).to(torch.uint8)
        return [_from_bytes(row[:n]) for row, n in zip(gathered, lengths, strict=True)]

    def all(self, condition: bool) -> bool:
        """Return whether `condition` holds on every rank."""
        return self.sum(torch.tensor(float(condition))).item() == self.world_size

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values`, of any shape, over the ranks: float64, on the CPU."""
        if self.world_size == 1:
            return super().sum(values)
        total = values.to(self.device, torch.float64)
        with self._collective():
            dist.all_reduce(total)
            return total.cpu()

    @torch.no_grad()
    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.world_size == 1:
            return
        for value in tensors(model):
            there = value.contiguous()
            with self._collective():
                dist.broadcast(there, src=0)
            value.copy_(there)

    @torch.no_grad()
    def average_gradients(self, model: nn.Module, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Replace every gradient by its mean over the ranks: one flat buffer, one all-reduce.

        Args:
            model: a network, the same on every rank, with the rank's own gradients.
            half_precision: send float16, half the bytes; a large `scale` then keeps small gradients from becoming 0.
            scale: factor on the gradients while they are sent, for instance the number of images in the mean.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # Each gradient stays in its own memory order, channels-last or not, so that flattening only copies.
        flat = torch.cat([in_memory_order(gradient) for gradient in gradients])
        # Divide before adding: a sum can leave float16's range where the mean does not.
        buffer = flat.mul_(scale / self.world_size).to(torch.float16 if half_precision else flat.dtype)
        with self._collective():
            dist.all_reduce(buffer)
        if scale != 1.0 or half_precision:
            buffer = buffer.to(flat.dtype).div_(scale)
        parts = buffer.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            in_memory_order(gradient).copy_(mean)

    @torch.no_grad()
    def average_buffer(self, flat: Tensor, *, half_precision: bool = False, scale: float = 1.0) -> None:
        """Do the same for gradients that are all views of the buffer `flat` (numel,), which needs no copies.

        A single process with a backend reduces too, so that a captured step is the same for any number of ranks.
        """
        buffer = flat.mul_(scale / self.world_size).to(torch.float16 if half_precision else flat.dtype)
        with self._collective():
            dist.all_reduce(buffer)
        flat.copy_(buffer).div_(scale)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Replace the running means and variances of every batch norm by their mean over the ranks.

        They are linear in the batches that each rank has seen, so one process would have the same statistics.
        """
        if self.world_size == 1:
            return
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        if not buffers:
            return
        flat = torch.cat(buffers).div_(self.world_size)
        with self._collective():
            dist.all_reduce(flat)
        for buffer, mean in zip(buffers, flat.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(mean)


def _to_bytes(value: object) -> Tensor:
    """Return a pickled value as a uint8 tensor (n,)."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(coded: Tensor) -> Any:
    return pickle.loads(bytes(coded.tolist()))


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """Return the backend for processes on `device`: `backend`, or by default NCCL on GPUs and gloo on CPUs.

    Raises:
        UserError: `backend` is unknown, or cannot be used here.
    """
    if backend not in (None, "nccl", "gloo"):
        raise UserError(f"backend {backend!r} is not known; choose nccl (GPUs) or gloo")
    if backend == "nccl" and device.type != "cuda":
        raise UserError("backend 'nccl' connects GPUs, but the device is the CPU; choose gloo, or leave it out")
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("this build of torch has no NCCL; choose --backend gloo")
    return backend or ("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo")


def set_threads(n_processes: int) -> None:
    """Give torch in this process its share of the machine's cores, which `n_processes` divide among themselves."""
    torch.set_num_threads(max(1, cores() // n_processes))


def rank_device(device: str | None, local_rank: int) -> torch.device:
    """Return the device of a rank: its own GPU, or the CPU if `device` is `cpu` or there is no GPU.

    Args:
        device: `cpu`, `cuda`, or None for GPUs if there are any.
        local_rank: the rank among those on this machine, which is the number of its GPU.

    Raises:
        UserError: `device` is a single device, or this machine has fewer GPUs than ranks.
    """
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
