"""The named recipes have the published numbers, and each rung of the ladder changes what it says."""

from __future__ import annotations

import json

import pytest

from cifar_fast import recipes
from cifar_fast.errors import RecipeError
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.recipes import ladder

TUNING = {"epochs", "peak_lr", "cutout"}

# --- Names ---


@pytest.mark.parametrize("name", recipes.names())
def test_every_named_recipe_survives_json_and_is_filed_under_its_name(name: str) -> None:
    recipe = recipes.named(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_an_unknown_recipe_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(RecipeError, match="there is no recipe 'page2019'") as caught:
        recipes.named("page2019")
    assert all(name in str(caught.value) for name in recipes.names())


# --- The ladder ---


def test_the_ladder_goes_from_2018_to_2019_in_named_steps() -> None:
    rungs = ladder()
    assert rungs[0].recipe == recipes.baseline_2018() and rungs[0].kind == "start"
    assert rungs[-1].recipe == recipes.page_2019()
    names = [rung.recipe.name for rung in rungs]
    assert names[0] == "baseline_2018" and names[-1] == "page_2019"
    assert len(set(names)) == len(names) and set(names) <= set(recipes.names())


def test_a_trick_changes_one_field_and_retuning_stands_apart() -> None:
    rungs = ladder()
    for previous, rung in zip(rungs, rungs[1:], strict=False):
        changes = rung.changes(previous)
        assert changes, rung.recipe.name
        if rung.recipe.name == "bias_lr_2019":  # the rate with the decay that belongs to it: one step of Page's
            assert changes == {"bias_lr_scale": (1.0, 16.0), "bias_weight_decay_scale": (1.0, 1 / 16)}
        elif rung.kind == "trick":
            assert len(changes) == 1, changes
            assert not changes.keys() & TUNING, changes
        else:
            assert rung.kind == "retune"
    tricks = [field for a, b in zip(rungs, rungs[1:], strict=False) if b.kind == "trick" for field in b.changes(a)]
    assert tricks == [
        "preload",
        "pool_position",
        "pool_position",
        "label_smoothing",
        "activation",
        "ghost_batch_size",
        "freeze_bn_scale",
        "bias_lr_scale",
        "bias_weight_decay_scale",
        "whitening_size",
        "ema_decay",
        "tta",
    ]


def test_the_tuning_along_the_ladder_is_as_published() -> None:
    # (epochs, peak learning rate for the mean loss, cutout) of each row of Page's table, as it is left.
    assert [(rung.recipe.epochs, rung.recipe.peak_lr, rung.recipe.cutout) for rung in _last_of_each_trick()] == [
        (24, 0.4, 8),  # the DAWNBench entry
        (24, 0.4, 8),  # augmentation on the device
        (24, 0.4, 8),  # pool before activation
        (25, 0.4, 8),  # pool before norm
        (23, 0.4, 8),  # label smoothing
        (20, 0.4, 8),  # CELU
        (18, 0.6, 8),  # ghost batch norm
        (18, 0.6, 8),  # frozen scales
        (17, 0.6, 8),  # faster biases
        (14, 1.0, 5),  # whitening
        (13, 1.0, 5),  # EMA
        (10, 1.0, 0),  # flip TTA
    ]


def test_the_warm_up_of_24_epochs_ends_with_the_fifth() -> None:
    of_24 = [rung.recipe for rung in ladder() if rung.recipe.epochs == 24]
    assert len(of_24) == 4 and all(recipe.epochs * recipe.warmup_fraction == 5 for recipe in of_24)
    assert {rung.recipe.warmup_fraction for rung in ladder() if rung.recipe.epochs != 24} == {0.2}


def test_the_learning_rate_is_where_each_original_has_it() -> None:
    inside = {name for name in recipes.names() if recipes.named(name).lr_in_velocity}
    assert inside == {rung.recipe.name for rung in ladder()} | {"apple_8gpu"}
    assert inside == {name for name in recipes.names() if recipes.named(name).schedule_time == "end"}


def _last_of_each_trick() -> list[recipes.Rung]:
    rungs = ladder()
    return [
        rung for rung, after in zip(rungs, [*rungs[1:], None], strict=True) if after is None or after.kind == "trick"
    ]


def test_baseline_2018_has_no_trick_yet() -> None:
    # Everything at its off value, but for what the entry of 2018 had, augmentation on the CPU and cutout, and for how
    # Page's optimiser works on every rung.
    assert changed_fields(Recipe(), recipes.baseline_2018()) == {
        "preload": (True, False),
        "cutout": (0, 8),
        "lr_in_velocity": (False, True),
        "schedule_time": ("start", "end"),
        "warmup_fraction": (0.2, 5 / 24),
    }
    off = Recipe()
    assert (off.network, off.widths, off.activation, off.pool_position) == (
        "resnet9",
        (64, 128, 256, 512),
        "relu",
        "after_activation",
    )
    assert (off.global_batch_size, off.epochs, off.peak_lr, off.logit_scale) == (512, 24, 0.4, 0.125)
    assert (off.momentum, off.weight_decay, off.warmup_fraction, off.flat_epochs) == (0.9, 5e-4, 0.2, 0)
    assert (off.bn_momentum, off.bn_eps, off.crop_padding, off.flip, off.optimizer) == (0.1, 1e-5, 4, "random", "sgd")


def test_page_2019_is_as_published() -> None:
    assert changed_fields(Recipe(), recipes.page_2019()) == {
        "lr_in_velocity": (False, True),
        "schedule_time": ("start", "end"),
        "pool_position": ("after_activation", "before_norm"),
        "label_smoothing": (0.0, 0.2),
        "activation": ("relu", "celu"),
        "celu_alpha": (0.075, 0.3),
        "ghost_batch_size": (0, 32),
        "freeze_bn_scale": (False, True),
        "logit_scale": (0.125, 1 / 16),
        "bias_lr_scale": (1.0, 64.0),
        "bias_weight_decay_scale": (1.0, 1 / 64),
        "whitening_size": (0, 3),
        "peak_lr": (0.4, 1.0),
        "ema_decay": (0.0, 0.99),
        "flat_epochs": (0.0, 2.0),
        "final_lr_fraction": (0.0, 0.1),
        "tta": ("none", "flip"),
        "epochs": (24.0, 10.0),
    }
    assert recipes.page_2019().ema_every == 5


def test_the_8_gpu_recipe_is_as_published() -> None:
    recipe = recipes.apple_8gpu()
    assert recipe.to_dict() == Recipe().to_dict() | {
        "name": "apple_8gpu",
        # Parallelism and batch: 8 fixed shards of 256 images each.
        "n_shards": 8,
        "global_batch_size": 2048,
        "epochs": 18.0,
        # Network
        "pool_position": "before_norm",
        "activation": "celu",
        "celu_alpha": 0.3,
        "logit_scale": 1 / 16,
        "whitening_size": 3,
        "ghost_batch_size": 16,
        "freeze_bn_scale": True,
        # Loss and optimiser
        "label_smoothing": 0.2,
        "lr_in_velocity": True,
        "schedule_time": "end",
        "peak_lr": 1.5,
        "final_lr_fraction": 0.1,
        "flat_epochs": 2.0,
        "weight_decay": 5e-4 * 1.5,
        "bias_lr_scale": 64.0,
        "bias_weight_decay_scale": 1 / 64,
        # Evaluation
        "tta": "flip",
        # How its kernels get to a GPU
        "cuda_graph": "auto",
        "compile": "auto",
    }
    assert recipe.local_batch_size == 256 and recipe.local_batch_size // recipe.norm_group_size == 16
    assert (recipe.whitening_eps, recipe.bn_eps, recipe.bn_momentum, recipe.momentum) == (1e-2, 1e-5, 0.1, 0.9)
    assert (recipe.crop_padding, recipe.flip, recipe.cutout, recipe.ema_decay, recipe.warmup_fraction) == (
        4,
        "random",
        0,
        0,
        0.2,
    )


def test_rates_published_for_summed_losses_take_the_same_steps_on_mean_losses() -> None:
    recipe, batch = recipes.speedrun(), 1536  # there: head 0.5415, biases 0.0573, decay 1.0418e-6 an image and step
    assert recipe.peak_lr / batch == pytest.approx(0.5415)
    assert recipe.peak_lr * recipe.bias_lr_scale / batch == pytest.approx(0.0573)
    assert recipe.peak_lr * recipe.weight_decay == pytest.approx(1.0418e-6 * batch)
    bias_decay = recipe.weight_decay * recipe.bias_weight_decay_scale
    assert recipe.peak_lr * recipe.bias_lr_scale * bias_decay == pytest.approx(1.0418e-6 * batch)


def test_a_smaller_batch_keeps_the_rate_an_image_and_the_decay_a_step() -> None:
    small, large = recipes.laptop(), recipes.speedrun()
    assert (small.global_batch_size, large.global_batch_size) == (1024, 1536)
    assert small.peak_lr / 1024 == pytest.approx(large.peak_lr / 1536)
    assert small.peak_lr * small.weight_decay == pytest.approx(large.peak_lr * large.weight_decay)
    assert small.bias_lr_scale == large.bias_lr_scale
    assert small.bias_weight_decay_scale == large.bias_weight_decay_scale


def test_speedrun_has_hiverges_rates_and_runs_on_1_2_4_or_8_processes() -> None:
    changed = changed_fields(recipes.laptop(), recipes.speedrun())
    assert changed == {
        "n_shards": (1, 8),
        "ghost_batch_size": (512, 0),
        "micro_batch_size": (512, 0),
        "widths": ((64, 192, 320), (64, 256, 256)),
        "epochs": (10.0, 11.0),
        "global_batch_size": (1024, 1536),
        "peak_lr": (recipes.laptop().peak_lr, recipes.speedrun().peak_lr),
        "weight_decay": (recipes.laptop().weight_decay, recipes.speedrun().weight_decay),
        "muon_lr": (0.165, 0.205),
        "muon_momentum": (0.7, 0.655),
        "bend_fraction": (0.55, 0.0),
        "bend_lr_fraction": (1 / 3, 0.0),
        "resolutions": ((18, 18, 24, 24, 32), (24, 24, 24, 24, 28, 28, 28, 32)),
        "ema_decay": (0.97, 0.0),
        "ema_every": (2, 5),
        "ema_off_epochs": (1.0, 0.0),
        "tta_margin": (1.0, 0.5),
        "cuda_graph": ("off", "auto"),
        "compile": ("off", "auto"),
    }
    assert recipes.speedrun().norm_group_size == 192


def test_a_shortened_recipe_has_neither_small_images_nor_averages() -> None:
    assert changed_fields(recipes.laptop(), recipes.shortened(recipes.laptop(), 2.0)) == {
        "epochs": (10.0, 2.0),
        "bend_fraction": (0.55, 0.0),
        "bend_lr_fraction": (1 / 3, 0.0),
        "resolutions": ((18, 18, 24, 24, 32), ()),
        "ema_decay": (0.97, 0.0),
        "ema_off_epochs": (1.0, 0.0),
    }


def test_only_what_is_meant_for_gpus_asks_for_graphs() -> None:
    asking = {name for name in recipes.names() if recipes.named(name).cuda_graph != "off"}
    assert asking == {"speedrun", "apple_8gpu"}
    assert all(recipes.named(name).compile == recipes.named(name).cuda_graph for name in recipes.names())
