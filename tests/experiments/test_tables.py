"""Intervals are right, summaries count what is there, and no figure stands beside one of another data set."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_fast.experiments.published import APPLE_2019, CIFAR10_FINGERPRINT, LADDER_2019, RECORDS
from cifar_fast.experiments.statistics import (
    excludes,
    hardware,
    mean_interval,
    reaches,
    spread,
    student_t_quantile,
    summarise,
    wilson_interval,
)
from cifar_fast.experiments.tables import comparison_table, run_log, turns_table
from cifar_fast.recipes import apple_8gpu, ladder

CIFAR10 = {"name": "CIFAR-10", "fingerprint": CIFAR10_FINGERPRINT, "n_train": 50_000, "n_test": 10_000}
MACHINE = {
    "device": "cpu", "gpu": None, "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 2, "torch": "2.14.1",
    "python": "3.11.7", "precision": "float32", "convolution": "winograd", "world_size": 1, "backend": None,
}  # fmt: skip


def a_run(number: int, accuracy: float, seconds: float, **changes) -> dict:
    """A line of results.jsonl, made up."""
    epoch = {"epoch": 1, "train_loss": 1.25, "train_accuracy": 0.875, "test_loss": 0.5, "test_accuracy": accuracy}
    clocks = {"train_seconds": seconds, "evaluate_seconds": seconds / 10, "total_seconds": 2 * seconds}
    line = {"run": number, "seed": number, "target": 0.94, "version": "0.1.0", "accuracy": accuracy, "loss": 0.5}
    recipe = apple_8gpu().to_dict()
    return line | clocks | {"recipe": recipe, "dataset": CIFAR10, "environment": MACHINE, "epochs": [epoch]} | changes


RUNS = [a_run(i, accuracy, 7 + i) for i, accuracy in enumerate((0.9401, 0.94, 0.9374, 0.9419, 0.9425))]


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
def test_the_ends_of_a_wilson_interval_are_the_shares_that_k_of_n_is_just_compatible_with(kn):
    k, n = kn
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    for end in (low, high):
        if 0 < end < 1:  # there the normal approximation has the k / n that was seen at the edge of its 95 %
            assert abs(k / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4)
    mirrored = wilson_interval(n - k, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_share_no_interval(k, n):
    with pytest.raises(ValueError, match=f"k={k} of n={n}"):
        wilson_interval(k, n)


def test_student_t_against_the_printed_table():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 29: 2.04523,
             49: 2.00958, 100: 1.98397, 1000: 1.96234}  # fmt: skip
    for degrees, t in table.items():
        assert student_t_quantile(degrees) == pytest.approx(t, rel=3e-6), degrees
    with pytest.raises(ValueError, match="degrees_of_freedom=0"):
        student_t_quantile(0)


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


def test_accuracy_at_the_target_reaches_it_whatever_rounding_made_of_it():
    assert reaches(9370 / 10_000, 93.7 / 100) and reaches(0.1 + 0.2, 0.3) and reaches(0.3, 0.1 + 0.2)
    assert not reaches(9399 / 10_000, 0.94)


# --- summary and text ---


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
def test_summary_holds_together(accuracies, target):
    found = summarise([a_run(i, value, 1.0 + value) for i, value in enumerate(accuracies)], target)
    values = found["accuracy"]
    assert values["min"] <= values["median"] <= values["max"]
    assert values["min"] - 1e-12 <= values["mean"] <= values["max"] + 1e-12
    assert found["at_target"] == sum(value > target - 1e-9 for value in accuracies)
    low, high = found["share_at_target_95"]
    assert 0 <= low <= found["share_at_target"] <= high <= 1


def test_summary_names_every_version_and_way_to_compute_that_the_runs_had():
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


def test_run_log_has_a_line_a_run_and_the_originals_closing_summary():
    text = run_log(RUNS, 0.94)
    for words in ("recipe: apple_8gpu", "CIFAR-10 (50,000 training", CIFAR10_FINGERPRINT, "Some Processor", "2.14.1"):
        assert words in text
    assert re.findall(r"^ +(\d) +(\d) +87\.50 +1\.2500 +([\d.]+) +0\.5000 +([\d.]+)$", text, re.MULTILINE) == [
        (str(i), str(i), f"{100 * run['accuracy']:.2f}", f"{7 + i}.00") for i, run in enumerate(RUNS)
    ]
    assert text.endswith(
        "runs: 5\nwall time: max 11.00 s, median 9.00 s\nvalidation accuracy: lowest 93.74 %, median 94.01 %\n"
        "runs at 94.00 % or more: 4 of 5 (80.0 %, 95 % interval 37.6 to 96.4)\n"
    )


def test_comparison_shows_both_columns_with_what_they_stand_on():
    text = comparison_table(summarise(RUNS, 0.94))
    assert "NOT COMPARABLE" not in text
    rows = {row[0]: row[1:] for line in text.splitlines() if len(row := re.split(r"  +", line)) == 3}
    assert rows["n"] == ["5 runs", "50 runs"]
    assert rows["at 94.00 %"][1] == "41 of 50 (82.0 %, 95 % interval 69.2 to 90.2)"
    assert rows["accuracy min"] == ["93.74 %", "93.74 %"] and rows["accuracy median"] == ["94.01 %", "94.19 %"]
    assert rows["train_seconds mean"][1] == "7.81 s" and rows["train_seconds max"] == ["11.00 s", "10.31 s"]
    assert rows["hardware"] == ["Some Processor, AVX512, 2 threads", "8 V100-SXM2 32 GB, one 20-core Xeon Gold 6148"]
    assert rows["data set"][0].startswith("CIFAR-10 (50,000") and rows["versions"][0].startswith(
        "cifar_fast 0.1.0, torch"
    )
    assert APPLE_2019.source in text


def test_another_data_set_is_loudly_not_comparable_even_under_the_same_name():
    for data in ({"name": "synthetic"}, {"name": "CIFAR-10"}):
        runs = [run | {"dataset": CIFAR10 | data | {"fingerprint": "0123456789abcdef"}} for run in RUNS]
        text = comparison_table(summarise(runs, 0.94))
        assert text.startswith("!!!") and f"NOT COMPARABLE: these runs are of the data set {data['name']}" in text
        assert re.search(r"^data set .*CIFAR-10: NOT COMPARABLE$", text, re.MULTILINE)


def test_another_target_does_not_get_the_published_share_as_its_own():
    text = comparison_table(summarise(RUNS, 0.95))
    assert re.search(r"^at 95\.00 % +0 of 5 .* 41 of 50 .* at 94\.00 %$", text, re.MULTILINE)


def test_turns_table_gives_rates_and_the_speed_against_the_first_way() -> None:
    _, first, second = turns_table({"slow": [6.0, 8.0], "fast": [3.0, 2.0]}, 700).splitlines()
    assert first.split() == ["slow", "100.0", "1.00", "1.00", "to", "1.00"]
    assert second.split() == ["fast", "280.0", "3.00", "2.00", "to", "4.00"]


def test_published_figures_are_those_of_the_paper_trail():
    assert (APPLE_2019.at_target, APPLE_2019.runs, APPLE_2019.target) == (41, 50, 0.94)
    assert (APPLE_2019.min_accuracy, APPLE_2019.median_accuracy) == (0.9374, 0.9419)
    assert (APPLE_2019.mean_seconds, APPLE_2019.max_seconds) == (7.81, 10.31)
    assert "1 of 50 (2.0 %" in comparison_table(summarise(RUNS, 0.94), replace(APPLE_2019, at_target=1))


def test_the_published_ladder_and_the_records_agree_with_the_recipes():
    names = [rung.recipe.name for rung in ladder()]
    assert [name for name in names if name in LADDER_2019] == list(LADDER_2019)  # all are rungs, in their order
    assert sorted(LADDER_2019.values(), reverse=True) == list(LADDER_2019.values())
    by_recipe = {record.added.split(": ")[-1]: record.seconds for record in RECORDS}
    assert {name: by_recipe[name] for name in ("baseline_2018", "page_2019")} == {
        name: LADDER_2019[name] for name in ("baseline_2018", "page_2019")
    }
    assert [record.year for record in RECORDS] == sorted(record.year for record in RECORDS)


def test_official_cifar10_has_the_fingerprint_that_the_comparison_asks_for(real_data):
    assert real_data.fingerprint == CIFAR10_FINGERPRINT


def test_spread_of_one_value_has_no_interval():
    assert spread([2.0]) == {"min": 2.0, "median": 2.0, "mean": 2.0, "mean_95": None, "max": 2.0}
