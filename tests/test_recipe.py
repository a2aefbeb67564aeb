"""A recipe that exists can be run, survives JSON, and the named ones have the published numbers."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_fast import recipes
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.recipe import CHOICES, Recipe, changed_fields
from cifar_fast.recipes import ladder

TUNING = {"epochs", "peak_lr", "cutout"}


@st.composite
def valid_recipes(draw: st.DrawFn) -> Recipe:
    ghost, groups, n_shards = draw(st.integers(1, 64)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    batch = ghost * groups * n_shards
    network = draw(st.sampled_from(CHOICES["network"]))
    n_widths = 4 if network == "resnet9" else 3
    return Recipe(
        name=draw(st.text(max_size=8)),
        network=network,
        widths=tuple(draw(st.lists(st.integers(1, 512), min_size=n_widths, max_size=n_widths))),
        whitening_size=draw(st.sampled_from((0, 3, 5) if network == "resnet9" else (2, 3, 4))),
        n_shards=n_shards,
        global_batch_size=batch,
        ghost_batch_size=draw(st.sampled_from((0, ghost))),
        resolutions=tuple(draw(st.lists(st.integers(16, 64), max_size=3))),
        epochs=draw(st.floats(0.1, 100)),
        label_smoothing=draw(st.floats(0, 0.99)),
        preload=draw(st.booleans()),
        tta=draw(st.sampled_from(CHOICES["tta"])),
    )


# --- A recipe as a value ---


@given(valid_recipes())
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_named_recipe_survives_json_and_is_filed_under_its_name(name: str) -> None:
    recipe = recipes.named(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(valid_recipes())
def test_a_batch_is_whole_shards_and_a_shards_part_is_whole_groups(recipe: Recipe) -> None:
    assert recipe.local_batch_size * recipe.n_shards == recipe.global_batch_size
    assert recipe.local_batch_size % recipe.norm_group_size == 0
    assert recipe.norm_group_size == (recipe.ghost_batch_size or recipe.local_batch_size)


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().epochs = 1.0  # type: ignore[misc]


def test_changed_fields_names_what_differs_and_leaves_out_the_name() -> None:
    a = Recipe(name="a")
    assert changed_fields(a, replace(a, name="b")) == {}
    assert changed_fields(a, replace(a, name="b", epochs=3.0, cutout=8)) == {"epochs": (24.0, 3.0), "cutout": (0, 8)}


def test_every_field_has_its_line_of_documentation() -> None:
    (definition,) = ast.parse(inspect.getsource(Recipe)).body
    assert isinstance(definition, ast.ClassDef)
    documented = {
        before.target.id
        for before, after in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr)
    }
    assert documented == {field.name for field in fields(Recipe)}


# --- What cannot be ---

WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"epochs": -1.0}, ("epochs=-1.0", "above 0")),
    ({"epochs": 0.0}, ("epochs=0.0", "above 0")),
    ({"epochs": float("nan")}, ("epochs=nan",)),
    ({"epochs": float("inf")}, ("epochs=inf",)),
    ({"epochs": "ten"}, ("epochs='ten'",)),
    ({"global_batch_size": 0}, ("global_batch_size=0",)),
    ({"n_shards": 0}, ("n_shards=0",)),
    ({"peak_lr": 0.0}, ("peak_lr=0.0",)),
    ({"peak_lr": float("nan")}, ("peak_lr=nan",)),
    ({"weight_decay": -1e-4}, ("weight_decay=-0.0001", "at least 0")),
    ({"crop_padding": -1}, ("crop_padding=-1",)),
    ({"cutout": -8}, ("cutout=-8",)),
    ({"label_smoothing": 1.0}, ("label_smoothing=1.0", "below 1")),
    ({"momentum": 1.0}, ("momentum=1.0", "below 1")),
    ({"ema_decay": 1.0}, ("ema_decay=1.0", "below 1")),
    ({"ema_every": 0}, ("ema_every=0",)),
    ({"bend_fraction": 0.9, "flat_epochs": 4.8}, ("bend_fraction=0.9", "0.8 of the epochs")),
    ({"bend_fraction": 0.1}, ("bend_fraction=0.1", "warmup_fraction=0.2")),
    ({"ema_off_epochs": -1.0}, ("ema_off_epochs=-1.0", "at least 0")),
    ({"lookahead_every": 0}, ("lookahead_every=0",)),
    ({"activation": "tanh"}, ("activation='tanh'", "relu, celu, gelu")),
    ({"network": "vgg"}, ("network='vgg'", "resnet9, convnet6")),
    ({"tta_margin": 1.5}, ("tta_margin=1.5", "at most 1")),
    ({"cuda_graph": "yes"}, ("cuda_graph='yes'", "off, auto, on")),
    ({"compile": True}, ("compile=True", "off, auto, on")),
    ({"precision": "float8"}, ("precision='float8'", "bfloat16")),
    ({"flip": True}, ("flip=True", "alternating")),
    ({"widths": (64, 128, 256)}, ("widths=(64, 128, 256)", "4", "resnet9")),
    ({"widths": (64, 128, 256, 0)}, ("widths=(64, 128, 256, 0)", "positive")),
    ({"network": "convnet6", "widths": (8, 8, 8, 8), "whitening_size": 2}, ("widths=(8, 8, 8, 8)", "3", "convnet6")),
    ({"network": "convnet6", "widths": (8, 8, 8), "whitening_size": 9}, ("whitening_size=9", "at most 7")),
    ({"whitening_size": 2}, ("whitening_size=2", "odd", "resnet9")),
    ({"global_batch_size": 40.0}, ("global_batch_size=40.0", "whole number")),
    ({"resolutions": (16.5,)}, ("resolutions=(16.5,)", "whole numbers")),
    ({"resolutions": 18}, ("resolutions=18", "a list of whole numbers")),
    ({"preload": "no"}, ("preload='no'", "true or false")),
    ({"resolutions": (8, 32)}, ("resolutions=(8, 32)", "16")),
    ({"epochs": 5.0, "flat_epochs": 4.5}, ("flat_epochs=4.5", "epochs=5.0", "warmup_fraction=0.2")),
    ({"global_batch_size": 512, "n_shards": 3}, ("global_batch_size=512", "n_shards=3")),
    ({"ghost_batch_size": 48}, ("ghost_batch_size=48", "512")),
    ({"ghost_batch_size": 1024}, ("ghost_batch_size=1024", "512")),
    # It divides the global batch, but would cross from one shard into the next.
    ({"ghost_batch_size": 128, "n_shards": 8}, ("ghost_batch_size=128", "64", "n_shards=8")),
    ({"ghost_batch_size": 32, "micro_batch_size": 48}, ("micro_batch_size=48", "32")),
    ({"ghost_batch_size": 32, "micro_batch_size": 96}, ("micro_batch_size=96", "global_batch_size=512")),
    ({"micro_batch_size": 256}, ("micro_batch_size=256", "512")),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_an_impossible_recipe_is_refused_with_its_value(wrong: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**wrong)
    for words in said:
        assert words in str(caught.value)


def test_an_unknown_field_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(RecipeError, match="unknown recipe field epoch, lr;") as caught:
        Recipe.from_dict({"lr": 0.4, "epoch": 24, "cutout": 8})
    assert "peak_lr" in str(caught.value) and "epochs" in str(caught.value)


def test_replace_checks_again() -> None:
    with pytest.raises(RecipeError, match="ghost_batch_size=16 does not divide the local batch of 250"):
        replace(recipes.apple_8gpu(), global_batch_size=2000)


def test_an_unknown_recipe_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(RecipeError, match="there is no recipe 'page2019'") as caught:
        recipes.named("page2019")
    assert all(name in str(caught.value) for name in recipes.names())


def test_a_recipe_error_is_one_for_people() -> None:
    assert issubclass(RecipeError, UserError) and issubclass(RecipeError, ValueError)


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
        if rung.kind == "trick":
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


def _last_of_each_trick() -> list[recipes.Rung]:
    rungs = ladder()
    return [
        rung for rung, after in zip(rungs, [*rungs[1:], None], strict=True) if after is None or after.kind == "trick"
    ]


def test_baseline_2018_has_no_trick_yet() -> None:
    # Everything at its off value, but for what the entry of 2018 had: augmentation on the CPU, and cutout.
    assert changed_fields(Recipe(), recipes.baseline_2018()) == {"preload": (True, False), "cutout": (0, 8)}
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
    recipe, batch = recipes.laptop(), 1536  # there: head 0.5415, biases 0.0573, decay 1.0418e-6 an image and step
    assert recipe.peak_lr / batch == pytest.approx(0.5415)
    assert recipe.peak_lr * recipe.bias_lr_scale / batch == pytest.approx(0.0573)
    assert recipe.peak_lr * recipe.weight_decay == pytest.approx(1.0418e-6 * batch)
    bias_decay = recipe.weight_decay * recipe.bias_weight_decay_scale
    assert recipe.peak_lr * recipe.bias_lr_scale * bias_decay == pytest.approx(1.0418e-6 * batch)


def test_speedrun_has_hiverges_rates_and_runs_on_1_2_4_or_8_processes() -> None:
    changed = changed_fields(recipes.laptop(), recipes.speedrun())
    assert changed == {
        "n_shards": (1, 8),
        "ghost_batch_size": (512, 0),
        "micro_batch_size": (512, 0),
        "epochs": (11.0, 9.0),
        "bend_fraction": (6 / 11, 0.0),
        "bend_lr_fraction": (1 / 3, 0.0),
        "resolutions": ((18, 18, 24, 24, 32), ()),
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
        "epochs": (11.0, 2.0),
        "bend_fraction": (6 / 11, 0.0),
        "bend_lr_fraction": (1 / 3, 0.0),
        "resolutions": ((18, 18, 24, 24, 32), ()),
        "ema_decay": (0.97, 0.0),
        "ema_off_epochs": (1.0, 0.0),
    }


def test_only_what_is_meant_for_gpus_asks_for_graphs() -> None:
    asking = {name for name in recipes.names() if recipes.named(name).cuda_graph != "off"}
    assert asking == {"speedrun", "apple_8gpu"}
    assert all(recipes.named(name).compile == recipes.named(name).cuda_graph for name in recipes.names())


@pytest.mark.parametrize("widths", [(8, 16, 32), [8, 16, 32]])
def test_widths_may_be_a_tuple_or_a_list(widths):
    assert list(replace(recipes.laptop(), widths=widths).widths) == [8, 16, 32]
