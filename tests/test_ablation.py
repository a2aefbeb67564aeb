"""Arms are compared seed by seed, and ways to evaluate on the same networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cifar_fast import recipe as recipes
from cifar_fast.ablation import filed, tta_ablation
from cifar_fast.data import Dataset
from cifar_fast.errors import RunError
from cifar_fast.evaluate import evaluate
from cifar_fast.train import train


def test_ways_to_evaluate_are_compared_on_the_same_networks(tiny_data: Dataset):
    recipe = replace(recipes.smoke(), widths=(4, 4, 4), n_shards=1, global_batch_size=64, epochs=1.0)
    results = [train(recipe, tiny_data, device="cpu", seed=seed, progress=False) for seed in (0, 1)]
    runs = tta_ablation(results, tiny_data, progress=False)
    assert list(runs.arms) == ["tta=none", "tta=flip", "tta=flip_shift"]
    for tta in ("none", "flip", "flip_shift"):
        for run, result in zip(runs.arms[f"tta={tta}"], results, strict=True):
            found = evaluate(result.model, tiny_data.test_images, tiny_data.test_labels, tta=tta)
            assert (run["accuracy"], run["loss"]) == (found.accuracy, pytest.approx(found.loss))
            assert run["seed"] == result.seed and run["train_seconds"] == result.train_seconds
    # The recipe evaluates with flip itself.
    assert [run["loss"] for run in runs.arms["tta=flip"]] == pytest.approx([result.loss for result in results])
    assert runs.arms["tta=none"][0]["loss"] != runs.arms["tta=flip_shift"][0]["loss"]


def test_filed_runs_are_read_by_the_name_of_their_folder():
    runs = filed("apple_8gpu")
    assert runs and {run["recipe"]["name"] for run in runs} == {"apple_8gpu"}
    assert all(0.9 < run["accuracy"] < 1 and run["epochs"] for run in runs)
    with pytest.raises(RunError, match="no runs are filed as 'apple'; there are .*apple_8gpu, .*page_2019"):
        filed("apple")
