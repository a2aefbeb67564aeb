"""Run logs and comparisons show what was measured, and no figure stands beside one of another data set."""

from __future__ import annotations

import re
from dataclasses import replace

from made_up import CIFAR10, CIFAR10_FINGERPRINT, RUNS

from cifar_fast import recipes
from cifar_fast.experiments.benchmark import Benchmark
from cifar_fast.experiments.published import APPLE_2019
from cifar_fast.experiments.statistics import summarise
from cifar_fast.experiments.tables import comparison_table, mean_and_half_width, rounded, run_log, turns_table
from cifar_fast.shown import html_table


def test_the_run_log_has_a_line_for_each_run_and_the_originals_closing_summary():
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


def test_the_comparison_shows_both_columns_with_n_hardware_versions_and_data_set():
    text = comparison_table(summarise(RUNS, 0.94))
    assert "NOT COMPARABLE" not in text
    rows = {row[0]: row[1:] for line in text.splitlines() if len(row := re.split(r"  +", line)) == 3}
    assert rows["n"] == ["5 runs", "50 runs"]
    assert rows["at 94.00 %"][1] == "41 of 50 (82.0 %, 95 % interval 69.2 to 90.2)"
    assert rows["accuracy min"] == ["93.74 %", "93.74 %"] and rows["accuracy median"] == ["94.01 %", "94.19 %"]
    log = "its run log: mean 7.885 s, median 7.819 s, minimum 7.787 s"
    assert rows["train_seconds mean"][1] == f"7.81 s ({log})" and rows["train_seconds max"] == ["11.00 s", "10.31 s"]
    assert rows["hardware"] == ["Some Processor, AVX512, 2 threads", "8 V100-SXM2 32 GB, one 20-core Xeon Gold 6148"]
    assert rows["data set"][0].startswith("CIFAR-10 (50,000") and rows["versions"][0].startswith(
        "cifar_fast 0.1.0, torch"
    )
    assert APPLE_2019.source in text


def test_another_data_set_is_loudly_not_comparable_even_under_the_name_of_cifar10():
    for data in ({"name": "synthetic"}, {"name": "CIFAR-10"}):
        runs = [run | {"dataset": CIFAR10 | data | {"fingerprint": "0123456789abcdef"}} for run in RUNS]
        text = comparison_table(summarise(runs, 0.94))
        assert text.startswith("!!!") and f"NOT COMPARABLE: these runs used the data set {data['name']}" in text
        assert re.search(r"^data set .*CIFAR-10: NOT COMPARABLE$", text, re.MULTILINE)


def test_the_published_share_keeps_its_own_target():
    text = comparison_table(summarise(RUNS, 0.95))
    assert re.search(r"^at 95\.00 % +0 of 5 .* 41 of 50 .* at 94\.00 %$", text, re.MULTILINE)


def test_the_published_share_is_the_one_passed_in():
    assert "1 of 50 (2.0 %" in comparison_table(summarise(RUNS, 0.94), replace(APPLE_2019, at_target=1))


def test_turns_table_compares_each_way_with_the_first_round_by_round():
    lines = turns_table({"plain": [2.0, 4.0, 2.0], "fast": [1.0, 1.0, 2.0]}, n_images=100).splitlines()
    assert [re.split("  +", line) for line in lines[1:]] == [
        ["plain", "50.0", "1.00", "1.00 to 1.00"],
        ["fast", "100.0", "2.00", "1.00 to 4.00"],
    ]


def test_a_benchmark_prints_its_spread_and_in_a_notebook_the_table_beside_published_runs():
    found = Benchmark(recipes.apple_8gpu(), RUNS, 0.94)
    assert str(found).startswith("apple_8gpu: 4 of 5 (80.00 %) reached 94.00 %\naccuracy: mean 94.04 +- ")
    assert "n = 5; data set: CIFAR-10" in str(found) and "hardware: Some Processor" in str(found)
    page = found._repr_html_()
    assert "<td>accuracy min</td><td>93.74 %</td><td>93.74 %</td>" in page and "NOT COMPARABLE" not in page
    other = [run | {"dataset": CIFAR10 | {"fingerprint": "0123456789abcdef"}} for run in RUNS]
    assert "<b>NOT COMPARABLE" in Benchmark(recipes.apple_8gpu(), other, 0.94)._repr_html_()
    none = Benchmark(recipes.apple_8gpu(), [], 0.94)
    assert str(none) == "apple_8gpu: no finished run" and none._repr_html_() is None


def test_numbers_have_the_digits_that_their_interval_supports():
    assert rounded([1.2345]) == "1.23"
    assert rounded([1.2345], like=(1.0, 1.5)) == "1.23" and rounded([1.2345], like=(0.0, 3.0)) == "1.2"
    assert rounded([100.0], like=(0.0, 300.0)) == "100.0"  # nbval knows a measured number by its point
    assert rounded((-0.5, 0.25), like=(-0.5, 0.25), signed=True) == "-0.50 to +0.25"
    assert mean_and_half_width([1.0], "s") == "1.00 s"
    assert mean_and_half_width([10.0, 12.0, 14.0], "s") == "12.0 +- 5.0 s"


def test_an_html_table_has_a_heading_rows_and_notes_and_no_tag_of_its_cells():
    page = html_table([("a", "b"), ("<i>", "1 & 2")], ["n < 3"])
    assert page.count("<tr>") == 2 and page.count("<th>") == 2
    assert "<td>&lt;i&gt;</td><td>1 &amp; 2</td>" in page and page.endswith("<p><small>n &lt; 3</small></p>")
    assert "<small>" not in html_table([("a",)])
