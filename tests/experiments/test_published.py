"""Published figures are those of their sources, and belong to the recipes that repeat them."""

from __future__ import annotations

from cifar_fast.experiments.published import APPLE_2019, CIFAR10_FINGERPRINT, LADDER_2019, RECORDS
from cifar_fast.recipes import ladder


def test_apples_figures_are_those_of_its_repository():
    assert (APPLE_2019.at_target, APPLE_2019.runs, APPLE_2019.target) == (41, 50, 0.94)
    assert (APPLE_2019.min_accuracy, APPLE_2019.median_accuracy) == (0.9374, 0.9419)
    assert (APPLE_2019.mean_seconds, APPLE_2019.max_seconds) == (7.81, 10.31)
    assert APPLE_2019.run_log == "mean 7.885 s, median 7.819 s, minimum 7.787 s"


def test_every_record_names_its_source():
    assert all(record.source for record in RECORDS)
    by_system = {record.system: record for record in RECORDS}
    assert by_system["Fulcrum"].seconds == 1.828 and by_system["Fulcrum, two GPUs"].seconds == 1.14
    assert by_system["Hiverge"].seconds == 1.99 and "2.095" in by_system["Hiverge"].source


def test_the_published_ladder_and_the_records_agree_with_the_recipes():
    names = [rung.recipe.name for rung in ladder()]
    assert [name for name in names if name in LADDER_2019] == list(LADDER_2019)  # all are rungs, in their order
    assert sorted(LADDER_2019.values(), reverse=True) == list(LADDER_2019.values())
    by_recipe = {record.added.split(": ")[-1]: record.seconds for record in RECORDS}
    assert {name: by_recipe[name] for name in ("baseline_2018", "page_2019")} == {
        name: LADDER_2019[name] for name in ("baseline_2018", "page_2019")
    }
    assert [record.year for record in RECORDS] == sorted(record.year for record in RECORDS)


def test_official_cifar10_has_the_fingerprint_that_comparisons_require(real_data):
    assert real_data.fingerprint == CIFAR10_FINGERPRINT
