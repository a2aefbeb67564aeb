"""A prediction is arithmetic that can be done by hand, on the real recipe, and every figure says PREDICTION."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_fast import cli, recipes
from cifar_fast.errors import RecipeError
from cifar_fast.experiments import all_reduce, plan, step_costs
from cifar_fast.experiments.all_reduce import Link, MeasuredAllReduce
from cifar_fast.experiments.plan import predict
from cifar_fast.experiments.step_costs import StepCosts, StepPoint
from cifar_fast.experiments.world_sizes import WORLD_SIZES
from cifar_fast.hardware.device import cores
from cifar_fast.recipe import choices
from cifar_fast.teaching.result_plots import predicted_scaling
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.evaluate import views

APPLE = recipes.apple_8gpu()
LINK = Link("wire", latency_seconds=1e-3, bytes_per_second=1e9, source="made up for a test")
TINY = replace(recipes.smoke(), widths=(4, 4, 4), n_shards=4, global_batch_size=64)

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
    found = [predict(costs(*measured), many, 50_000, 10_000, n, link) for n in WORLD_SIZES]
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


@pytest.mark.parametrize("values", [{}, {"n_shards": 1}, {"epochs": 1.3}, {"n_shards": 2, "global_batch_size": 120}])
def test_steps_are_those_of_the_real_batches(tiny_data, values):
    one = replace(TINY, **values)
    batches = TrainBatches(tiny_data.train_images, tiny_data.train_labels, one, device=torch.device("cpu"))
    assert plan.total_steps(one, len(tiny_data.train_images)) == batches.total_steps()


def test_too_few_images_or_a_number_of_workers_that_does_not_fit_are_refused():
    with pytest.raises(RecipeError, match="global_batch_size=2048"):
        predict(GPU, APPLE, 1000, 100, 8, LINK)
    with pytest.raises(RecipeError, match="world_size=3.*1, 2, 4, 8 workers can share"):
        predict(GPU, APPLE, 50_000, 10_000, 3, LINK)


@pytest.mark.parametrize("tta", choices("tta"))
def test_views_are_those_that_evaluation_shows(tta):
    assert plan.VIEWS[tta] == len(list(views(torch.zeros(1, 3, 8, 8), tta)))


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
    assert "a lower bound; we know of no published all-reduce among more than 8 workers" in flat
    assert "at the local batch of 16, 32, 64 workers: predicted on the line through the measured ones" in flat
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


@pytest.fixture
def smoke(monkeypatch):
    """The recipe without a choice that would have to be measured."""
    recipe = replace(recipes.smoke(), precision="float32", convolution="direct")
    monkeypatch.setattr(recipes, "named", lambda name: recipe)


def test_the_command_measures_and_prints_a_prediction(smoke, capsys, tmp_path):
    out = tmp_path / "plan.png"
    assert (
        cli.main([*QUICK, "--n-shards", "10", "--world-size", "5", "--link", "nvlink_multicast", "--out", str(out)])
        == 0
    )
    text = capsys.readouterr().out
    assert "PREDICTION, not a measurement: smoke-10-shards, 640 training and 100 test images" in text
    assert [int(number) for number in re.findall(r"^ +(\d+) ", text.split("\n- ")[0], re.MULTILINE)] == [1, 2, 5]
    measured = "cannot be measured" if cores() == 1 else "2 processes over gloo average"
    assert measured in " ".join(text.split())
    assert "NVLink multicast" in text and "says nothing about GPUs" in " ".join(text.split())
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_measured_all_reduce_is_used_for_as_many_gpus():
    by_link = plan.predict_all(GPU, APPLE, 50_000, 10_000, LINK)
    for backend, used in (("nccl", True), ("gloo", False)):
        ours = MeasuredAllReduce(4, backend, GPU.n_parameters, 0.123)
        found = plan.predict_all(GPU, APPLE, 50_000, 10_000, LINK, all_reduce=ours)
        for now, before in zip(found, by_link, strict=True):
            if used and now.world_size == 4:
                assert now.all_reduce_seconds == pytest.approx(now.steps * 0.123)
            else:
                assert now == before
        table = " ".join(plan.plan_table(by_link, GPU, APPLE, ours).split())
        assert ("used for that row" in table) == used and ("not used for any row" in table) != used
    assert "cannot be measured" in " ".join(plan.plan_table(by_link, GPU, APPLE).split())


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
    monkeypatch.setattr(step_costs, "set_up", None)
    assert cli.main([*QUICK, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_reported(smoke, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(all_reduce, "measure_all_reduce", lambda *_, **__: None)
    assert cli.main([*QUICK, "--out", str(tmp_path / "plan.docx")]) == 2
    captured = capsys.readouterr()
    assert "PREDICTION" in captured.out and "cannot be written" in captured.err
