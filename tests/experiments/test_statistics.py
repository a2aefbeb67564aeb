"""Intervals hold what they promise, and summaries count what is there."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import MACHINE, RUNS, a_run

from cifar_fast.experiments.statistics import (
    excludes,
    mean_interval,
    reaches,
    speeds,
    spread,
    student_t_quantile,
    summarise,
    wilson_interval,
)
from cifar_fast.shown import hardware

# --- intervals ---


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 10, 0.017876, 0.404150),
        (41, 50, 0.692040, 0.902298),
    ],
)
def test_wilson_interval_against_known_values(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-6)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_a_wilson_interval_are_just_compatible_with_k_of_n(kn):
    k, n = kn
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    for end in (low, high):
        if 0 < end < 1:  # for a true share there, k / n is at the edge of the normal approximation's 95 %
            assert abs(k / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4)
    mirrored = wilson_interval(n - k, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_not_a_share_has_no_interval(k, n):
    with pytest.raises(ValueError, match=f"k={k} of n={n} is not a share"):
        wilson_interval(k, n)


def test_student_t_against_the_printed_table():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 29: 2.04523,
             49: 2.00958, 100: 1.98397, 1000: 1.96234}  # fmt: skip
    for degrees, t in table.items():
        assert student_t_quantile(degrees) == pytest.approx(t, rel=3e-6), degrees
    with pytest.raises(ValueError, match="degrees_of_freedom=0"):
        student_t_quantile(0)


def test_student_t_for_other_probabilities():
    assert student_t_quantile(10, 0.99) == pytest.approx(3.1693, abs=5e-5)
    assert student_t_quantile(1, 0.5) == pytest.approx(1.0)


@given(st.integers(1, 2000))
def test_student_t_holds_95_percent_of_the_density(degrees):
    """The density integrated by Simpson's rule, over the angle whose tangent is t / sqrt(degrees)."""
    t, n = student_t_quantile(degrees), 400
    step = math.atan(t / math.sqrt(degrees)) / n
    heights = [math.cos(i * step) ** (degrees - 1) for i in range(n + 1)]
    integral = step / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    assert 2 * constant * integral == pytest.approx(0.95, abs=1e-8)
    assert t > student_t_quantile(degrees + 1) > 1.9599


def test_mean_interval_against_a_worked_example():
    # n = 5, mean 4, standard deviation sqrt(2.5): 4 +- 2.77645 * sqrt(2.5 / 5)
    assert mean_interval([2, 3, 4, 5, 6]) == pytest.approx((4 - 1.963243, 4 + 1.963243), abs=1e-5)
    assert mean_interval([0.94]) is None and mean_interval([]) is None
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=60))
def test_mean_interval_is_around_the_mean_and_as_wide_as_its_formula(values):
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(statistics.fmean(values), abs=1e-9)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert high - low == pytest.approx(2 * student_t_quantile(len(values) - 1) * error, abs=1e-9)


def test_excludes_needs_three_runs_and_a_clear_mean():
    assert not excludes([0.9, 0.9], 0.94)
    assert excludes([0.9, 0.9, 0.9], 0.94) and excludes([0.95, 0.951, 0.949], 0.94)
    assert not excludes([0.94, 0.94, 0.94], 0.94)
    assert not excludes([0.93, 0.94, 0.955], 0.94)


def test_rounding_does_not_keep_an_accuracy_from_its_target():
    assert reaches(9370 / 10_000, 93.7 / 100) and reaches(0.1 + 0.2, 0.3) and reaches(0.3, 0.1 + 0.2)
    assert not reaches(9399 / 10_000, 0.94)


# --- summaries ---


def test_summary_of_five_runs_by_hand():
    found = summarise(RUNS, 0.94)
    assert (found["n"], found["at_target"], found["share_at_target"]) == (5, 4, 0.8)
    assert found["share_at_target_95"] == list(wilson_interval(4, 5))
    accuracy = found["accuracy"]
    assert (accuracy["min"], accuracy["median"], accuracy["max"]) == (0.9374, 0.9401, 0.9425)
    assert accuracy["mean"] == pytest.approx(0.94038)
    assert found["train_seconds"]["median"] == 9 and found["train_seconds"]["max"] == 11
    assert found["evaluate_seconds"]["mean"] == pytest.approx(0.9) and found["total_seconds"]["min"] == 14
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert json.loads(json.dumps(found)) == found
    assert summarise(RUNS[:1], 0.94)["accuracy"]["mean_95"] is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 1))
def test_the_figures_of_a_summary_agree_with_each_other(accuracies, target):
    found = summarise([a_run(i, value, 1.0 + value) for i, value in enumerate(accuracies)], target)
    values = found["accuracy"]
    assert values["min"] <= values["median"] <= values["max"]
    assert values["min"] - 1e-12 <= values["mean"] <= values["max"] + 1e-12
    assert found["at_target"] == sum(value > target - 1e-9 for value in accuracies)
    low, high = found["share_at_target_95"]
    assert 0 <= low <= found["share_at_target"] <= high <= 1


def test_a_summary_names_every_version_and_all_numerics_of_its_runs():
    other = a_run(5, 0.94, 7.0, version="0.2.0", environment=MACHINE | {"convolution": "direct"})
    found = summarise([*RUNS, other], 0.94)
    assert found["versions"] == {"cifar_fast": "0.1.0 / 0.2.0", "torch": "2.14.1", "python": "3.11.7"}
    assert found["numerics"] == "float32, winograd convolution / float32, direct convolution"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Some Processor, AVX512, 2 threads"),
        (
            {"world_size": 2, "backend": "gloo", "threads": 1},
            "Some Processor, AVX512, 2 processes (gloo), 1 thread each",
        ),
        ({"gpu": "Some GPU"}, "Some GPU"),
        ({"gpu": "Some GPU", "world_size": 8, "backend": "nccl"}, "8 x Some GPU, 8 processes (nccl)"),
    ],
)
def test_hardware_in_words(changes, words):
    assert hardware(MACHINE | changes) == words
    alone = {key: value for key, value in MACHINE.items() if key not in ("world_size", "backend")}
    assert hardware(alone) == hardware(MACHINE)


def test_spread_of_one_value_has_no_interval():
    assert spread([2.0]) == {"min": 2.0, "median": 2.0, "mean": 2.0, "mean_95": None, "max": 2.0}


def test_speeds_compare_each_way_with_the_first_round_by_round():
    assert speeds({"slow": [6, 8], "fast": [3, 2]}) == {"slow": [1, 1], "fast": [2, 4]}
