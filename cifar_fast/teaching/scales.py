"""The same notebook cells at several scales: how much a machine can train while somebody waits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_or_synthetic
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.shown import epochs

NAMES = ("smoke", "classroom", "laptop", "gpu", "8gpu")
VARIABLE = "CIFAR_FAST_SCALE"


@dataclass(frozen=True)
class Scale:
    """What one machine gets: how many images, which recipe, how many seeds, how many processes."""

    name: str
    """`smoke` (seconds a run), `classroom` (a minute or two), `laptop` (minutes), `gpu` or `8gpu`."""
    why: str
    """What chose this scale, in words."""
    recipe: Recipe
    """The recipe that is trained once, to be looked at."""
    ablation_recipe: Recipe
    """The recipe that is trained many times, with and without a trick."""
    seeds: tuple[int, ...]
    """Seeds of an ablation's runs, the same for each arm."""
    benchmark_recipe: Recipe
    """The recipe of the timing cell, which is trained `benchmark_runs` times."""
    benchmark_runs: int
    """Runs of the timing cell."""
    benchmark_world_size: int | None = None
    """Processes of the timing cell; None: all GPUs that the recipe's shards can be divided among, or one process."""
    world_size: int = 1
    """Processes that share a training run where the recipe has as many shards."""
    n_train: int | None = None
    """How many training images are taken, from the start of the set; None: all."""
    n_test: int | None = None
    """Test images, likewise."""
    most_epochs: float = math.inf
    """The most epochs of a recipe that `shrink` makes smaller."""
    most_images_per_step: int | None = None
    """The largest global batch of such a recipe; None: its own."""
    narrower: int = 1
    """Factor by which `shrink` divides the networks' widths."""
    rung_epochs: float = 2.0
    """Epochs of the recipes that `rung` returns."""
    rung_size: tuple[int, tuple[int, ...]] | None = None
    """Global batch and widths of those recipes; None: the ladder's."""

    def __str__(self) -> str:
        """Return the line that stands at the top of a notebook."""
        images = f"{self.n_train:,} training images" if self.n_train else "all training images"
        seeds = f"{len(self.seeds)} seed" + "s" * (len(self.seeds) > 1)
        return (
            f"scale: {self.name} ({self.why}); {images}, {seeds}; recipe {self.ablation_recipe.name!r}, "
            f"{epochs(self.ablation_recipe.epochs)}; rungs of the ladder, {epochs(self.rung_epochs)}"
        )

    def load(self) -> Dataset:
        """Return as much of the data set as this scale takes: the real one, or (with a banner) the synthetic one."""
        return self.part(load_or_synthetic())

    def part(self, data: Dataset) -> Dataset:
        """Return the first images of `data`, as many as this scale takes; its fingerprint tells it from the whole."""
        n_train, n_test = self.n_train or len(data.train_labels), self.n_test or len(data.test_labels)
        if n_train >= len(data.train_labels) and n_test >= len(data.test_labels):
            return data
        return Dataset(
            data.name,
            data.classes,
            data.train_images[:n_train],
            data.train_labels[:n_train],
            data.test_images[:n_test],
            data.test_labels[:n_test],
            f"the first {n_train:,} training and {n_test:,} test images of: {data.source}",
            f"{data.fingerprint}:{n_train}:{n_test}",
        )

    def shrink(self, recipe: Recipe) -> Recipe:
        """Return a named recipe as it can be run here: fewer epochs, a smaller batch, a narrower network.

        The tricks stay as they are: shards, norm groups in images, everything that is on or off. Learning rates of SGD
        scale with the batch; epochs at the end, and epochs of small images, scale with the epochs.
        """
        epochs = min(recipe.epochs, self.most_epochs)
        batch = recipe.global_batch_size
        if self.most_images_per_step and batch > self.most_images_per_step:
            unit = recipe.n_shards * (recipe.ghost_batch_size or 1)  # whole norm groups of every shard
            batch = max(1, self.most_images_per_step // unit) * unit
        sides, faster = recipe.resolutions, recipe.epochs / epochs
        return replace(
            recipe,
            epochs=epochs,
            ema_off_epochs=recipe.ema_off_epochs / faster,
            resolutions=tuple(sides[min(int(e * faster), len(sides) - 1)] for e in range(math.ceil(epochs)) if sides),
            flat_epochs=recipe.flat_epochs * epochs / recipe.epochs,
            whitening_bias_epochs=recipe.whitening_bias_epochs * epochs / recipe.epochs,
            global_batch_size=batch,
            micro_batch_size=recipe.micro_batch_size if batch == recipe.global_batch_size else 0,
            peak_lr=recipe.peak_lr * batch / recipe.global_batch_size,
            widths=tuple(max(8, width // self.narrower) for width in recipe.widths),
        )

    def rung(self, name: str) -> tuple[Recipe, Recipe]:
        """Return the classroom ladder's recipe below the trick `name`, and the one with it, at this scale.

        The rung "small images first" takes an epoch more than the others, because a single epoch has no small images.

        Raises `RecipeError` if no rung adds a trick of that name.
        """
        epochs = self.rung_epochs if name in recipes.classroom_arms(self.rung_epochs) else max(2.0, self.rung_epochs)
        below, with_it = recipes.rung_pair(name, epochs)
        return self._rung_sized(below), self._rung_sized(with_it)

    def _rung_sized(self, recipe: Recipe) -> Recipe:
        if self.rung_size is None:
            return recipe
        batch, widths = self.rung_size
        return replace(
            recipe,
            widths=widths,
            global_batch_size=batch,
            peak_lr=recipe.peak_lr * batch / recipe.global_batch_size,
        )


def here(name: str | None = None) -> Scale:
    """Return the scale that this machine gets, that `CIFAR_FAST_SCALE` names, or that `name` names.

    Raises `UserError` for a name that is not one of `NAMES`, and for GPUs that are not there.
    """
    chosen, why = name, "asked for"
    if chosen is None and (chosen := os.environ.get(VARIABLE)):
        why = f"{VARIABLE}={chosen}"
    n_gpus = torch.cuda.device_count()
    if not chosen:
        chosen = "8gpu" if n_gpus >= 8 else "gpu" if n_gpus else "classroom"
        why = f"{n_gpus} GPUs here" if n_gpus > 1 else "one GPU here" if n_gpus else "no GPU here"
    if chosen not in NAMES:
        raise UserError(f"there is no scale {chosen!r}; set {VARIABLE} to one of {', '.join(NAMES)}, or unset it")
    if n_gpus < {"gpu": 1, "8gpu": 8}.get(chosen, 0):
        raise UserError(
            f"the scale {chosen!r} needs {8 if chosen == '8gpu' else 1} GPU, but this machine has {n_gpus}; "
            f"set {VARIABLE} to classroom (a minute or two for each run on two cores) or smoke (seconds)"
        )
    known = {"smoke": _smoke, "classroom": _classroom, "laptop": _laptop, "gpu": _gpu, "8gpu": _eight_gpus}
    return known[chosen](why)


def _smoke(why: str) -> Scale:
    small_images = (16, 16)  # the two epochs then take less than half the time, which is that of most cells
    recipe = replace(recipes.smoke(), n_shards=1, ghost_batch_size=40, resolutions=small_images)
    return Scale(
        name="smoke",
        why=why,
        recipe=recipe,
        ablation_recipe=recipe,
        seeds=(0, 1, 2),
        benchmark_recipe=replace(recipes.smoke(), resolutions=small_images),
        benchmark_runs=3,
        benchmark_world_size=2,  # more take seconds each to start, and compute the same
        n_train=3_000,
        n_test=1_000,
        most_epochs=2.0,
        most_images_per_step=256,
        narrower=8,
        rung_epochs=1.0,
        rung_size=(256, (8, 8, 8)),
    )


def _classroom(why: str) -> Scale:
    recipe = recipes.classroom()
    return Scale(
        name="classroom",
        why=why,
        recipe=recipe,
        ablation_recipe=recipe,
        seeds=(0, 1, 2),
        benchmark_recipe=recipe,
        benchmark_runs=3,
        most_epochs=3.0,
        most_images_per_step=512,
        narrower=4,
        rung_epochs=1.0,  # two arms with three seeds are then less than three minutes
    )


def _laptop(why: str) -> Scale:
    recipe = recipes.laptop()
    return Scale(
        name="laptop",
        why=why,
        recipe=recipe,
        ablation_recipe=recipes.shortened(recipe, 2.0),
        seeds=(0, 1, 2),
        benchmark_recipe=recipe,
        benchmark_runs=3,
        most_epochs=2.0,
        most_images_per_step=512,
        narrower=2,
    )


def _gpu(why: str) -> Scale:
    recipe = recipes.speedrun()
    return Scale(
        name="gpu",
        why=why,
        recipe=recipe,
        ablation_recipe=recipe,
        seeds=tuple(range(5)),
        benchmark_recipe=recipes.apple_8gpu() if torch.cuda.device_count() > 1 else recipe,
        benchmark_runs=50,
    )


def _eight_gpus(why: str) -> Scale:
    recipe = recipes.apple_8gpu()
    return Scale(
        name="8gpu",
        why=why,
        recipe=recipe,
        ablation_recipe=recipe,
        seeds=tuple(range(5)),
        benchmark_recipe=recipe,
        benchmark_runs=50,
        benchmark_world_size=8,
        world_size=8,
    )
