"""What averaging gradients over workers costs: published times, a model of the link, a measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import Ranks, choose_backend
from cifar_fast.errors import UserError
from cifar_fast.hardware.clock import synchronize
from cifar_fast.hardware.device import cores, select_device

REPEATS = 6
"""How many times the all-reduce is measured, after a warm-up; the median counts."""


# --- what others measured ---


@dataclass(frozen=True)
class AllReduceTime:
    """The published time of one all-reduce among `n_workers`, as a range."""

    link: str
    n_workers: int
    n_bytes: float
    low_seconds: float
    high_seconds: float
    source: str


_NCCL = "others' measurement on 8 H100 over NVLink, NCCL"
_MULTICAST = "others' measurement on 8 H100, NVLink multicast (symmetric memory)"
ALL_REDUCE_TIMES = (
    AllReduceTime("nvlink_nccl", 8, 8e6, 0.08e-3, 0.09e-3, f"{_NCCL}: 8 MB in 0.08 to 0.09 ms"),
    AllReduceTime("nvlink_nccl", 8, 16e6, 0.12e-3, 0.14e-3, f"{_NCCL}: 16 MB in 0.12 to 0.14 ms"),
    AllReduceTime("nvlink_multicast", 8, 8e6, 0.05e-3, 0.05e-3, f"{_MULTICAST}: 8 MB in 0.05 ms"),
    AllReduceTime("nvlink_multicast", 8, 16e6, 0.09e-3, 0.09e-3, f"{_MULTICAST}: 16 MB in 0.09 ms"),
)
"""All published times that we know of, two for each link, with 1 MB as 10^6 bytes. None spans several machines."""


@dataclass(frozen=True)
class Link:
    """What connects the workers: an all-reduce takes the latency, plus the time to send each worker's bytes."""

    name: str
    latency_seconds: float
    bytes_per_second: float
    """Bytes that each worker sends in a second; for an all-reduce of B bytes among N it sends 2 (N - 1) / N x B."""
    source: str
    most_workers: int = 8
    """Largest number of workers that the figures hold for; beyond it a prediction is a lower bound."""


def published_link(name: str) -> Link:
    """Return the link called `name` in `ALL_REDUCE_TIMES`: the line through the midpoints of its two published ranges.

    Raises `UserError` for a name that is not there.
    """
    rows = [row for row in ALL_REDUCE_TIMES if row.link == name]
    if not rows:
        names = ", ".join(dict.fromkeys(row.link for row in ALL_REDUCE_TIMES))
        raise UserError(f"there is no link {name!r}; choose one of {names}")
    small, large = rows
    seconds = [(row.low_seconds + row.high_seconds) / 2 for row in rows]
    seconds_per_byte = (seconds[1] - seconds[0]) / (large.n_bytes - small.n_bytes)
    return Link(
        name,
        latency_seconds=seconds[0] - seconds_per_byte * small.n_bytes,
        bytes_per_second=_ring_share(small.n_workers) / seconds_per_byte,
        source=f"{small.source}, {large.source.split(': ')[-1]}",
        most_workers=small.n_workers,
    )


def _ring_share(world_size: int) -> float:
    return 2 * (world_size - 1) / world_size


def link_all_reduce_seconds(n_bytes: float, world_size: int, link: Link) -> float:
    """Return the time of one all-reduce of `n_bytes` among `world_size` workers; a single worker needs none.

    Two assumptions extend the published times of 8 workers to other numbers: each worker sends 2 (N - 1) / N times the
    bytes, as in a ring, and the latency is the same for every N. The latency of a real ring grows with N.
    """
    if world_size == 1:
        return 0.0
    return link.latency_seconds + _ring_share(world_size) * n_bytes / link.bytes_per_second


@torch.no_grad()
def ring_all_reduce(gradients: Sequence[Tensor]) -> Iterator[int]:
    """Replace the gradient of each of N workers, (numel,), by the sum of all; each worker sends only to the next one.

    For study: plain tensors of one process stand for the workers. Yields, after each of the 2 (N - 1) rounds, the
    largest count of numbers that a worker has sent in it.
    """
    n = len(gradients)
    pieces = [gradient.tensor_split(n) for gradient in gradients]  # views into the gradients
    for step in range(2 * (n - 1)):
        summing = step < n - 1  # first each piece collects its sum on its way round the ring, then the sums go round
        travelling = [(rank - step) % n for rank in range(n)]  # the piece that each worker passes on
        sent = [pieces[rank][travelling[rank]].clone() for rank in range(n)]  # all send at the same moment
        for rank in range(n):
            received = pieces[(rank + 1) % n][travelling[rank]]
            received.copy_(received + sent[rank] if summing else sent[rank])
        yield max(map(len, sent))


# --- what this machine does ---


@dataclass(frozen=True)
class MeasuredAllReduce:
    """The time that processes of this machine take to average a network's gradients, flattening included."""

    world_size: int
    backend: str
    n_gradients: int
    seconds: float


def measure_all_reduce(n_gradients: int, *, precision: str, device: str | None = None) -> MeasuredAllReduce | None:
    """Measure how long processes of this machine, one for each GPU, take to average `n_gradients` numbers.

    On a CPU there are two processes, over gloo. Returns None where there is nothing to measure: one GPU, or one core.
    """
    on = select_device(device)
    world_size = torch.cuda.device_count() if on.type == "cuda" else min(2, cores())
    if world_size < 2:
        return None
    backend = choose_backend(on)
    with WatchedProcesses(world_size, device=on.type, backend=backend, timeout=60.0) as processes:
        times = processes.run(all_reduce_task, n_gradients, precision in ("float16", "bfloat16"))
    return MeasuredAllReduce(world_size, backend, n_gradients, max(times))


def all_reduce_task(ranks: Ranks, n_gradients: int, half_precision: bool) -> float:
    """Return this rank's median time to average `n_gradients` numbers; top-level, so that processes can import it."""
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(n_gradients, device=ranks.device))])
    network[0].grad = torch.ones_like(network[0])
    times = []
    for _ in range(1 + REPEATS):
        ranks.barrier()
        start = time.perf_counter()
        ranks.average_gradients(network, half_precision=half_precision)
        synchronize(ranks.device)
        times.append(time.perf_counter() - start)
        ranks.tick()
    return median(times[1:])
