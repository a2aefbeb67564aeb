"""A forecast adds up what training will do, and leaves training as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.experiments import forecast as forecasts
from cifar_fast.experiments.forecast import Forecast, about, forecast, timed_images
from cifar_fast.experiments.step_costs import with_batch_size
from cifar_fast.training.loop import train

RECIPE = replace(
    recipes.smoke(),
    widths=(8, 8, 8),
    n_shards=2,
    global_batch_size=64,
    epochs=2.5,
    resolutions=(16, 32),
    precision="float32",
    convolution="direct",
)


def test_steps_of_every_size_and_views_add_up(tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "MOST_IMAGES", 32)  # half a batch is timed
    monkeypatch.setattr(forecasts, "_seconds_of_steps", lambda setup: {16: 1.0, 32: 10.0})
    monkeypatch.setattr(forecasts, "_seconds_of_a_view", lambda setup: 100.0)
    found = forecast(RECIPE, tiny_data, device="cpu")
    # 640 images are ten steps: ten small, then ten and five large. 200 test images are seen once, once, and mirrored.
    assert found.seconds == pytest.approx(2 * (10 * 1 + 15 * 10) + 200 * (1 + 1 + 2) * 100)


def test_it_measures_and_changes_nothing_of_the_training_that_follows(tiny_data: Dataset) -> None:
    before = train(RECIPE, tiny_data, device="cpu", progress=False)
    found = forecast(RECIPE, tiny_data, device="cpu")
    assert found.seconds > 0 and found.recipe is RECIPE
    assert f"{torch.get_num_threads()} core" in found.machine and str(found).endswith(", measured)")
    after = train(RECIPE, tiny_data, device="cpu", progress=False)
    expected = before.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in after.model.state_dict().items())


def test_a_timed_step_has_whole_norm_groups_and_at_most_512_images() -> None:
    for name in recipes.names():
        recipe = recipes.named(name)
        n_images = timed_images(recipe)
        unit = recipe.n_shards * (recipe.ghost_batch_size or 1)
        assert n_images % unit == 0 and n_images <= max(512, unit)
        assert with_batch_size(recipe, n_images).ghost_batch_size == recipe.ghost_batch_size


def test_a_duration_is_no_more_precise_than_a_forecast() -> None:
    seconds = (1, 37, 89, 100, 240, 899, 5000, 9000)
    assert [about(value) for value in seconds] == [
        "about 5 s", "about 35 s", "about 90 s", "about 2 min", "about 4 min", "about 15 min", "about 83 min",
        "about 2.5 h",
    ]  # fmt: skip
    assert str(Forecast(RECIPE, 240.0, "2 cores, AVX2")) == "about 4 min (2 cores, AVX2, measured)"
