"""Joins processes that torchrun or Slurm has started.

On each of two machines with eight GPUs, with the number of the machine as `--node-rank`:

    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr HOST \
        -m cifar_fast train --recipe apple_8gpu --n-shards 16

The same under Slurm:

    srun --nodes 2 --ntasks-per-node 1 bash -c 'torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID \
        --master-addr $(scontrol show hostnames | head -n 1) -m cifar_fast train --recipe apple_8gpu --n-shards 16'
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from cifar_fast.distributed.ranks import Ranks, choose_backend, rank_device, set_threads
from cifar_fast.errors import UserError
from cifar_fast.hardware.cuda_graph import release_captures

TORCHRUN_PATIENCE = timedelta(minutes=5)
"""How long a collective waits for a missing rank; torchrun notices a rank that died, but not one that hangs."""


def under_torchrun() -> bool:
    """Return whether a launcher such as torchrun has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_world_size(asked_for: int | None = None) -> int:
    """Return how many processes the launcher has started.

    Raises:
        UserError: WORLD_SIZE is not a positive number, or it differs from `asked_for`.
    """
    started = int(os.environ["WORLD_SIZE"]) if os.environ["WORLD_SIZE"].isdigit() else 0
    if started < 1:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']!r} must be the number of processes")
    if asked_for not in (None, started):
        raise UserError(
            f"world_size={asked_for}, but the launcher has started {started} processes (WORLD_SIZE): leave it out"
        )
    return started


def join_torchrun(device: str | None, backend: str | None) -> Ranks:
    """Join the ranks that torchrun, or Slurm with the same environment variables, has started.

    Args:
        device: `cpu`, `cuda`, or None for GPUs if there are any.
        backend: `nccl`, `gloo`, or None for the one that fits the device.

    Returns:
        This rank, after it has met the others. A second call keeps their process group.

    Raises:
        UserError: a variable is missing or not a number, this rank has no GPU, or the ranks cannot meet.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), torchrun_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}") from error
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set without {' and '.join(missing)}: start with torchrun, "
            "set all four, or unset RANK and WORLD_SIZE to train without other machines"
        )
    on = rank_device(device, local_rank)
    set_threads(local_world_size)
    chosen = choose_backend(on, backend)
    if not dist.is_initialized():
        try:
            dist.init_process_group(chosen, rank=rank, world_size=world_size, timeout=TORCHRUN_PATIENCE)
            atexit.register(_leave)
        except (dist.DistError, RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"rank {rank} of {world_size} cannot meet the others at {where}: {error}") from error
    return Ranks(rank, world_size, chosen, on)


def joined_torchrun() -> bool:
    """Return whether a launcher started this process and it has met the other ranks."""
    return under_torchrun() and dist.is_initialized()


def end_rank(status: int) -> NoReturn:
    """Exit from a rank that torchrun started, with `status`, without shutting the interpreter down.

    Once torch.optim is imported, torch 2.15's process group outlives destroy_process_group. Its threads sometimes abort
    the process while the interpreter shuts down, and torchrun then reports that training failed.
    """
    if status == 0:  # a rank that fails alone could wait there for the others, and torchrun would not see it end
        _leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave() -> None:
    if dist.is_initialized():
        release_captures()
        dist.destroy_process_group()
