"""A recipe that exists can be run and survives JSON; any other is refused in a sentence that names the field."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_fast import recipes
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.recipe import Recipe, changed_fields, choices


@st.composite
def valid_recipes(draw: st.DrawFn) -> Recipe:
    ghost, groups, n_shards = draw(st.integers(1, 64)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    batch = ghost * groups * n_shards
    network = draw(st.sampled_from(choices("network")))
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
        tta=draw(st.sampled_from(choices("tta"))),
    )


# --- A recipe as a value ---


@given(valid_recipes())
def test_a_recipe_survives_json_and_the_way_to_another_process(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@given(valid_recipes())
def test_a_batch_is_whole_shards_and_a_shards_part_is_whole_groups(recipe: Recipe) -> None:
    assert recipe.local_batch_size * recipe.n_shards == recipe.global_batch_size
    assert recipe.local_batch_size % recipe.norm_group_size == 0
    assert recipe.norm_group_size == (recipe.ghost_batch_size or recipe.local_batch_size)


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().epochs = 1.0  # type: ignore[misc]


def test_a_list_of_widths_becomes_a_tuple() -> None:
    listed = Recipe(widths=[8, 16, 32, 64])  # type: ignore[arg-type]
    assert listed == Recipe(widths=(8, 16, 32, 64)) and hash(listed) == hash(Recipe(widths=(8, 16, 32, 64)))


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


# --- The rule of one field ---

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epochs": "ten"}, "epochs='ten' must be a number above 0"),
    ({"epochs": 0}, "epochs=0 must be a number above 0"),
    ({"epochs": float("nan")}, "epochs=nan must be a number above 0"),
    ({"epochs": float("inf")}, "epochs=inf must be a number above 0"),
    ({"epochs": 10**400}, f"epochs={10**400} must be a number above 0"),  # no float is that large
    ({"epochs": True}, "epochs=True must be a number above 0"),
    ({"weight_decay": -1e-4}, "weight_decay=-0.0001 must be a number of at least 0"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be a number of at least 0 and below 1"),
    ({"tta_margin": 1.5}, "tta_margin=1.5 must be a number of at least 0 and at most 1"),
    ({"global_batch_size": 0}, "global_batch_size=0 must be a whole number of at least 1"),
    ({"global_batch_size": 512.0}, "global_batch_size=512.0 must be a whole number of at least 1"),
    ({"n_shards": True}, "n_shards=True must be a whole number of at least 1"),
    ({"cutout": -8}, "cutout=-8 must be a whole number of at least 0"),
    ({"whitening_size": 9}, "whitening_size=9 must be a whole number of at least 0 and at most 7"),
    ({"widths": 64}, "widths=64 must be a list of whole numbers of at least 1"),
    ({"widths": "abc"}, "widths='abc' must be a list of whole numbers of at least 1"),
    ({"widths": (64, 128, 256, 0)}, "widths=(64, 128, 256, 0) must be a list of whole numbers of at least 1"),
    ({"resolutions": [18, "24"]}, "resolutions=[18, '24'] must be a list of whole numbers of at least 16"),
    ({"resolutions": (8, 32)}, "resolutions=(8, 32) must be a list of whole numbers of at least 16"),
    ({"preload": 1}, "preload=1 must be true or false"),
    ({"fuse_norm": "no"}, "fuse_norm='no' must be true or false"),
    ({"network": ["resnet9"]}, "network=['resnet9'] must be one of resnet9, convnet6"),
    ({"activation": "tanh"}, "activation='tanh' must be one of relu, celu, gelu, silu"),
    ({"cuda_graph": True}, "cuda_graph=True must be one of off, auto, on"),
    ({"name": None}, "name=None must be a string"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_with_the_field_and_what_it_may_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(wrong)
    assert str(caught.value) == message


def test_the_limits_themselves_are_allowed() -> None:
    limits = {"label_smoothing": 0, "tta_margin": 1.0, "cutout": 0, "ema_every": 1, "whitening_size": 7}
    values = limits | {"resolutions": [16], "widths": [1, 1, 1, 1], "epochs": 5e-324}
    assert Recipe.from_dict(values).to_dict() == Recipe().to_dict() | values


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_every_field_has_a_rule(field: str) -> None:
    for wrong in (None, {}, [None], object()):
        with pytest.raises(RecipeError) as caught:
            Recipe(**{field: wrong})
        assert str(caught.value).startswith(f"{field}={wrong!r} must be ")


NUMBERS = st.integers(-2, 600) | st.integers() | st.floats()
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from([*choices("flip"), "convnet6", "auto"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=1000)
@given(
    st.sampled_from([recipes.smoke(), recipes.laptop(), recipes.apple_8gpu(), recipes.page_2019()]),
    st.sampled_from([field.name for field in fields(Recipe)]),
    ANYTHING,
)
def test_any_value_makes_a_recipe_or_a_message_that_names_it(base: Recipe, field: str, value: Any) -> None:
    try:
        recipe = Recipe.from_dict(base.to_dict() | {field: value})
    except RecipeError as error:
        shown = [value, tuple(value)] if isinstance(value, list) else [value]
        assert any(f"{field}={each!r}" in str(error) for each in shown)
    else:
        kept = recipe.to_dict()[field]
        assert kept == value and type(kept) is type(value)


@pytest.mark.parametrize("values", [None, 24, "epochs", [["epochs", 24]]], ids=str)
def test_what_is_no_mapping_is_no_recipe(values: Any) -> None:
    with pytest.raises(RecipeError, match="is not a recipe; a recipe maps the names of fields to values"):
        Recipe.from_dict(values)


@pytest.mark.parametrize("more", [{}, {3: 4}], ids=str)
def test_an_unknown_field_is_refused_and_the_known_ones_are_listed(more: dict[Any, Any]) -> None:
    unknown = ", ".join([*map(str, more), "epoch", "lr"])
    with pytest.raises(RecipeError, match=f"unknown recipe field {unknown}; the fields are activation, .*peak_lr"):
        Recipe.from_dict({"lr": 0.4, "epoch": 24, "cutout": 8} | more)


def test_the_choices_of_a_field_are_those_that_make_a_recipe() -> None:
    assert choices("flip") == ("none", "random", "alternating")
    for position in choices("pool_position"):
        assert Recipe(pool_position=position).pool_position == position  # type: ignore[arg-type]
    for field in ("epochs", "widths", "colour"):
        with pytest.raises(RecipeError, match=f"no list of choices for {field}; it has one for activation, .*tta"):
            choices(field)


def test_a_recipe_error_is_one_for_people() -> None:
    assert issubclass(RecipeError, UserError) and issubclass(RecipeError, ValueError)


# --- The rules that join several fields ---

AT_ODDS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"widths": (64, 128, 256)}, ("widths=(64, 128, 256)", "4", "network='resnet9'")),
    ({"network": "convnet6", "widths": (8, 8, 8, 8)}, ("widths=(8, 8, 8, 8)", "3", "network='convnet6'")),
    ({"whitening_size": 2}, ("whitening_size=2", "odd", "network='resnet9'")),
    ({"epochs": 5.0, "flat_epochs": 4.5}, ("flat_epochs=4.5", "epochs=5.0", "warmup_fraction=0.2")),
    (
        {"bend_fraction": 0.9, "flat_epochs": 4.8},
        ("bend_fraction=0.9", "0.8 of the epochs", "epochs=24.0", "flat_epochs=4.8"),
    ),
    ({"bend_fraction": 0.1}, ("bend_fraction=0.1", "warmup_fraction=0.2")),
    ({"global_batch_size": 512, "n_shards": 3}, ("global_batch_size=512", "n_shards=3")),
    ({"ghost_batch_size": 48}, ("ghost_batch_size=48", "512")),
    ({"ghost_batch_size": 1024}, ("ghost_batch_size=1024", "512")),
    # It divides the global batch, but would cross from one shard into the next.
    ({"ghost_batch_size": 128, "n_shards": 8}, ("ghost_batch_size=128", "64", "n_shards=8")),
    ({"ghost_batch_size": 32, "micro_batch_size": 48}, ("micro_batch_size=48", "ghost_batch_size=32")),
    ({"ghost_batch_size": 32, "micro_batch_size": 96}, ("micro_batch_size=96", "global_batch_size=512")),
    ({"micro_batch_size": 256}, ("micro_batch_size=256", "512")),
]


@pytest.mark.parametrize(("values", "named"), AT_ODDS, ids=lambda value: str(value)[:60])
def test_fields_at_odds_are_refused_with_their_values(values: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    for words in named:
        assert words in str(caught.value)


def test_replace_checks_again() -> None:
    with pytest.raises(RecipeError, match="ghost_batch_size=16 does not divide the local batch of 250"):
        replace(recipes.apple_8gpu(), global_batch_size=2000)
