"""A rung's gain is a paired difference, and its worth in arithmetic an interpolation along the curve below."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from cifar_fast import recipes
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments import rungs
from cifar_fast.experiments.statistics import mean_interval

NAMES = [rung.recipe.name for rung in recipes.classroom_ladder()]


def run(name: str, epochs: float, seed: int, accuracy: float, flop: float | None = None) -> dict[str, Any]:
    """A made-up line of the ladder's results; its arithmetic is a TFLOP an epoch."""
    (recipe,) = [rung.recipe for rung in recipes.classroom_ladder(epochs) if rung.recipe.name == name]
    return {
        "arm": name,
        "recipe": recipe.to_dict(),
        "seed": seed,
        "accuracy": accuracy,
        "train_flop": flop or 1e12 * epochs,
        "dataset": {"name": "CIFAR-10", "n_train": 50_000, "n_test": 10_000},
        "environment": {"gpu": None, "cpu": "an abacus", "cpu_capability": "wood", "threads": 1},
    }


def ladder(gain: float, *, budgets: tuple[float, ...] = (1.0, 2.0, 4.0), per_doubling: float = 0.1) -> list[Any]:
    """Runs of `muon` and of `whitening` below it, whose accuracy rises by `per_doubling`; both have a little noise."""
    noise = (-0.003, 0.001, 0.0, 0.002, 0.0)
    return [
        run(name, epochs, seed, 0.5 + per_doubling * math.log2(epochs) + add + noise[(seed + shift) % 5])
        for epochs in budgets
        for name, add, shift in (("whitening", 0.0, 0), ("muon", gain, 2))
        for seed in range(5)
    ]


def test_the_difference_is_paired_by_seed_at_the_most_epochs_with_the_most_seeds():
    runs = ladder(0.02) + [run("whitening", 8.0, 0, 0.9), run("muon", 8.0, 0, 0.1), run("muon", 2.0, 9, 0.0)]
    found = rungs.gain("muon", reversed(runs))
    assert (found.epochs, len(found.differences)) == (4.0, 5)
    assert found.points == pytest.approx(2.0)
    assert found.interval == pytest.approx(mean_interval(found.differences))
    below = {
        line["seed"]: line["accuracy"] for line in runs if line["arm"] == "whitening" and line["train_flop"] == 4e12
    }
    above = {line["seed"]: line["accuracy"] for line in runs if line["arm"] == "muon" and line["train_flop"] == 4e12}
    assert found.differences == pytest.approx([100 * (above[seed] - below[seed]) for seed in range(5)])


def test_a_trick_is_compared_with_what_it_was_added_to_at_those_epochs():
    single = {"augmentation": 0.5, "tta_flip": 0.51}
    runs = [run(name, 1.0, seed, accuracy) for name, accuracy in single.items() for seed in (0, 1)]
    runs += [run(name, 2.0, 0, 0.6 + add) for name, add in (("small_images", 0.0), ("tta_flip", 0.02))]
    found = rungs.gain("tta_flip", runs)
    assert found.epochs == 1.0 and found.differences == pytest.approx((1.0, 1.0))
    assert rungs.gain("tta_flip", runs[4:]).points == pytest.approx(2.0)


def test_a_gain_of_a_fifth_of_a_doubling_is_worth_a_fifth_of_a_doubling():
    found = rungs.gain("muon", ladder(0.02)).saving
    assert found and found.factor == pytest.approx(2**0.2) and not found.more
    assert found.epochs == 2.0  # at four, the curve below ends before
    assert found.interval and found.interval[0] < found.factor < found.interval[1] < 1.3


def test_a_trick_that_saves_arithmetic_at_the_same_accuracy_is_worth_it():
    runs = [line | {"train_flop": line["train_flop"] / (1.5 if line["arm"] == "muon" else 1)} for line in ladder(0.0)]
    found = rungs.gain("muon", runs)
    assert found.points == pytest.approx(0.0)
    assert found.saving and found.saving.factor == pytest.approx(1.5)


def test_what_costs_accuracy_has_a_factor_below_one():
    found = rungs.gain("muon", ladder(-0.02)).saving
    assert found and found.factor == pytest.approx(2**-0.2) and found.interval and found.interval[1] < 1


def test_beyond_the_curve_there_is_a_bound_and_from_one_budget_or_seed_nothing():
    found = rungs.gain("muon", ladder(0.5)).saving
    assert found and found.more and found.factor == pytest.approx(4.0)
    assert str(found) == "more than 4.0 times the arithmetic (n = 5)"
    assert rungs.gain("muon", ladder(0.02, budgets=(2.0,))).saving is None
    assert rungs.gain("muon", [line for line in ladder(0.02) if line["seed"] == 0]).saving is None


def test_the_curve_below_follows_what_a_trick_is_added_to_and_takes_three_seeds():
    """`tta_flip` is added to `augmentation` at one epoch, and to `small_images` at two and more."""
    gained = {"augmentation": 0.0, "small_images": 0.0, "tta_flip": 0.02}
    runs = [
        run(name, epochs, seed, 0.5 + 0.1 * math.log2(epochs) + gained[name], 1e12 * epochs)
        for name in gained
        for epochs in (1.0, 2.0)
        if (name, epochs) != ("small_images", 1.0)
        for seed in range(2 if (name, epochs) == ("augmentation", 2.0) else 4)
    ]
    found = rungs.gain("tta_flip", runs).saving
    assert found and (found.epochs, found.n) == (1.0, 4) and found.factor == pytest.approx(2**0.2)
    assert str(found).startswith("1.15 times the arithmetic (95 % interval 1.15 to 1.15, n = 4)")
    assert rungs.gain("small_images", runs).saving is None  # too few runs of `augmentation` at two epochs
    more = [run("augmentation", 2.0, seed, 0.6, 2e12) for seed in (2, 3)]
    found = rungs.gain("small_images", [*runs, *more]).saving
    assert found and (found.epochs, found.n) == (2.0, 4) and found.factor == pytest.approx(1.0)


def test_points_without_the_seeds_of_the_others_are_left_out():
    runs = ladder(0.02)
    others = [run("muon", 8.0, seed, 0.9) for seed in (7, 8, 9)]
    assert rungs.gain("muon", runs + others).saving == rungs.gain("muon", runs).saving
    # Three seeds at each point, but only two that all share
    few = [line for line in runs if line["seed"] in ((0, 1, 2) if line["arm"] == "muon" else (1, 2, 3))]
    assert rungs.gain("muon", few).saving is None


def test_the_interval_of_a_saving_holds_what_it_should():
    """In 95 of 100 experiments with noisy runs of five seeds."""
    noise, held = random.Random(0), 0

    def accuracy(epochs: float) -> float:
        return 0.5 + 0.1 * math.log2(epochs) + noise.gauss(0, 0.004)

    def curve(gain: float) -> list[rungs.Point]:
        return [rungs.Point(n, 1e12 * n, {seed: gain + accuracy(n) for seed in range(5)}) for n in (1.0, 2.0)]

    for _ in range(1000):
        lower, upper = curve(0.0), curve(0.02)
        found = rungs.saving(lower, upper[:1])
        held += bool(found and found.interval and found.interval[0] <= 2**0.2 <= found.interval[1])
    assert 930 <= held <= 970


def test_a_gain_says_in_words_what_was_measured_and_where():
    said = str(rungs.gain("muon", ladder(0.02)))
    first, where = said.splitlines()
    assert first.startswith("Muon for the filters: +2.00 points of test accuracy (95 % interval +1.")
    assert "Without it, the accuracy of 2 epochs takes 1.15 times the arithmetic (95 % interval 1.1" in first
    assert where == (
        "n = 5 pairs of runs with the same seed, 4 epochs; "
        "data set: CIFAR-10 (50,000 training and 10,000 test images); hardware: an abacus, wood, 1 thread"
    )
    shown = rungs.gain("muon", ladder(0.02))._repr_html_()
    assert "<b>Muon for the filters</b>: +2.00 points" in shown and "an abacus" in shown


def test_a_rung_without_runs_is_not_measured_yet():
    for runs in ([], ladder(0.02)):
        assert str(rungs.gain("tta", runs)) == "Test-time augmentation with shifts as well: not measured yet."
    assert str(rungs.gain("muon", [run("muon", 2.0, 0, 0.5)])).endswith(": not measured yet.")


def test_runs_of_another_ladder_do_not_count():
    runs = ladder(0.02)
    for line in runs:
        line["recipe"] = line["recipe"] | {"peak_lr": 0.3}
    assert "not measured yet" in str(rungs.gain("muon", runs))
    older = [line | {"recipe": line["recipe"] | {"a field that is gone": 1}} for line in ladder(0.02)]
    assert rungs.ladder_runs(older) == []


@pytest.mark.parametrize("name", ["plain", "nonsense"])
def test_a_name_that_adds_no_trick_is_refused_with_those_that_do(name):
    with pytest.raises(RecipeError, match=f"no rung of the ladder adds '{name}'; .* are {', '.join(NAMES[1:])}, dirac"):
        rungs.gain(name, [])


def test_the_table_has_a_line_for_each_rung_and_number_of_epochs():
    said = rungs.ladder_table(ladder(0.02)).splitlines()
    assert [line.split()[:4] for line in said[1:7]] == [
        [name, below, epochs, "5"]
        for name, below in (("whitening", "schedule"), ("muon", "whitening"))
        for epochs in ("1", "2", "4")
    ]
    assert "+2.00 (" in said[4] and said[4].endswith("n = 5")
    assert any(line.startswith("muon, 2 epochs: 1.15 times the arithmetic") for line in said)
    assert said[-1] == "hardware: an abacus, wood, 1 thread"


# --- added and left out ---


def without(arm: str, seed: int, accuracy: float, epochs: float = 1.0) -> dict[str, Any]:
    """A made-up line that `benchmarks/ablation.py --leave-one-out` would save; arms are `as it is` or a trick."""
    top = recipes.classroom_ladder(epochs)[-1].recipe
    recipe = top if arm == "as it is" else recipes.leave_one_out(epochs)[arm]
    name = arm if recipe is top else f"without {arm}"
    return run("tta", epochs, seed, accuracy) | {"arm": name, "recipe": recipe.to_dict()}


def test_a_trick_s_gain_stands_beside_what_the_top_loses_without_it():
    added = [line for line in ladder(0.02) if line["seed"] < 3]
    evaluated = {"augmentation": 0.7, "tta_flip": 0.715, "tta": 0.72}
    added += [run(name, 1.0, seed, accuracy) for name, accuracy in evaluated.items() for seed in (0, 1)]
    left_out = [without("as it is", seed, 0.72) for seed in (1, 2, 3)]
    left_out += [without("muon", 1, 0.62), without("muon", 2, 0.61), without("muon", 9, 0.0)]
    left_out += [without("whitening", 1, 0.6)]  # the ladder has no runs of the rung below it
    found = rungs.added_and_left_out(added, left_out)
    assert list(found) == ["muon", "tta_flip", "tta"]
    assert {each.epochs for each in found.values()} == {1.0}
    assert found["muon"].gains == pytest.approx((2.3, 2.1, 2.0))
    assert found["muon"].losses == pytest.approx((10.0, 11.0))
    # Without mirror images there are no shifts of them either.
    assert found["tta_flip"].gains == pytest.approx((1.5, 1.5))
    assert found["tta_flip"].losses == pytest.approx((2.0, 2.0))
    assert found["tta"].gains == found["tta"].losses == pytest.approx((0.5, 0.5))


def test_runs_that_left_out_a_trick_must_be_of_one_length_and_of_this_ladder():
    runs = [without("as it is", 0, 0.7), without("muon", 0, 0.6)]
    with pytest.raises(UserError, match="trained for 1, 2 epochs; give those of one number of epochs"):
        rungs.added_and_left_out(ladder(0.02), [*runs, without("muon", 0, 0.6, 2.0)])
    with pytest.raises(UserError, match="trained for no epochs"):
        rungs.added_and_left_out(ladder(0.02), [])
    runs[1]["recipe"]["peak_lr"] = 0.3
    with pytest.raises(UserError, match="no trick of today's ladder was both added and left out"):
        rungs.added_and_left_out(ladder(0.02), runs)


# --- seconds ---


def test_a_rung_s_seconds_are_those_of_its_steps_at_each_size():
    steps = {"plain": {32: 2.0}, "augmentation": {32: 3.0}, "small_images": {16: 0.1, 24: 0.5, 32: 3.0}}
    per_epoch = 50_000 // 512
    assert rungs.train_seconds("plain", 1.5, steps) == pytest.approx(1.5 * per_epoch * 2.0)
    # Five epochs: two at 16 pixels, two at 24, one at 32. What only evaluates takes as long as what it evaluates.
    for name in ("small_images", "tta_flip", "tta"):
        assert rungs.train_seconds(name, 5.0, steps) == pytest.approx(per_epoch * (2 * 0.1 + 2 * 0.5 + 3.0))
    assert rungs.train_seconds("tta", 1.0, steps) == pytest.approx(per_epoch * 3.0)
    with pytest.raises(UserError, match=r"no step of 'muon' with images of 32 pixels was timed; .*ladder_seconds.py"):
        rungs.train_seconds("muon", 1.0, steps)
    with pytest.raises(UserError, match="no step of 'small_images' with images of 16 pixels"):
        rungs.train_seconds("tta", 5.0, {"small_images": {24: 0.5, 32: 3.0}})
