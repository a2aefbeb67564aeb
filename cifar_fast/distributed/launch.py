"""Trains a recipe on several processes with one call: one per GPU with NCCL, or several on a CPU with gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cifar_fast.data.dataset import Dataset, read_decoded, write_decoded
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import Ranks, choose_backend
from cifar_fast.distributed.torchrun import join_torchrun, torchrun_world_size, under_torchrun
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.hardware.device import OTHER_GPUS, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import Alone
from cifar_fast.training.batches import allowed_world_sizes, steps_per_epoch
from cifar_fast.training.loop import train
from cifar_fast.training.progress import Progress
from cifar_fast.training.result import EpochResult, RunResult, load_logits, run_from_dict, save_logits, save_weights
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.tricks import NO_TRICKS, Tricks

T = TypeVar("T")

WARM_UP_STEPS = 3
STEP_REPORT_SECONDS = 0.1
"""How often, at most, rank 0 reports its steps."""


class Trainer:
    """Processes that are started once and train any number of recipes on one data set.

    Use it as a context manager. For one process it starts nothing and calls the same training function directly. Under
    torchrun, which sets RANK and WORLD_SIZE, this process joins the others instead of starting any, and each of them
    runs the caller's code.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        world_size: int | None = None,
        device: str | None = None,
        backend: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        """Start the processes.

        Args:
            data: the data set; if it comes from a decoded file, all processes map that file.
            world_size: number of processes; None for all GPUs, or for one process without GPUs.
            device: `cpu`, `cuda`, or None for GPUs if there are any.
            backend: `nccl`, `gloo`, or None for the one that fits the device.
            timeout: seconds within which one process that died or no longer answers ends all of them.

        Raises:
            UserError: there are fewer GPUs than processes, the backend does not fit the device, or the data cannot be
                written for the processes.
            RankError: a process could not start.
        """
        self.data = data
        self._processes: WatchedProcesses | None = None
        self._ranks: Alone
        if under_torchrun():
            torchrun_world_size(world_size)
            self._ranks = join_torchrun(device, backend)
            self.world_size = self._ranks.world_size
            return
        self.world_size = choose_world_size(world_size, device)
        on = select_device(device)
        chosen = choose_backend(on, backend)
        self._ranks = Alone(device=on)
        if self.world_size > 1:
            self._processes = WatchedProcesses(self.world_size, device=on.type, backend=chosen, timeout=timeout)
            try:
                self._share(data)
            except BaseException:  # Ctrl-C too: the caller has no object yet that it could close
                self.close()
                raise

    def _share(self, data: Dataset) -> None:
        """Have every process map the data from a file, which is written first if there is none."""
        assert self._processes is not None
        self._file = data.decoded or self._processes.folder / "data.safetensors"
        if data.decoded is None:
            try:
                write_decoded(data, self._file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"the data set for the processes cannot be written to {self._file.parent}: {error}; set TMPDIR to "
                    "a folder with 200 MB of space"
                ) from error
        self._processes.run(open_data, str(self._file))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints: always, except on ranks above 0 under torchrun."""
        return self._ranks.is_main

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes started here, by rank; empty if this process trains by itself."""
        return self._processes.pids if self._processes else []

    def check(self, recipe: Recipe, tricks: Tricks = NO_TRICKS) -> None:
        """Raise `RecipeError` unless this many processes can train the recipe on this data, `TricksError` unless the
        tricks can be sent to them."""
        check_fit(recipe, self.world_size, self.data)
        if self._processes:
            tricks.require_travel()

    def agree(self, value: T) -> T:
        """Return rank 0's `value` on every rank under torchrun, where each runs the same code; else `value` itself."""
        return self._ranks.agree(value)

    def warm_up(self, recipe: Recipe, tricks: Tricks = NO_TRICKS) -> None:
        """Train a few steps and evaluate on random data, so that no clock counts what is compiled, loaded or measured
        only once. Callbacks are not called."""
        self.check(recipe, tricks)
        side = self.data.train_images.shape[-1]
        arguments = (recipe, side, self.data.n_classes, tricks.without_callbacks())
        if self._processes:
            self._processes.run(warm_up_task, *arguments)
        else:
            warm_up_task(self._ranks, *arguments)

    def train(
        self,
        recipe: Recipe,
        *,
        tricks: Tricks = NO_TRICKS,
        seed: int | Seeds = 0,
        out: Path | str | None = None,
        save_logits: bool = False,
        progress: bool = True,
        expected_seconds: float | None = None,
        started: float | None = None,
        on_epoch: Callable[[EpochResult], None] | None = None,
    ) -> RunResult:
        """Train `recipe` on all processes; arguments, result and errors are those of `training.loop.train`.

        The clocks are those of rank 0, `peak_memory_gb` is the sum over the processes, and `model` is on the CPU if
        other processes trained it. An exception, Ctrl-C included, ends the processes; only a call that is refused
        before they begin leaves them running.
        """
        self.check(recipe, tricks)
        started = time.time() if started is None else started
        if self.agree(out is not None and Path(out).exists()):
            raise RunError(f"{out} exists already; choose another --out, or remove it: a run never overwrites another")
        if not self._processes:
            main = self._ranks.is_main
            return train(
                recipe,
                self.data,
                tricks=tricks,
                device=str(self._ranks.device),
                seed=seed,
                out=out if main else None,
                save_logits=save_logits,
                progress=progress and main,
                expected_seconds=expected_seconds,
                started=started,
                on_epoch=on_epoch if main else None,
                ranks=self._ranks,
            )
        weights = self._processes.folder / "weights.safetensors"
        folder = str(Path(out).absolute()) if out is not None else None
        title = f"{tricks.titled(recipe)} on {self.data.name}, {self.world_size} processes"
        with Progress(
            recipe, self.data, title=title, seed=seed, show=progress, expected_seconds=expected_seconds
        ) as shown:

            def show_progress(rank: int, message: tuple[str, Any]) -> None:
                kind, content = message
                if kind == "step":
                    shown.step(content[0])
                elif kind == "epoch":
                    epoch = EpochResult(**content)
                    shown.evaluated(epoch)
                    if on_epoch:
                        on_epoch(epoch)

            arguments = (recipe, str(self._file), seed, folder, save_logits, started, str(weights), tricks)
            values = self._processes.run(train_task, *arguments, on_message=show_progress)[0]
        result = run_from_dict(values, load_file(weights), tricks)
        weights.unlink()
        result.train_indices = self.data.selection.indices if self.data.selection else None
        if save_logits:
            result.logits, result.test_labels = load_logits(logits_beside(weights))
            logits_beside(weights).unlink()
        return result

    def close(self) -> None:
        """End the processes, if there are any."""
        if self._processes:
            self._processes.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launch(
    recipe: Recipe,
    data: Dataset,
    *,
    tricks: Tricks = NO_TRICKS,
    world_size: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    timeout: float = 10.0,
    seed: int | Seeds = 0,
    out: Path | str | None = None,
    save_logits: bool = False,
    progress: bool = True,
    expected_seconds: float | None = None,
    started: float | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> RunResult:
    """Train `recipe` on `world_size` processes that are started for this one run; for several runs see `Trainer`.

    Arguments, result and errors are those of `Trainer` and `Trainer.train`. Mistakes are found before a process starts.
    """
    started = time.time() if started is None else started
    if not under_torchrun():
        world_size = choose_world_size(world_size, device, recipe)
        check_fit(recipe, world_size, data)
        require_travel(tricks, world_size)
    with Trainer(data, world_size=world_size, device=device, backend=backend, timeout=timeout) as trainer:
        return trainer.train(
            recipe,
            tricks=tricks,
            seed=seed,
            out=out,
            save_logits=save_logits,
            progress=progress,
            expected_seconds=expected_seconds,
            started=started,
            on_epoch=on_epoch,
        )


def choose_world_size(world_size: int | None, device: str | None, recipe: Recipe | None = None) -> int:
    """Return the number of processes.

    Args:
        world_size: the number asked for; None for all GPUs, or for 1 on a CPU.
        device: `cpu`, `cuda`, one GPU, or None for GPUs if there are any.
        recipe: take no more GPUs than can share its shards equally.

    Returns:
        The number of processes; under torchrun, as many as it has started.

    Raises:
        UserError: there are fewer GPUs.
    """
    if under_torchrun():
        return torchrun_world_size(world_size)
    on = select_device(device)
    n_gpus = torch.cuda.device_count() if on.type == "cuda" else 0
    if world_size is None:
        usable = max(1, n_gpus) if on.index is None else 1
        allowed = allowed_world_sizes(recipe) if recipe else range(1, usable + 1)
        return max(n for n in allowed if n <= usable)
    if world_size < 1:
        raise UserError(f"world_size={world_size} must be at least 1 process")
    if on.type in OTHER_GPUS and world_size > 1:
        raise UserError(f"device={device!r} is used by one process, not by world_size={world_size} of them")
    if n_gpus and world_size > 1 and on.index is not None:
        raise UserError(f"device={device!r} is one GPU, but world_size={world_size} processes need one each: use cuda")
    if n_gpus and world_size > n_gpus:
        raise UserError(
            f"world_size={world_size} processes need as many GPUs, but torch can use {n_gpus}: lower it, or use "
            "device='cpu' (--device cpu), where any number of processes talk over gloo"
        )
    return world_size


def check_fit(recipe: Recipe, world_size: int, data: Dataset) -> None:
    """Raise `RecipeError` unless `world_size` processes can share the recipe's shards, batches and images equally."""
    allowed = allowed_world_sizes(recipe)
    if world_size not in allowed:
        raise RecipeError(
            f"n_shards={recipe.n_shards} cannot be divided among world_size={world_size} processes: use "
            f"{' or '.join(map(str, allowed))} of them, or a recipe with n_shards={world_size} (which trains "
            "differently, because batch norm and shuffling work within a shard)"
        )
    steps_per_epoch(recipe, len(data.train_labels))
    batch = recipe.global_batch_size // world_size
    if recipe.micro_batch_size and batch % recipe.micro_batch_size:
        raise RecipeError(
            f"micro_batch_size={recipe.micro_batch_size} does not divide the {batch} images of a process "
            f"(global_batch_size={recipe.global_batch_size} over world_size={world_size})"
        )
    if world_size > len(data.test_labels):
        raise RecipeError(f"{len(data.test_labels)} test images cannot be shared by world_size={world_size} processes")


def require_travel(tricks: Tricks, world_size: int) -> None:
    """Raise `TricksError` if `tricks` have to travel to other processes and cannot."""
    if world_size > 1 and not under_torchrun():
        tricks.require_travel()


# --- tasks of every process; top-level functions, so that other processes can import them ---


@cache
def open_mapped(file: str) -> Dataset:
    """Return the data set in a decoded file, mapped into memory, so that all processes share its pages."""
    return read_decoded(Path(file))


def open_data(ranks: Ranks, file: str) -> None:
    """Map the data set now, because the file may be removed later."""
    open_mapped(file)


def train_task(
    ranks: Ranks,
    recipe: Recipe,
    file: str,
    seed: int | Seeds,
    out: str | None,
    keep_logits: bool,
    started: float,
    weights: str,
    tricks: Tricks,
) -> dict[str, Any] | None:
    """Train with the other ranks; rank 0 reports progress, writes weights and logits to files and returns the rest."""
    last_report = 0.0

    def on_step(done: int, total: int) -> None:
        nonlocal last_report
        ranks.tick()
        if ranks.is_main and (done == total or time.monotonic() - last_report > STEP_REPORT_SECONDS):
            last_report = time.monotonic()
            ranks.report(("step", (done, total)))

    try:
        result = train(
            recipe,
            open_mapped(file),
            tricks=tricks,
            device=str(ranks.device),
            seed=seed,
            out=out if ranks.is_main else None,
            save_logits=keep_logits,
            progress=False,
            started=started,
            on_epoch=(lambda epoch: ranks.report(("epoch", asdict(epoch)))) if ranks.is_main else None,
            on_step=on_step,
            ranks=ranks,
        )
    except Exception as error:
        tricks.blame(error)
        raise
    if not ranks.is_main:
        return None
    with ranks.slow_work():
        save_weights(result.model, weights)
        if keep_logits:
            save_logits(result, logits_beside(Path(weights)))
    return result.to_dict()


def logits_beside(weights: Path) -> Path:
    """Return the file in which rank 0 hands over the logits of a run whose weights are in `weights`."""
    return weights.with_name("logits.safetensors")


def warm_up_task(ranks: Alone, recipe: Recipe, side: int, n_classes: int, tricks: Tricks = NO_TRICKS) -> None:
    """Train `WARM_UP_STEPS` steps on random images of `side` pixels and random labels, and evaluate."""
    random = torch.Generator().manual_seed(0)
    n = WARM_UP_STEPS * recipe.global_batch_size

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=random)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(0, n_classes, (count,), generator=random)

    n_test = 500 * ranks.world_size  # each rank gets a batch as large as in an evaluation
    classes = tuple(map(str, range(n_classes)))
    data = Dataset("random", classes, images(n), labels(n), images(n_test), labels(n_test), "warm-up", "")
    shorter = min(1.0, recipe.epochs)
    brief = replace(recipe, epochs=shorter, flat_epochs=min(recipe.flat_epochs, shorter * (1 - recipe.warmup_fraction)))
    train(brief, data, tricks=tricks, device=str(ranks.device), progress=False, ranks=ranks)
