"""What all lessons share: the strip, the gain, the curves of the ladder, the networks drawn."""

from __future__ import annotations

import math

import pytest
import torch

from cifar_fast import recipes
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.experiments import rungs
from cifar_fast.experiments.rungs import TERA
from cifar_fast.teaching import lessons, network_plots
from cifar_fast.teaching.result_plots import added_and_left_out, ladder_curves, spaced
from cifar_fast.training.model import build_model

NAMES = [rung.recipe.name for rung in recipes.classroom_ladder()]


def made_up() -> list[dict]:
    """Runs of the first four rungs, with two numbers of epochs and three seeds."""
    return [
        {
            "arm": rung.recipe.name,
            "recipe": rung.recipe.to_dict(),
            "seed": seed,
            "accuracy": 0.5 + 0.02 * place + 0.1 * math.log2(epochs) + 0.001 * seed,
            "train_flop": 3 * TERA * epochs,
            "dataset": {"name": "CIFAR-10", "n_train": 50_000, "n_test": 10_000},
            "environment": {"gpu": None, "cpu": "an abacus", "cpu_capability": "wood", "threads": 1},
        }
        for epochs in (1.0, 2.0)
        for place, rung in enumerate(recipes.classroom_ladder(epochs)[:4])
        for seed in range(3)
    ]


# --- the strip ---


def test_the_strip_has_every_rung_and_picks_out_one():
    figure = lessons.strip("whitening", made_up())
    (axis,) = figure.axes
    labels = axis.get_xticklabels()
    assert [label.get_text() for label in labels] == [rungs.label(name) for name in NAMES]
    assert "no warm-up" in [label.get_text() for label in labels]  # what the rung `warmup` removes
    assert [label.get_text() for label in labels if label.get_weight() == "bold"] == ["whitening"]
    assert [text.get_text() for text in axis.texts] == ["60.1", "62.1", "64.1", "66.1", *"?" * (len(NAMES) - 4)]
    assert axis.get_title(loc="left") == "test accuracy in % after 2 epochs (6.0 TFLOP), n = 3"
    assert figure.alt.startswith("You are here: whitening, rung 2 of 8 of the ladder, where it reaches 64.1 %; ")
    longer = [run | {"recipe": run["recipe"] | {"epochs": 3.0}, "accuracy": 0.9} for run in made_up()]
    assert "after 2 epochs" in lessons.strip("whitening", [*longer, *made_up()]).alt


def test_a_trick_beside_the_ladder_comes_after_the_rung_it_is_added_to():
    figure = lessons.strip("dirac", made_up())
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:4] == ["plain", "schedule", "dirac", "whitening"] and len(labels) == len(NAMES) + 1
    assert figure.alt.startswith("You are here: dirac, beside the ladder, added to schedule; ")


def test_the_strip_shows_the_number_of_epochs_that_the_trick_itself_was_trained_for():
    two_epochs = made_up()
    arms = recipes.classroom_arms(1.0)
    one_epoch = [
        run | {"recipe": arms[run["arm"]].recipe.to_dict(), "train_flop": 3e12}
        for run in [*two_epochs, *({**run, "arm": "smoothing"} for run in two_epochs[:1])]
        if run["arm"] in arms
    ]
    figure = lessons.strip("smoothing", [*two_epochs, *one_epoch])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[-4:] == ["augmentation", "smoothing", "flip TTA", "shift TTA"]  # a single epoch has no small images
    assert "after 1 epoch" in figure.axes[0].get_title(loc="left") and "added to augmentation" in figure.alt
    assert "after 2 epochs" in lessons.strip("muon", [*two_epochs, *one_epoch[-1:]]).alt


def test_without_runs_the_strip_and_the_gain_say_so(monkeypatch):
    def none(name: str) -> list:
        raise RunError("there are no saved runs")

    monkeypatch.setattr(lessons, "saved_runs", none)
    figure = lessons.strip("muon")
    assert figure.axes[0].get_title(loc="left") == "the ladder, not measured yet"
    assert figure.alt == "You are here: muon, rung 3 of 8 of the ladder"
    assert str(lessons.gain("muon")) == "Muon for the filters: not measured yet."


def test_every_trick_of_the_ladder_has_a_strip_and_a_gain_from_the_saved_runs():
    for name in list(recipes.classroom_arms())[1:]:
        assert lessons.strip(name).alt.startswith("You are here: ")
        assert str(lessons.gain(name)).count("\n") <= 1
    for function in (lessons.strip, lessons.gain):
        with pytest.raises(RecipeError, match="no rung of the ladder adds 'plain'"):
            function("plain")


# --- the curves ---


def test_the_curves_are_those_of_the_rungs_with_runs_each_with_its_name():
    figure = ladder_curves(made_up())
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["plain", "schedule", "whitening", "muon"]
    heights = [bars.lines[0].get_ydata() for bars in axis.containers]
    assert heights[1] == pytest.approx([52.1, 62.1])
    assert all(list(bars.lines[0].get_xdata()) == [3.0, 6.0] for bars in axis.containers)
    assert axis.get_xscale() == "log" and "n = 3" in axis.get_title(loc="left")
    assert figure.alt == (
        "Test accuracy over the arithmetic of training for 4 rungs of the ladder, from 60.1 % at 6.0 TFLOP (plain) "
        "to 66.1 % at 6.0 TFLOP (muon)"
    )
    with pytest.raises(UserError, match="no run of the classroom ladder to draw"):
        ladder_curves([])


def test_the_curves_can_be_drawn_over_seconds():
    names = ("plain", "schedule", "whitening", "muon")
    steps = {name: {32: 0.1 * (place + 1)} for place, name in enumerate(names)}
    figure = ladder_curves(made_up(), steps, machine="an abacus")
    (axis,) = figure.axes
    per_epoch = 50_000 // 512
    for place, bars in enumerate(axis.containers):
        seconds = 0.1 * (place + 1) * per_epoch
        assert list(bars.lines[0].get_xdata()) == pytest.approx([seconds, 2 * seconds])
    assert axis.get_xlabel() == "time of training in s on an abacus, logarithmic"
    assert figure.alt.startswith(
        "Test accuracy over the time of training for 4 rungs of the ladder, from 60.1 % at 19.4 s"
    )
    with pytest.raises(UserError, match="no step of 'muon'"):
        ladder_curves(made_up(), {name: steps[name] for name in names[:3]})


def test_what_a_trick_gains_is_drawn_beside_what_is_lost_without_it():
    top = recipes.classroom_ladder(1.0)[-1].recipe
    arms = {"as it is": top} | {f"without {name}": recipe for name, recipe in recipes.leave_one_out(1.0).items()}
    accuracies = {"as it is": 0.8, "without muon": 0.7, "without whitening": 0.79}
    left_out = [
        made_up()[0] | {"arm": arm, "recipe": arms[arm].to_dict(), "seed": seed, "accuracy": accuracy + 0.002 * seed}
        for arm, accuracy in accuracies.items()
        for seed in range(2)
    ]
    figure = added_and_left_out(made_up(), left_out)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["whitening", "muon"]
    drawn = [bars.lines[0].get_xydata()[0] for bars in axis.containers]
    assert [x for x, _ in drawn] == pytest.approx([2.0, 2.0, 1.0, 10.0])
    assert [y for _, y in drawn] == pytest.approx([-0.16, 0.84, 0.16, 1.16])
    assert [text.get_text() for text in axis.texts] == ["+2.0", "+2.0", "+1.0", "+10.0"]
    assert "CIFAR-10, 1 epoch, n = 2 to 3" in axis.get_title(loc="left")
    assert figure.alt.endswith("when taken away: whitening +2.0 and +1.0; muon +2.0 and +10.0")


def test_labels_that_would_meet_move_apart_and_no_further_than_they_must():
    assert spaced([0, 50, 100], 10) == [0, 50, 100]
    assert spaced([0, 4], 10) == [-3, 7]
    assert spaced([0, 10, 10, 50], 10) == pytest.approx([-10 / 3, 20 / 3, 50 / 3, 50])
    assert spaced([], 10) == []


# --- the networks ---


@pytest.mark.parametrize("name", ["baseline_2018", "page_2019", "classroom", "airbench_2024"])
def test_a_network_is_drawn_with_the_shapes_and_counts_of_the_built_one(name):
    recipe = recipes.named(name)
    found = network_plots.stages(recipe)
    model = build_model(recipe, 10, torch.zeros(3), torch.ones(3))
    assert sum(stage.learned + stage.fixed for stage in found) == sum(p.numel() for p in model.parameters())
    assert found[0].shape == (3, 32, 32) and found[-1].shape == (10,)
    assert sum(stage.residual for stage in found) == (2 if recipe.network == "resnet9" else 0)
    whitened = [stage for stage in found if "whitening" in "".join(stage.does)]
    assert len(whitened) == (recipe.whitening_size > 0) and all(stage.fixed > stage.learned for stage in whitened)


def test_a_drawing_of_a_network_has_a_line_for_each_stage_and_the_sum():
    recipe = recipes.laptop()
    figure = network_plots.draw(recipe)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert "24 x 31 x 31" in said and "3x3 conv, max-pool, norm, SiLU" in said and "linear, times 1/256" in said
    learned = sum(stage.learned for stage in network_plots.stages(recipe))
    assert any(text.startswith(f"parameters: {learned:,} learned, ") for text in said)
    assert figure.alt.startswith(
        "The network convnet6 from an image of 3 x 32 x 32 values through 9 stages to 10 logits"
    )
