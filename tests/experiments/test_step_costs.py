"""Measured costs are those of the real network at each local batch, and the lines through them are fitted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_fast import recipes
from cifar_fast.errors import RecipeError
from cifar_fast.experiments.step_costs import (
    REPEATS,
    Line,
    StepCosts,
    StepPoint,
    fit_line,
    measure_step,
    with_batch_size,
)
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.model import build_model, whiten_first_layer
from cifar_fast.training.step import TrainingStep

TINY = replace(
    recipes.smoke(), widths=(4, 4, 4), n_shards=4, global_batch_size=64, precision="float32", convolution="direct"
)

seconds = st.floats(1e-6, 10.0)
points = st.lists(st.tuples(st.integers(1, 4096), seconds), min_size=1, max_size=7, unique_by=lambda point: point[0])


# --- the line over the local batch ---


@given(st.floats(0, 1), st.floats(1e-9, 1e-2), st.sets(st.integers(1, 4096), min_size=2, max_size=7))
def test_a_line_is_found_again(fixed, slope, sizes):
    found = fit_line([(images, fixed + slope * images) for images in sizes])
    for images in sizes:
        assert found(images) == pytest.approx(fixed + slope * images, rel=1e-6)


@given(points)
def test_no_part_of_a_fitted_line_is_negative_whatever_was_measured(measured):
    line = fit_line(measured)
    assert line.fixed_seconds >= 0 and line.seconds_per_image >= 0
    low, high = min(seconds for _, seconds in measured), max(seconds for _, seconds in measured)
    # Never beyond what was seen, except through the origin where the smallest batch takes the longest share.
    assert line(max(images for images, _ in measured)) >= 0.999 * low
    assert line(min(images for images, _ in measured)) <= 1.001 * high


def test_a_line_by_hand_where_a_part_would_be_negative():
    assert fit_line([(100, 3.0)]) == Line(0.0, pytest.approx(0.03))
    assert fit_line([(100, 0.0), (200, 0.0)]) == Line(0.0, 0.0)
    steeper_than_proportional = fit_line([(100, 1.0), (200, 4.0)])
    # Relative errors: weights 1 and 1/16, slope (100 + 800 / 16) / (100^2 + 200^2 / 16).
    assert steeper_than_proportional == Line(0.0, pytest.approx(150 / 12_500))
    falling = fit_line([(100, 2.0), (200, 1.0)])
    assert falling == Line(pytest.approx((2.0 / 4 + 1.0) / (1 / 4 + 1)), 0.0)


# --- the measurement ---


@pytest.fixture(scope="module")
def measured() -> StepCosts:
    return measure_step(TINY, device="cpu", n_train=640, n_test=100)


def test_a_cpu_is_measured_at_every_local_batch(measured):
    assert [point.images for point in measured.points] == [16, 32, 64]
    for point in measured.points:
        assert point.step_seconds == point.device_seconds > 0 == point.launch_seconds
        assert point.spread > 0
    assert measured.setup_seconds > 0 and measured.evaluate_seconds_per_image > 0
    assert not measured.on_gpu and "float32, direct convolution" in measured.hardware
    assert 0 <= measured.largest_deviation


def test_the_bytes_are_those_of_the_real_network(measured, tiny_data):
    mean, std = pixel_statistics(tiny_data.train_images)
    model = build_model(TINY, 10, mean, std)
    whiten_first_layer(model, TINY, tiny_data.train_images)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) < len(list(model.parameters()))
    assert measured.n_parameters == sum(p.numel() for p in trained)
    assert measured.gradient_bytes == 4 * measured.n_parameters


def test_without_time_left_the_smallest_batch_alone_is_measured():
    found = measure_step(TINY, device="cpu", n_train=640, n_test=100, seconds=0.0)
    assert [point.images for point in found.points] == [16]
    assert found.compute_line.fixed_seconds == 0


def test_the_measured_steps_leave_the_weights_where_they_are(monkeypatch):
    seen = []

    def watched(self, images, labels):
        assert images.shape[1:] == (3, 32, 32)
        found = take(self, images, labels)
        seen.append((len(images), [p.detach().clone() for p in self.model.parameters()]))
        return found

    take = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", watched)
    measure_step(TINY, device="cpu", n_train=640, n_test=100, world_sizes=[4, 1])
    assert [size for size, _ in seen] == [16] * (1 + REPEATS) + [64] * (1 + REPEATS)
    for after_first, last in zip(seen[0][1], seen[-1][1], strict=True):  # in its first step Muon scales the filters
        torch.testing.assert_close(last, after_first)


def test_several_resolutions_are_refused():
    with pytest.raises(RecipeError, match=r"resolutions=\(16, 32\)"):
        measure_step(replace(TINY, resolutions=(16, 32)), device="cpu", n_train=640)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_a_gpu_is_measured_apart_from_python(cuda_graph):
    recipe = replace(TINY, precision="auto", cuda_graph=cuda_graph)
    found = measure_step(recipe, device="cuda", n_train=640, n_test=100)
    for point in found.points:
        assert 0 < point.device_seconds <= 1.05 * point.step_seconds
        assert 0 < point.launch_seconds
    assert found.on_gpu and torch.cuda.get_device_name() in found.hardware
    assert f"{'captured' if cuda_graph == 'on' else 'eager'} step" in found.hardware


def test_a_number_of_workers_that_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="world_size=3.*1, 2, 4 workers can share"):
        measure_step(TINY, device="cpu", n_train=640, world_sizes=[1, 3])


@pytest.mark.parametrize(("precision", "size"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_gradients_travel_in_the_precision_of_the_convolutions(precision, size):
    point = StepPoint(64, 0.1, 0.1, 0.0)
    assert StepCosts((point,), 1_000_000, precision, 0.5, 1e-4, "some GPU", True).gradient_bytes == 1_000_000 * size


def test_groups_and_micro_batches_shrink_to_the_batch():
    laptop = recipes.laptop()
    small = with_batch_size(laptop, 48)
    assert (small.global_batch_size, small.norm_group_size, small.micro_batch_size) == (48, 48, 0)
    assert with_batch_size(laptop, 1536) == replace(laptop, global_batch_size=1536)
    odd = with_batch_size(replace(laptop, global_batch_size=1536, ghost_batch_size=384, micro_batch_size=768), 512)
    assert (odd.ghost_batch_size, odd.micro_batch_size) == (0, 0)  # neither divides a batch of 512
