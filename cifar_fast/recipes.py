"""The named recipes, and Page's ladder of tricks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

from cifar_fast.errors import RecipeError
from cifar_fast.recipe import Recipe, changed_fields


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: a recipe, and whether it adds a trick or retunes the recipe below."""

    kind: Literal["start", "trick", "retune"]
    title: str
    recipe: Recipe

    def changes(self, previous: Rung) -> dict[str, tuple[Any, Any]]:
        """Return the fields that changed from `previous`, as `changed_fields` returns them."""
        return changed_fields(previous.recipe, self.recipe)


@cache
def ladder() -> tuple[Rung, ...]:
    """Return Page's ladder from `baseline_2018` to `page_2019`.

    A trick changes one field. What the trick gains is then spent, on fewer epochs for instance, in a rung of its own.

    Source: David Page, "How to train your ResNet 8: bag of tricks", 2019, measured on one V100. His learning rates are
    for a loss summed over the batch; divided by the batch size, they are ours for the mean loss. In 2019 he trained
    every rung, even the entry of 2018, with the learning rate inside the velocity; the entry itself used PyTorch's SGD.

    What differs from his notebook: `frozen_scale_2019` and `ema_2019` change one field, where he changed several, so
    they match none of his runs. His crops and flips are balanced over an epoch, ours are independent draws. He updates
    the EMA after steps 1, 6, 11, ..., we after steps 5, 10, 15, ... He evaluates it with the statistics of a single
    ghost group, we with the mean over all groups, which is less noisy.
    """
    entry = Recipe(
        name="baseline_2018",
        preload=False,
        cutout=8,
        lr_in_velocity=True,
        schedule_time="end",
        warmup_fraction=5 / 24,  # his warm-up ends with epoch 5, however long the training
    )
    rungs = [Rung("start", "the DAWNBench entry of 2018", entry)]

    def add(kind: Literal["trick", "retune"], name: str, title: str, **changes: Any) -> None:
        rungs.append(Rung(kind, title, replace(rungs[-1].recipe, name=name, **changes)))

    trick, retune = partial(add, "trick"), partial(add, "retune")

    trick("preload_2019", "preprocessing and augmentation on the device", preload=True)

    equal = "max-pool before the activation (the same function)"
    trick("pool_before_activation_2019", equal, pool_position="before_activation")

    trick("pool_before_norm_2019", "max-pool before norm and activation", pool_position="before_norm")
    retune("pool_before_norm_retuned_2019", "one epoch more", epochs=25.0, warmup_fraction=0.2)

    trick("label_smoothing_2019", "label smoothing", label_smoothing=0.2)
    retune("label_smoothing_retuned_2019", "two epochs fewer", epochs=23.0)

    trick("celu_2019", "CELU", activation="celu")
    retune("celu_retuned_2019", "three epochs fewer", epochs=20.0)

    trick("ghost_batch_norm_2019", "ghost batch norm", ghost_batch_size=32)
    retune("ghost_batch_norm_retuned_2019", "two epochs fewer at a higher learning rate", epochs=18.0, peak_lr=0.6)

    trick("frozen_scale_2019", "frozen batch-norm scales", freeze_bn_scale=True)
    rescaled = "CELU and logits rescaled to a scale of 1"
    retune("frozen_scale_rescaled_2019", rescaled, celu_alpha=0.3, logit_scale=1 / 16)

    # One of his steps, although it changes two fields: the decay of a bias per training step stays the same.
    trick("bias_lr_2019", "faster biases", bias_lr_scale=16.0, bias_weight_decay_scale=1 / 16)
    faster = "faster still, one epoch fewer"
    retune("bias_lr_retuned_2019", faster, bias_lr_scale=64.0, bias_weight_decay_scale=1 / 64, epochs=17.0)

    trick("whitening_2019", "patch whitening", whitening_size=3)
    bolder = "three epochs fewer, higher learning rate, smaller cutout"
    retune("whitening_retuned_2019", bolder, epochs=14.0, peak_lr=1.0, cutout=5)

    trick("ema_2019", "exponential moving average of the weights", ema_decay=0.99)
    flat = "one epoch fewer, flat at the end"
    retune("ema_retuned_2019", flat, epochs=13.0, flat_epochs=2.0, final_lr_fraction=0.1)

    trick("flip_tta_2019", "flip at test time", tta="flip")
    retune("page_2019", "three epochs fewer, no cutout", epochs=10.0, cutout=0)
    return tuple(rungs)


def apple_8gpu() -> Recipe:
    """Return the recipe of Apple's `ml-cifar-10-faster` (2019), published for 8 V100.

    Published: 50 runs with a median accuracy of 94.19 %, and a mean time of 7.81 s according to its README, or 7.885 s
    according to its own run log (median 7.819 s).

    Two things differ on purpose. Apple evaluates with the running statistics of one ghost group of worker 0 from the
    second epoch on, we with the mean over all groups: the published accuracies have about 0.14 points of extra scatter.
    Apple whitens by the patches of worker 0's 6,250 images, we by those of the first 10,000: filters differ by up to
    13 %.
    """
    return replace(
        page_2019(),
        name="apple_8gpu",
        epochs=18.0,
        n_shards=8,
        global_batch_size=2048,
        ghost_batch_size=16,
        # Apple sums each loss over the 256 images of a worker, with a rate of 1.5/256 and a decay of 5e-4 x 1.5 x 256.
        peak_lr=1.5,
        weight_decay=7.5e-4,
        ema_decay=0.0,
        cuda_graph="auto",
        compile="auto",
    )


def page_2019() -> Recipe:
    """Return the top of Page's ladder: published 26 s on one V100, mean accuracy 94.1 %."""
    return ladder()[-1].recipe


def baseline_2018() -> Recipe:
    """Return the foot of Page's ladder: published 75 s on one V100, mean accuracy 94.1 %."""
    return ladder()[0].recipe


def airbench_2024() -> Recipe:
    """Return airbench's Muon recipe (Keller Jordan, 2024): published 2.59 s on one A100, mean accuracy 94.01 %.

    It whitens by the patches of the first 5,000 images, we by those of the first 10,000: filters differ by up to 1.5 %.
    """
    return Recipe(
        name="airbench_2024",
        network="convnet6",
        widths=(64, 256, 256),
        activation="gelu",
        pool_position="before_norm",
        conv_init="dirac",
        whitening_size=2,
        whitening_eps=5e-4,
        whitening_bias_epochs=3.0,
        freeze_bn_scale=True,
        bn_momentum=0.4,
        bn_eps=1e-12,
        logit_scale=1 / 256,
        crop_padding=2,
        flip="alternating",
        label_smoothing=0.2,
        epochs=8.0,
        optimizer="muon",
        start_lr_fraction=1.0,
        warmup_fraction=0.0,
        momentum=0.85,
        tta="flip_shift",
        **_summed_loss_rates(batch=2000, head_lr=0.67, bias_lr=0.053, decay=2e-6),
    )


def _summed_loss_rates(*, batch: int, head_lr: float, bias_lr: float, decay: float) -> dict[str, Any]:
    """Convert rates published for a loss summed over `batch` images, and a decay per image and step, into fields."""
    return {
        "global_batch_size": batch,
        "peak_lr": head_lr * batch,
        "bias_lr_scale": bias_lr / head_lr,
        "weight_decay": decay / head_lr,  # every step takes the same share of a weight, whatever its learning rate
        "bias_weight_decay_scale": head_lr / bias_lr,
    }


def _hiverge_rates(batch: int = 1536) -> dict[str, Any]:
    """Return the rates of Hiverge's `cifar10-speedrun` (2025), where they differ from airbench's recipe.

    With another `batch` than Hiverge's 1,536 each image counts as much for the head and the biases, and each step takes
    the same share of a weight. Muon's rates stay as they are.

    We take only its rates, not its epochs. Hiverge also has GELU after the whitening layer, other Newton-Schulz
    coefficients, filters renormalised every 2 to 17 steps, weight decay in Muon, contrast and brightness jittered by
    different amounts in the other order, whitening from 960 images, and test-time augmentation for the least certain
    quarter of the images only.
    """
    return {
        "activation": "silu",
        "whitening_bias_epochs": 0.19,  # after that, the backward pass ends at the first block
        "bn_momentum": 0.4434,
        "color_jitter": 0.135,
        "label_smoothing": 0.09,
        "muon_lr": 0.205,
        "muon_momentum": 0.655,
        "momentum": 0.825,
        **_summed_loss_rates(batch=batch, head_lr=0.5415, bias_lr=0.0573, decay=1.0418e-6 * 1536 / batch),
    }


def speedrun() -> Recipe:
    """Return our recipe for one modern GPU; 2, 4 or 8 can share it.

    Its rates are those of Hiverge's `cifar10-speedrun` (2025). Ours are the eleven epochs, seven of them on small
    images (chosen on held-out training images, with a narrow network), and the eight shards, which let up to eight
    processes share the work; batch norm takes its statistics over the 192 images of each shard.
    """
    return replace(
        airbench_2024(),
        name="speedrun",
        epochs=11.0,
        resolutions=(24, 24, 24, 24, 28, 28, 28, 32),
        n_shards=8,
        tta_margin=0.5,
        cuda_graph="auto",
        compile="auto",
        **_hiverge_rates(),
    )


def laptop() -> Recipe:
    """Return our recipe for a CPU with two cores.

    Its rates are those of Hiverge's `cifar10-speedrun` (2025), some of them scaled to a smaller batch. Ours are that
    batch, the widths, which move arithmetic from the second block to the third, the small images of the first four
    epochs and the number of epochs (all chosen on held-out training images), an EMA of the weights, and a two-slope
    decay: to a third of the rate in five and a half epochs, and to zero in four and a half.
    """
    return replace(
        airbench_2024(),
        name="laptop",
        widths=(64, 192, 320),
        epochs=10.0,
        bend_fraction=0.55,
        bend_lr_fraction=1 / 3,
        ghost_batch_size=512,
        micro_batch_size=512,
        resolutions=(18, 18, 24, 24, 32),
        # While the learning rate is high, the EMA beats the weights; once they settle, it lags behind them.
        ema_decay=0.97,
        ema_every=2,
        ema_off_epochs=1.0,
        # Muon's rate and momentum were set by hand for the smaller batch; the other rates follow from its size.
        **_hiverge_rates(batch=1024) | {"muon_lr": 0.165, "muon_momentum": 0.7},
    )


def classroom() -> Recipe:
    """Return the recipe for experiments that repeat many training runs on a CPU: the top of `classroom_ladder`.

    The network is narrow, and four of the five epochs are on small images. Tricks, epochs and image sizes were chosen
    on held-out training images (see the saved results).
    """
    return replace(classroom_ladder(5.0)[-1].recipe, name="classroom")


def classroom_ladder(epochs: float = 2.0) -> tuple[Rung, ...]:
    """Return rungs from a plain network to `classroom`, each with one trick more than the rung below.

    The schedule is scaled to `epochs`. Comparing the rungs at several numbers of epochs shows how much arithmetic a
    trick saves at the same accuracy. A single epoch has no room for small images, so it has no rung for them.
    """
    foot = Recipe(
        name="plain",
        network="convnet6",
        widths=(24, 64, 64),
        epochs=epochs,
        global_batch_size=512,
        peak_lr=0.1,
        start_lr_fraction=1.0,
        warmup_fraction=0.0,
        final_lr_fraction=1.0,
        # Settings of tricks that higher rungs switch on
        whitening_eps=5e-4,
        muon_lr=0.205,
        muon_momentum=0.655,
    )
    rungs = [Rung("start", "a plain network with a constant learning rate", foot)]

    def add(name: str, title: str, **changes: Any) -> None:
        rungs.append(Rung("trick", title, replace(rungs[-1].recipe, name=name, **changes)))

    one_cycle = {"peak_lr": 0.2, "start_lr_fraction": 0.0, "warmup_fraction": 0.2, "final_lr_fraction": 0.0}
    add("schedule", "a learning rate that warms up, then decays to zero", **one_cycle)
    add("whitening", "patch whitening", whitening_size=2, whitening_bias_epochs=0.19)
    add("muon", "Muon for the filters", optimizer="muon")
    add("warmup", "a start at the full rate, without a warm-up", start_lr_fraction=1.0, warmup_fraction=0.0)
    add("augmentation", "alternating flip and smaller shifts", flip="alternating", crop_padding=2)
    if sizes := _small_first(epochs):
        add("small_images", "small images first", resolutions=sizes)
    add("tta_flip", "test-time augmentation with mirror images", tta="flip")
    add("tta", "test-time augmentation with shifts as well", tta="flip_shift")
    return tuple(rungs)


def last_trained(epochs: float = 2.0) -> tuple[Recipe, tuple[Recipe, ...]]:
    """Return the last rung of the ladder that trains a network, and those above it, which only evaluate it."""
    ladder = [rung.recipe for rung in classroom_ladder(epochs)]
    last = next(recipe for recipe in ladder if recipe == replace(ladder[-1], name=recipe.name, tta=recipe.tta))
    return last, tuple(ladder[ladder.index(last) + 1 :])


def beside_classroom_ladder(epochs: float = 2.0) -> dict[str, tuple[str, Rung]]:
    """Return the tricks beside the ladder, by name: the name of the rung that each is added to, and a rung of its own.

    `dirac` is worth most near the foot, without whitening and Muon. The others are added to the last rung that needs a
    training run of its own.
    """
    ladder = {rung.recipe.name: rung.recipe for rung in classroom_ladder(epochs)}
    last = last_trained(epochs)[0].name
    tricks: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("schedule", "dirac", "filters that start as the identity", {"conv_init": "dirac"}),
        (last, "pooling", "max-pool before the norm", {"pool_position": "before_norm"}),
        (
            last,
            "biases",
            "frozen scales, fast biases",
            {"freeze_bn_scale": True, "bias_lr_scale": 8.0, "bias_weight_decay_scale": 1 / 8},
        ),
        (last, "smoothing", "label smoothing", {"label_smoothing": 0.1}),
    )
    return {
        name: (below, Rung("trick", title, replace(ladder[below], name=name, **changes)))
        for below, name, title, changes in tricks
    }


def classroom_arms(epochs: float = 2.0) -> dict[str, Rung]:
    """Return the rungs of the ladder and the tricks beside it, by name."""
    beside = {name: rung for name, (_, rung) in beside_classroom_ladder(epochs).items()}
    return {rung.recipe.name: rung for rung in classroom_ladder(epochs)} | beside


def leave_one_out(epochs: float = 2.0) -> dict[str, Recipe]:
    """Return the top of the classroom ladder without one of its tricks, by the name of that trick."""
    rungs = [rung.recipe for rung in classroom_ladder(epochs)]
    top = rungs[-1]
    without = {}
    for below, rung in pairwise(rungs):
        undone = {field: before for field, (before, _) in changed_fields(below, rung).items()}
        without[rung.name] = replace(top, **undone)
    return without


def rung_pair(name: str, epochs: float = 2.0) -> tuple[Recipe, Recipe]:
    """Return the recipe that the trick `name` is added to, and the one with it, which is called `name`.

    Raises `RecipeError` for a name that is not a trick on the ladder or beside it, and for the foot, which adds none.
    """
    rungs, beside = classroom_ladder(epochs), beside_classroom_ladder(epochs)
    if name in beside:
        below, rung = beside[name]
        return classroom_arms(epochs)[below].recipe, rung.recipe
    names = [rung.recipe.name for rung in rungs]
    if name not in names[1:]:
        known = ", ".join((*names[1:], *beside))
        raise RecipeError(f"no rung of the ladder adds {name!r}; the tricks on it and beside it are {known}")
    place = names.index(name)
    return rungs[place - 1].recipe, rungs[place].recipe


def _small_first(epochs: float) -> tuple[int, ...]:
    """Return each epoch's image side in pixels: two fifths of the epochs at 16, as many at 24, then 32.

    Fifths are rounded down, so a single epoch has no small images, and two have one at 24 pixels.
    """
    small, medium = int(0.4 * epochs), int(0.8 * epochs)
    return (*(16,) * small, *(24,) * (medium - small), 32) if medium else ()


def shortened(recipe: Recipe, epochs: float) -> Recipe:
    """Return `recipe` with few `epochs`, and without what needs more of them: small images, EMA, two-slope decay."""
    return replace(
        recipe,
        epochs=epochs,
        bend_fraction=0.0,
        bend_lr_fraction=0.0,
        resolutions=(),
        ema_decay=0.0,
        ema_off_epochs=0.0,
    )


def smoke() -> Recipe:
    """Return a recipe that takes seconds and that up to 8 processes can share, to test that everything runs."""
    return replace(
        airbench_2024(), name="smoke", widths=(16, 32, 32), n_shards=8, global_batch_size=320, epochs=2.0, tta="flip"
    )


@cache
def _by_name() -> dict[str, Recipe]:
    outside_the_ladder = (laptop(), classroom(), speedrun(), apple_8gpu(), airbench_2024(), smoke())
    return {recipe.name: recipe for recipe in (*outside_the_ladder, *(rung.recipe for rung in ladder()))}


def names() -> tuple[str, ...]:
    """Return the names that `named` knows: first the recipes outside the ladder, then its rungs."""
    return tuple(_by_name())


def named(name: str) -> Recipe:
    """Return the recipe called `name`; raise `RecipeError`, with a list of the names, if there is none."""
    if name not in _by_name():
        raise RecipeError(f"there is no recipe {name!r}; the recipes are {', '.join(names())}")
    return _by_name()[name]
