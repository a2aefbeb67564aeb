"""The model of costs is arithmetic that can be done by hand, and what it stands on is that of the real recipe."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_fast import cli
from cifar_fast import recipes as recipe
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments import plan
from cifar_fast.experiments.plan import (
    ALL_REDUCE_TIMES,
    Link,
    StepCosts,
    StepPoint,
    link_all_reduce_seconds,
    predict,
    ring_all_reduce,
)
from cifar_fast.hardware import device as devices
from cifar_fast.recipe import Recipe, choices
from cifar_fast.teaching.result_plots import predicted_scaling
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.evaluate import views
from cifar_fast.training.model import build_model, whiten_first_layer

APPLE = recipe.apple_8gpu()
LINK = Link("wire", latency_seconds=1e-3, bytes_per_second=1e9, source="made up for a test")
TINY = replace(
    recipe.smoke(), widths=(4, 4, 4), n_shards=4, global_batch_size=64, precision="float32", convolution="direct"
)

seconds = st.floats(1e-6, 10.0)
step_points = st.builds(StepPoint, st.integers(1, 4096), seconds, seconds, seconds)
points = st.lists(step_points, min_size=1, max_size=7, unique_by=lambda point: point.images)


def costs(*measured: StepPoint, **values) -> StepCosts:
    known = {
        "n_parameters": 1_000_000,
        "precision": "float16",
        "setup_seconds": 0.5,
        "evaluate_seconds_per_image": 1e-4,
        "hardware": "Some GPU",
        "on_gpu": True,
    }
    return StepCosts(points=measured, **(known | values))


def on_gpu(images: int, device: float, launch: float) -> StepPoint:
    return StepPoint(images, max(device, launch), device, launch)


# 2 ms + 10 us an image to compute, 4 ms + 1 us an image to launch
GPU = costs(on_gpu(256, 0.00456, 0.004256), replace(on_gpu(2048, 0.02248, 0.006048), spread=0.25))


# --- the all-reduce ---


@pytest.mark.parametrize("row", ALL_REDUCE_TIMES, ids=lambda row: f"{row.link}-{row.n_bytes:.0f}")
def test_the_link_gives_the_published_times_back(row):
    link = plan.published_link(row.link)
    found = plan.link_all_reduce_seconds(row.n_bytes, row.n_workers, link)
    assert row.low_seconds <= found <= row.high_seconds or found == pytest.approx(row.low_seconds, rel=1e-9)
    assert found == pytest.approx((row.low_seconds + row.high_seconds) / 2, rel=1e-9)
    assert link.latency_seconds > 0 and link.most_workers == row.n_workers
    assert link.source.startswith(row.source.split(": ")[0]) and row.source.split(": ")[1] in link.source


def test_the_line_through_the_published_times_by_hand():
    link = plan.published_link("nvlink_nccl")
    # Middles 0.085 and 0.13 ms: 0.045 ms for 8 MB more, of which each of 8 workers sends 2 x 7/8.
    assert link.latency_seconds == pytest.approx(0.04e-3)
    assert link.bytes_per_second == pytest.approx(1.75 * 8e6 / 0.045e-3)


def test_an_all_reduce_by_hand():
    assert plan.link_all_reduce_seconds(1e6, 2, LINK) == pytest.approx(1e-3 + 1e-3)
    assert plan.link_all_reduce_seconds(1e6, 4, LINK) == pytest.approx(1e-3 + 1.5e-3)
    assert plan.link_all_reduce_seconds(1e6, 1, LINK) == 0


@pytest.mark.parametrize(("n_workers", "size"), [(2, 6), (3, 7), (8, 64), (8, 5), (1, 4)])
def test_a_ring_sums_and_sends_what_the_link_is_charged_for(n_workers, size):
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=random, dtype=torch.float64) for _ in range(n_workers)]
    total = torch.stack(gradients).sum(0)
    sent = list(ring_all_reduce(gradients))
    assert len(sent) == 2 * (n_workers - 1)
    for gradient in gradients:
        torch.testing.assert_close(gradient, total)
    if size % n_workers == 0:
        charged = link_all_reduce_seconds(size, n_workers, replace(LINK, latency_seconds=0.0, bytes_per_second=1.0))
        assert sum(sent) == pytest.approx(charged)


def test_an_unknown_link_names_those_there_are():
    with pytest.raises(UserError, match="'string'.*nvlink_nccl, nvlink_multicast"):
        plan.published_link("string")


# --- the line over the local batch ---


@given(st.floats(0, 1), st.floats(1e-9, 1e-2), st.sets(st.integers(1, 4096), min_size=2, max_size=7))
def test_a_line_is_found_again(fixed, slope, sizes):
    found = plan.fit_line([(images, fixed + slope * images) for images in sizes])
    for images in sizes:
        assert found(images) == pytest.approx(fixed + slope * images, rel=1e-6)


@given(points)
def test_no_part_of_a_fitted_line_is_negative_whatever_was_measured(measured):
    line = plan.fit_line([(point.images, point.step_seconds) for point in measured])
    assert line.fixed_seconds >= 0 and line.seconds_per_image >= 0
    low, high = min(p.step_seconds for p in measured), max(p.step_seconds for p in measured)
    # Never beyond what was seen, except through the origin where the smallest batch takes the longest share.
    assert line(max(p.images for p in measured)) >= 0.999 * low
    assert line(min(p.images for p in measured)) <= 1.001 * high


def test_a_line_by_hand_where_a_part_would_be_negative():
    assert plan.fit_line([(100, 3.0)]) == plan.Line(0.0, pytest.approx(0.03))
    assert plan.fit_line([(100, 0.0), (200, 0.0)]) == plan.Line(0.0, 0.0)
    steeper_than_proportional = plan.fit_line([(100, 1.0), (200, 4.0)])
    # Relative errors: weights 1 and 1/16, slope (100 + 800 / 16) / (100^2 + 200^2 / 16).
    assert steeper_than_proportional == plan.Line(0.0, pytest.approx(150 / 12_500))
    falling = plan.fit_line([(100, 2.0), (200, 1.0)])
    assert falling == plan.Line(pytest.approx((2.0 / 4 + 1.0) / (1 / 4 + 1)), 0.0)


# --- the prediction ---


def test_a_prediction_by_hand():
    # Batches of 2048 from 8 shards of 6,250: 24 steps an epoch, 18 epochs.
    found = predict(GPU, APPLE, 50_000, 10_000, 8, LINK)
    one_all_reduce = 1e-3 + 1.75 * 2e6 / 1e9
    assert (found.steps, found.local_batch_size, found.gradient_bytes) == (432, 256, 2_000_000)
    assert found.compute_seconds == pytest.approx(432 * 0.00456)
    assert found.all_reduce_seconds == pytest.approx(432 * one_all_reduce)
    assert found.launch_seconds == 0  # 4.256 ms to launch, 4.56 ms and the all-reduce to compute
    assert found.train_seconds == pytest.approx(0.5 + 432 * (0.00456 + one_all_reduce))
    # 17 epochs on single views, one on two views, a share of 1,250 images.
    assert found.evaluate_seconds == pytest.approx(19 * 1250 * 1e-4)
    assert not found.lower_bound


def test_launching_counts_as_far_as_the_device_waits_for_it():
    slow = costs(on_gpu(256, 0.001, 0.01), on_gpu(2048, 0.008, 0.01))
    alone, eight = (predict(slow, APPLE, 50_000, 10_000, n, LINK) for n in (1, 8))
    assert alone.launch_seconds == pytest.approx(432 * 0.002)
    assert eight.launch_seconds == pytest.approx(432 * (0.01 - 0.001 - 0.0045))
    assert eight.train_seconds == pytest.approx(0.5 + 432 * 0.01)


@given(points, st.integers(0, 6), seconds, st.floats(1e6, 1e12))
def test_terms_sum_up_and_workers_never_add_compute(measured, power, latency, rate):
    many = replace(APPLE, n_shards=64)
    link = Link("any", latency, rate, "made up", most_workers=8)
    found = [predict(costs(*measured), many, 50_000, 10_000, n, link) for n in plan.WORLD_SIZES]
    assert [now.lower_bound for now in found] == [False, False, False, False, True, True, True]
    assert found[0].all_reduce_seconds == 0
    for now in found:
        parts = (now.setup_seconds, now.compute_seconds, now.all_reduce_seconds, now.launch_seconds)
        assert now.train_seconds == pytest.approx(sum(parts)) and min(parts) >= 0
        assert sum(now.terms.values()) == now.train_seconds
        # A step takes no less than the longer of what device and Python do.
        launched = now.steps * costs(*measured).launch_line(now.local_batch_size)
        assert now.train_seconds >= max(now.compute_seconds + now.all_reduce_seconds, launched) * (1 - 1e-9)
    for fewer, more in zip(found, found[1:], strict=False):
        assert more.steps == fewer.steps
        assert more.compute_seconds <= fewer.compute_seconds
        assert more.evaluate_seconds <= fewer.evaluate_seconds
        assert fewer.world_size == 1 or more.all_reduce_seconds >= fewer.all_reduce_seconds


def test_a_measured_all_reduce_takes_the_place_of_the_link():
    many = replace(APPLE, n_shards=64)
    found = predict(GPU, many, 50_000, 10_000, 64, LINK, all_reduce_seconds=0.002)
    assert found.all_reduce_seconds == pytest.approx(found.steps * 0.002)
    assert not found.lower_bound
    assert predict(GPU, many, 50_000, 10_000, 1, LINK, all_reduce_seconds=0.002).all_reduce_seconds == 0


@pytest.mark.parametrize(("precision", "size"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_gradients_travel_in_the_precision_of_the_convolutions(precision, size):
    assert costs(*GPU.points, precision=precision).gradient_bytes == 1_000_000 * size


@pytest.mark.parametrize("values", [{}, {"n_shards": 1}, {"epochs": 1.3}, {"n_shards": 2, "global_batch_size": 120}])
def test_steps_are_those_of_the_real_batches(tiny_data, values):
    one = replace(TINY, **values)
    batches = TrainBatches(tiny_data.train_images, tiny_data.train_labels, one, device=torch.device("cpu"))
    assert plan.total_steps(one, len(tiny_data.train_images)) == batches.total_steps()


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(RecipeError, match="global_batch_size=2048"):
        predict(GPU, APPLE, 1000, 100, 8, LINK)


@pytest.mark.parametrize("tta", choices("tta"))
def test_views_are_those_that_evaluation_shows(tta):
    assert plan.VIEWS[tta] == len(list(views(torch.zeros(1, 3, 8, 8), tta)))


# --- which workers ---


@pytest.mark.parametrize(("n_shards", "allowed"), [(1, (1,)), (6, (1, 2, 3, 6)), (8, (1, 2, 4, 8))])
def test_workers_share_the_shards_equally(n_shards, allowed):
    one = replace(TINY, n_shards=n_shards, global_batch_size=96)
    assert plan.allowed_world_sizes(one) == allowed
    assert plan.planned_world_sizes(one) == tuple(n for n in allowed if n in plan.WORLD_SIZES)
    assert plan.planned_world_sizes(one, n_shards)[-1] == n_shards


@pytest.mark.parametrize(
    ("one", "world_size", "words"),
    [
        (APPLE, 3, "world_size=3.*n_shards=8, which 1, 2, 4, 8 workers can share.*1, 2, 4, 8, 16, 32, 64"),
        (
            recipe.airbench_2024(),
            8,
            "n_shards=1, which 1 worker can share.*1, 2, 4, 5, 8.*batch norm smaller",
        ),
        (
            replace(recipe.laptop(), resolutions=()),
            2,
            "whole groups of ghost_batch_size=512 can be cut into n_shards of 1, 3",
        ),
        (replace(APPLE, n_shards=1, ghost_batch_size=2048), 2, "cannot be cut into more shards: lower ghost_batch_siz"),
    ],
)
def test_a_number_of_workers_that_does_not_fit_gets_advice(one, world_size, words):
    for call in (
        lambda: predict(GPU, one, 50_000, 10_000, world_size, LINK),
        lambda: plan.planned_world_sizes(one, world_size),
        lambda: plan.measure_step(one, world_sizes=[1, world_size]),
    ):
        with pytest.raises(RecipeError, match=words):
            call()


def test_the_shards_that_are_advised_can_be_had():
    for one in (APPLE, recipe.laptop(), recipe.airbench_2024(), recipe.page_2019()):
        (numbers,) = re.findall(r"n_shards of ([\d, ]+) \(", plan.describe_world_sizes(one))
        for number in numbers.split(", "):
            assert int(number) in plan.allowed_world_sizes(replace(one, n_shards=int(number)))


# --- the measurement ---


@pytest.fixture(scope="module")
def measured() -> StepCosts:
    return plan.measure_step(TINY, device="cpu", n_train=640, n_test=100)


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
    found = plan.measure_step(TINY, device="cpu", n_train=640, n_test=100, seconds=0.0)
    assert [point.images for point in found.points] == [16]
    assert found.compute_line.fixed_seconds == 0


def test_a_real_step_is_measured(monkeypatch):
    """Forward and backward of the recipe at each local batch, and both optimisers, without moving the weights."""
    seen, stepped = [], []

    def watched(model, images, labels, one: Recipe, dtype):
        assert one is TINY and images.shape[1:] == (3, 32, 32) and labels.dtype == torch.int64
        seen.append((len(images), [p.detach().clone() for p in model.parameters()]))
        return real(model, images, labels, one, dtype)

    def with_hooks(model, one):
        optimizers = build(model, one)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda now, *_: stepped.append(type(now).__name__))
        return optimizers

    real, build = plan.forward_backward, plan.build_optimizers
    monkeypatch.setattr(plan, "forward_backward", watched)
    monkeypatch.setattr(plan, "build_optimizers", with_hooks)
    plan.measure_step(TINY, device="cpu", n_train=640, n_test=100, world_sizes=[4, 1])
    assert [size for size, _ in seen] == [16] * (1 + plan.REPEATS) + [64] * (1 + plan.REPEATS)
    assert stepped == ["SGD", "Muon"] * len(seen)
    for after_first, last in zip(seen[1][1], seen[-1][1], strict=True):  # at first Muon gives the filters its norm
        torch.testing.assert_close(last, after_first)


def test_several_resolutions_are_refused():
    with pytest.raises(RecipeError, match=r"resolutions=\(16, 32\)"):
        plan.measure_step(replace(TINY, resolutions=(16, 32)), device="cpu", n_train=640)


@pytest.mark.gpu
def test_a_gpu_is_measured_apart_from_python():
    found = plan.measure_step(replace(TINY, precision="auto"), device="cuda", n_train=640, n_test=100)
    for point in found.points:
        assert 0 < point.device_seconds <= 1.05 * point.step_seconds
        assert 0 < point.launch_seconds
    assert found.on_gpu and torch.cuda.get_device_name() in found.hardware


# --- what a reader sees ---


def test_the_table_says_prediction_over_every_predicted_figure():
    predictions = plan.predict_all(GPU, APPLE, 50_000, 10_000, LINK)
    text = plan.plan_table(predictions, GPU, APPLE)
    title, _, marks, _, names, *rows = text.splitlines()
    assert title == "PREDICTION, not a measurement: apple_8gpu, 50,000 training and 10,000 test images"
    assert marks.split() == ["PREDICTED"] * 7
    assert len(names.split()) == len(rows[0].split()) == 10
    assert [row.split()[0] for row in rows[:4]] == ["1", "2", "4", "8"]
    for row, now in zip(rows, predictions, strict=False):
        found = [float(cell.replace(",", "")) for cell in row.split()]
        terms = [now.compute_seconds, now.all_reduce_seconds, now.launch_seconds, now.setup_seconds]
        assert found[:3] == [now.world_size, now.local_batch_size, now.steps]
        assert found[3:7] == pytest.approx(terms, abs=5e-4)
        assert found[7] == pytest.approx(now.train_seconds, abs=5e-3) == pytest.approx(sum(found[3:7]), abs=1e-2)
    for words in (
        "Some GPU",
        "256 images 4.56 ms",
        "differ by up to 25 %",
        "wire",
        "made up for a test",
        "2.00 MB",
        "1, 2, 4, 8 workers",
    ):
        assert words in text
    assert ">=" not in text and "CPU" not in text


def test_several_machines_are_a_lower_bound_and_say_so():
    many = replace(APPLE, n_shards=64)
    predictions = plan.predict_all(GPU, many, 50_000, 10_000, LINK)
    text = plan.plan_table(predictions, GPU, many)
    rows = {row.split()[0]: row for row in text.splitlines() if re.match(r" +\d+ ", row)}
    assert {number for number, row in rows.items() if ">=" in row} == {"16", "32", "64"}
    flat = " ".join(text.split())
    assert "a lower bound; no published all-reduce among more than 8 workers" in flat
    assert "at the local batch of 16, 32, 64 workers: predicted on the line through those that were" in flat
    text = plan.plan_table(predictions, costs(*GPU.points[:1]), many)
    assert "local batch of 1, 2, 4, 16, 32, 64 workers: predicted in proportion" in " ".join(text.split())


@pytest.mark.parametrize("n_shards", [8, 64])
def test_the_figure_says_prediction_and_stacks_the_terms(n_shards, tmp_path):
    predictions = plan.predict_all(GPU, replace(APPLE, n_shards=n_shards), 50_000, 10_000, LINK)
    figure = predicted_scaling(predictions)
    for words in ("PREDICTION, not a measurement", "apple_8gpu", "50,000 training", "Some GPU", "wire"):
        assert words in figure.get_suptitle()
    assert ("lower bound" in figure.get_suptitle()) == (n_shards == 64)
    left, right = figure.axes
    assert left.get_xlabel() == right.get_xlabel() == "workers"
    assert left.get_ylabel() == "predicted train_seconds" and right.get_ylabel().endswith("in %")
    *_, top = left.containers
    assert [bar.get_y() + bar.get_height() for bar in top] == pytest.approx([now.train_seconds for now in predictions])
    *_, top = right.containers
    assert [bar.get_y() + bar.get_height() for bar in top] == pytest.approx([100.0] * len(predictions))
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in left.containers]
    assert len({colour for colour, _ in looks}) == len({hatch for _, hatch in looks}) == 4
    figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


QUICK = ["plan", "--recipe", "smoke", "--device", "cpu", "--n-train", "640", "--n-test", "100"]


def test_the_command_measures_and_prints_a_prediction(capsys, tmp_path):
    out = tmp_path / "plan.png"
    assert (
        cli.main([*QUICK, "--n-shards", "10", "--world-size", "5", "--link", "nvlink_multicast", "--out", str(out)])
        == 0
    )
    text = capsys.readouterr().out
    assert "PREDICTION, not a measurement: smoke-10-shards, 640 training and 100 test images" in text
    assert [int(number) for number in re.findall(r"^ +(\d+) ", text.split("\n- ")[0], re.MULTILINE)] == [1, 2, 5]
    alone = devices.environment(torch.device("cpu"))["cores"] == 1
    seen = "none can be seen" if alone else "2 processes over gloo average"
    assert seen in " ".join(text.split())
    assert "NVLink multicast" in text and "says nothing about GPUs" in " ".join(text.split())
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_all_reduce_of_this_machine_is_seen_and_taken_among_as_many_gpus():
    seen = plan.measure_all_reduce(1_000_000, precision="float32", device="cpu")
    if devices.environment(torch.device("cpu"))["cores"] == 1:
        assert seen is None
    else:
        assert seen is not None and (seen.world_size, seen.backend, seen.n_gradients) == (2, "gloo", 1_000_000)
        assert 0 < seen.seconds < 10
    by_link = plan.predict_all(GPU, APPLE, 50_000, 10_000, LINK)
    for backend, taken in (("nccl", True), ("gloo", False)):
        ours = plan.SeenAllReduce(4, backend, GPU.n_parameters, 0.123)
        for now, before in zip(plan.predict_all(GPU, APPLE, 50_000, 10_000, LINK, seen=ours), by_link, strict=True):
            if taken and now.world_size == 4:
                assert now.all_reduce_seconds == pytest.approx(now.steps * 0.123)
            else:
                assert now == before
        table = " ".join(plan.plan_table(by_link, GPU, APPLE, ours).split())
        assert ("taken for that row" in table) == taken and ("not taken for any row" in table) != taken
    assert "none can be seen" in " ".join(plan.plan_table(by_link, GPU, APPLE).split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-shards", "1", "--world-size", "8"], "n_shards=1, which 1 worker can share"),
        (["--n-shards", "7"], "n_shards=7"),
        (["--out", "nowhere/plan.png"], "there is no folder nowhere"),
        (["--n-train", "100"], "global_batch_size=320"),
        (["--n-test", "0"], "n_test=0"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "forward_backward", None)
    assert cli.main([*QUICK, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_said(capsys, tmp_path):
    assert cli.main([*QUICK, "--out", str(tmp_path / "plan.docx")]) == 2
    captured = capsys.readouterr()
    assert "PREDICTION" in captured.out and "cannot be written" in captured.err
