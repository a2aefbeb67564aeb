"""Estimates of variance against simulated runs whose true probabilities are known, and against counting by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

import cifar_fast
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RunError, UserError
from cifar_fast.experiments.variance import Variance, variance
from cifar_fast.recipes import smoke

N_IMAGES, N_RUNS, N_SETS = 400, 8, 300


def logits_of(right: Tensor) -> Tensor:
    """Logits (R, N, 2) of runs that predict class 0, the label of every image, where `right` (R, N) says so."""
    return torch.stack([right.double(), 1 - right.double()], dim=2)


def simulated(skill: float, seed: int) -> Variance:
    """Runs that are right about an image with a probability of its own, which a run's own luck moves by `skill`.

    Such a run's accuracy on endlessly many images is 0.7 + `skill` or 0.7 - `skill`, half of the time each.
    """
    random = torch.Generator().manual_seed(seed)
    easy = 0.5 + 0.4 * torch.rand(N_IMAGES, generator=random)
    luck = skill * (2 * torch.randint(0, 2, (N_RUNS, 1), generator=random) - 1)
    right = torch.rand(N_RUNS, N_IMAGES, generator=random) < easy + luck
    return variance(logits_of(right), torch.zeros(N_IMAGES, dtype=torch.int64))


@pytest.mark.parametrize("skill", [0.0, 0.03])
def test_the_estimates_have_no_bias(skill: float) -> None:
    """Their means over many simulated studies, each with a test set of its own, against the truth.

    E[p (1 - p)] is known: p is 0.7 on average and has the variance of easy, 0.4**2 / 12, because luck cancels.
    """
    studies = [simulated(skill, seed) for seed in range(N_SETS)]
    sampling = (0.7 * 0.3 - 0.4**2 / 12) / N_IMAGES
    total = (N_IMAGES - 1) / N_IMAGES * skill**2 + sampling
    for found, truth in (
        ([study.sampling_variance for study in studies], sampling),
        ([study.deviation**2 for study in studies], total),
        ([study.distribution_variance for study in studies], skill**2),
    ):
        error = stdev(found) / math.sqrt(N_SETS)
        assert abs(fmean(found) - truth) < 3 * error
        assert error < 0.1 * total, "the test could not see a mistake"
    share = fmean(study.sampling_variance for study in studies) / fmean(study.deviation**2 for study in studies)
    assert share == pytest.approx(sampling / total, abs=0.1)


def test_all_figures_of_three_runs_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    confident, unsure = [4.0, 0.0], [0.2, 0.0]
    zero, one = (lambda pair: pair), (lambda pair: pair[::-1])
    logits = torch.tensor(
        [
            [zero(confident), one(unsure), one(confident), zero(unsure)],  # right, wrong, right, wrong
            [zero(unsure), one(unsure), one(confident), one(unsure)],  # right, wrong, right, right
            [zero(unsure), zero(confident), one(unsure), one(unsure)],  # all right
        ]
    )
    found = variance(logits, labels)
    assert (found.n_runs, found.n_images) == (3, 4)
    assert found.accuracies.tolist() == [0.5, 0.75, 1.0]
    assert found.image_accuracy.tolist() == pytest.approx([1, 1 / 3, 1, 2 / 3])
    assert found.agreement.tolist() == [[1, 0.75, 0.5], [0.75, 1, 0.75], [0.5, 0.75, 1]]
    assert found.mean_agreement == pytest.approx(2 / 3)
    assert found.ensemble_accuracy == 1.0  # the one confident run outweighs two unsure ones, which a vote would follow
    assert found.deviation == pytest.approx(0.25)
    assert found.sampling_variance == pytest.approx(3 / 2 * (2 / 9 + 2 / 9) / 4 / 4)
    assert found.sampling_share == pytest.approx(found.sampling_variance / 0.0625)
    assert found.distribution_variance == pytest.approx(4 / 3 * (0.0625 - found.sampling_variance))
    assert found.other_test_set == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_a_table_shows_the_figures_as_text_and_in_a_notebook() -> None:
    found = simulated(0.0, 0)
    text = str(found)
    for words in ("8, each tested on the same 400 images", "mean of the runs' probabilities", "known to about ±27 %"):
        assert words in text
    assert f"{100 * found.sampling_share:.0f} % of the variance" in text
    cells = found._repr_html_()
    assert cells.count("<tr>") == len(found.rows()) and "runs&#x27; probabilities" in cells
    same = variance(logits_of(torch.ones(2, 5)), torch.zeros(5, dtype=torch.int64))
    assert math.isnan(same.sampling_share) and "the runs do not differ" in same.table()


def test_results_and_their_folders_say_the_same_and_mistakes_are_explained(tiny_data: Dataset, tmp_path: Path) -> None:
    recipe = replace(
        smoke(), widths=(8, 8, 8), n_shards=1, global_batch_size=40, epochs=0.25, precision="float32",
        convolution="direct",
    )  # fmt: skip
    runs = [
        cifar_fast.train(
            recipe, tiny_data, seed=seed, device="cpu", progress=False, save_logits=seed < 2, out=tmp_path / str(seed)
        )
        for seed in range(3)
    ]
    found = variance(runs[:2])
    assert found.accuracies.tolist() == pytest.approx([run.accuracy for run in runs[:2]])
    assert str(variance([tmp_path / "0", runs[1]])) == str(found)
    with pytest.raises(UserError, match="seed 2 has no logits: train it again with save_logits=True"):
        variance(runs)
    with pytest.raises(UserError, match="2 holds no logits.safetensors"):
        variance([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(UserError, match="at least two runs, not of 1"):
        variance(runs[:1])
    other = replace(runs[1], test_labels=tiny_data.test_labels.flip(0))
    with pytest.raises(UserError, match="run 1 was tested on other images than run 0"):
        variance([runs[0], other])
    with pytest.raises(RunError, match="holds no finished run of a benchmark"):
        variance(tmp_path)


def test_logits_need_their_labels_and_runs_bring_them() -> None:
    logits = torch.zeros(2, 5, 3)
    with pytest.raises(UserError, match="give the labels of the test images too"):
        variance(logits)
    with pytest.raises(UserError, match=r"shape \(5, 3\) for each run do not fit 4 labels"):
        variance(logits, torch.zeros(4))
    with pytest.raises(UserError, match="at least two runs, not of 1"):
        variance(logits[:1], torch.zeros(5))
    with pytest.raises(UserError, match="runs keep the labels"):
        variance([], torch.zeros(5))
