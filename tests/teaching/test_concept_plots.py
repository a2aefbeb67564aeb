"""Teaching figures draw what the package computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cifar_fast.errors import UserError
from cifar_fast.experiments.all_reduce import Link
from cifar_fast.experiments.plan import predict
from cifar_fast.experiments.published import LADDER_2019, RECORDS
from cifar_fast.experiments.statistics import wilson_interval
from cifar_fast.experiments.step_costs import StepCosts, StepPoint
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import apple_8gpu, ladder, page_2019
from cifar_fast.teaching import concept_plots
from cifar_fast.training.evaluate import calibration
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.optim import orthogonalise

CLASSES = ("cat", "dog", "ship")
LOGITS = torch.tensor([3.0, 1.0, -2.0])


def curves(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# --- label smoothing ---


def test_calibration_is_drawn_at_the_temperature_and_marked_by_the_number_of_images():
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    labels_ = logits.argmax(1).where(torch.arange(200) % 4 > 0, torch.zeros(200, dtype=torch.long))
    figure = concept_plots.calibration({"a": logits, "b": 5 * logits}, labels_, dataset="noise", temperature=2.0)
    left, right = figure.axes
    for dots, steps, some in zip(left.collections, right.patches, (logits, 5 * logits), strict=True):
        found = calibration((some / 2).softmax(1), labels_)
        there = found.count > 0
        expected = torch.stack([found.confidence[there], found.accuracy[there]], 1)
        assert torch.equal(torch.from_numpy(dots.get_offsets().data), expected)
        assert steps.get_data().values.sum() == pytest.approx(100)
        assert steps.get_data().values.tolist() == pytest.approx((found.count / 2).tolist())
        assert f"calibration error {100 * found.error:.1f} points" in " ".join(labels(left))
    assert "data set: noise, 200 images; temperature 2.00" == figure.get_suptitle()
    sure = [float(text.split("confidence ")[1].split(" %")[0]) for text in labels(right)]
    assert sure[1] > sure[0] + 10  # larger logits, more confidence


# --- activations ---


def test_pool_and_activation_commute_where_the_curve_never_falls():
    left, right = concept_plots.activation_curves(0.5).axes
    differing = {text.split(":")[0]: int(text.split(": ")[1].split(" ")[0]) for text in labels(right)}
    assert differing["relu"] == differing["celu, alpha = 0.5"] == 0
    assert differing["gelu"] > 10 and differing["silu"] > 10
    dots = {one.get_label().split(":")[0]: one.get_offsets() for one in right.collections}
    for name, count in differing.items():
        off = (abs(dots[name][:, 0] - dots[name][:, 1]) > 1e-6).sum()
        assert off == count and (dots[name][:, 1] >= dots[name][:, 0] - 1e-6).all()


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_alpha_is_how_far_celu_reaches_below_zero(alpha):
    left = concept_plots.activation_curves(alpha).axes[0]
    curve = curves(left)[f"celu, alpha = {alpha:g}"]
    assert curve.get_ydata().min() == pytest.approx(alpha * math.expm1(-3 / alpha), abs=1e-5)


def test_curves_differ_without_colour():
    for property in ("linestyle", "marker", "color"):
        assert len({style[property] for style in concept_plots.SERIES}) == 5


# --- number formats ---


def test_the_formats_errors_are_those_of_rounding_and_float16_ends_first():
    (axes,) = concept_plots.number_formats(1e-8).axes
    half, brain, single = (line.get_xydata() for line in axes.get_lines()[:3])
    ends = [curve[:, 0].max() for curve in (half, brain, single)]
    assert ends == [2**15, 2**39, 2**39]  # float16 has no finite number beyond 65,504
    for curve, digits in ((half, 11), (brain, 8), (single, 24)):  # the leading bit counts
        (error,) = curve[curve[:, 0] == 1.0, 1]
        assert 0.9 * 2.0**-digits < error <= 2.0**-digits
    assert half[0][1] == 1  # too small: it becomes 0
    assert labels(axes)[0] == "float16: 1e-08 becomes 0"
    assert labels(axes)[2] == "float32: 1e-08 becomes 1e-08"


@pytest.mark.parametrize(("scale", "said"), [(1.0, "a: 50.0 % become 0"), (2.0**20, "a: 25.0 % infinite")])
def test_the_shares_of_gradients_are_where_they_are_after_scaling(scale, said):
    values = torch.tensor([2.0**-30, -(2.0**-26), 2.0**-20, 1.0])
    (axes,) = concept_plots.gradient_sizes({"a": values, "b": torch.ones(3)}, scale).axes
    first, second = curves(axes).values()
    found = dict(zip(first.get_xdata().tolist(), first.get_ydata().tolist(), strict=True))
    for power in (-30, -26, -20, 0):
        assert found[power + math.log2(scale) + 0.5] == 25.0  # of a layer's gradients, in the middle of the octave
    assert sum(found.values()) == 100.0 and max(second.get_ydata()) == 100.0
    assert said.split(": ")[1] in first.get_label() and said.split(": ")[1] in axes.figure.alt


def test_no_layer_is_left_out_of_the_sizes_of_gradients():
    layers = {f"layer {number}": torch.full((4,), 2.0**-number) for number in range(8)}
    (axes,) = concept_plots.gradient_sizes(layers).axes
    drawn = [line for line in axes.lines if line.get_label().startswith("layer")]
    assert len(drawn) == 8 and all(name in axes.figure.alt for name in layers)
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in drawn}
    assert len(looks) == 8


# --- ways in turns ---


def test_each_round_is_a_dot_where_its_speed_against_the_first_way_is():
    (axes,) = concept_plots.turns({"slow": [6.0, 8.0, 9.0], "fast": [3.0, 2.0, 3.0]}, where="Some Processor").axes
    dots = [one.get_offsets()[:, 0].tolist() for one in axes.collections]
    assert dots == [[1, 1, 1], [2, 4, 3]]
    assert [text.get_text() for text in axes.texts] == ["1.00", "3.00"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["slow", "fast"]
    assert "speed relative to: slow" in axes.get_xlabel() and "Some Processor" in axes.figure.get_suptitle()


# --- ghost groups ---


def test_the_dots_are_the_statistics_that_ghost_batch_norm_takes():
    activations = 3 * torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    left, right = concept_plots.group_statistics(activations, 4, dataset="noise", channel=1).axes
    norm = GhostBatchNorm(2, 4, eps=1e-5, momentum=1.0, freeze_scale=True)
    norm(activations)  # with momentum 1 the running statistics are the groups' mean, the variance unbiased
    for axes, expected in ((left, norm.running_mean), (right, norm.running_var * (63 / 64))):
        (marked,) = [one for one in axes.collections if len(one.get_offsets()) and (one.get_offsets()[:, 0] == 4).all()]
        assert marked.get_offsets().shape == (4, 2)
        assert marked.get_offsets()[:, 1].mean() == pytest.approx(expected[1].item(), rel=1e-5)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4", "8", "16"]


def test_smaller_groups_scatter_more():
    left = concept_plots.group_statistics(
        torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)), dataset="n"
    )
    groups = {
        one.get_offsets()[0, 0]: one.get_offsets()[:, 1] for one in left.axes[0].collections if len(one.get_offsets())
    }
    assert groups[2].std() > groups[8].std() > groups[32].std()
    assert "data set: n" in left.get_suptitle()


def test_a_group_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(UserError, match="group_size=5 does not divide the batch of 16"):
        concept_plots.group_statistics(torch.zeros(16, 1, 2, 2), 5, dataset="zeros")


# --- scales and biases of batch norm ---


def test_without_a_scale_the_curve_is_larger_and_after_the_next_norm_the_same():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    left, right, _ = concept_plots.scaled_activation(values, 0.5, 0.2, celu_alpha=0.1, dataset="noise").axes
    scaled, unscaled = (line.get_ydata() for line in left.get_lines())
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    assert scaled == pytest.approx(F.celu(0.5 * x + 0.2, 0.1).numpy())
    assert unscaled == pytest.approx(F.celu(x + 0.4, 0.2).numpy()) and unscaled == pytest.approx(2 * scaled)
    outputs = F.celu(values.double() + 0.4, 0.2)
    expected = (unscaled - outputs.mean().item()) / outputs.std(correction=0).item()
    assert len(right.get_lines()) == 2
    for line in right.get_lines():
        assert line.get_ydata() == pytest.approx(expected)
    share = (values > -0.4).double().mean().item()
    assert f"{100 * share:.0f} % of the inputs of CELU are positive" in left.get_figure().get_suptitle()


def test_a_scale_of_zero_is_refused():
    with pytest.raises(UserError, match="scale=0.0 and celu_alpha=0.1 must be above 0"):
        concept_plots.scaled_activation(torch.zeros(2), 0.0, celu_alpha=0.1, dataset="zeros")


# --- schedules ---


def test_a_schedule_has_markers_at_its_knots_and_goes_on_to_the_last_epoch():
    (axes,) = concept_plots.learning_rates({"page": page_2019()}, at=5.0).axes
    line = curves(axes)["page"]
    assert line.get_xydata().tolist() == [[0, 0], [2, 1], [8, pytest.approx(0.1)], [10, pytest.approx(0.1)]]
    assert line.get_markevery() == [0, 1, 2]
    (pointer,) = [one for one in axes.get_lines() if len(one.get_xdata()) == 1]
    assert pointer.get_xydata().tolist() == [[5, pytest.approx(0.55)]]


# --- Newton-Schulz ---


def test_the_dots_are_the_matrix_singular_values_before_and_after_orthogonalising():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    left, right = concept_plots.newton_schulz(matrix, steps=2).axes
    before = torch.linalg.svdvals(matrix / matrix.norm())
    after = torch.linalg.svdvals(orthogonalise(matrix[None], 2)[0])
    lines = curves(right)
    assert lines["before"].get_ydata() == pytest.approx(before.numpy(), abs=1e-5)
    assert lines["after 2 iterations"].get_ydata() == pytest.approx(after.numpy(), abs=1e-4)
    (dots,) = [one.get_offsets() for one in left.collections if len(one.get_offsets()) == 6]
    assert dots[:, 0].tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert sorted(dots[:, 1].tolist(), reverse=True) == pytest.approx(after.tolist(), abs=1e-4)


def test_the_quintic_lifts_small_values_faster_than_the_cubic_and_the_cubic_settles():
    (left, _) = concept_plots.newton_schulz(torch.eye(3), steps=8).axes
    (quintic,) = [line for name, line in curves(left).items() if name.startswith("quintic")]
    (cubic,) = [line for name, line in curves(left).items() if name.startswith("cubic")]
    assert quintic.get_ydata()[0] > 0.5 > cubic.get_ydata()[0]  # of a value of 0.001
    assert cubic.get_ydata()[-1] == pytest.approx(1) and abs(quintic.get_ydata()[-1] - 1) > 0.05


# --- EMA ---


def test_an_average_leaves_the_way_alone_and_lookahead_does_not():
    first, second = concept_plots.bowl_paths(0.9, 0.5, 5), concept_plots.bowl_paths(0.5, 0.5, 5)
    assert torch.equal(first["alone"], second["alone"]) and not torch.equal(first["ema"], second["ema"])
    assert torch.equal(first["alone"][:5], first["lookahead"][:5])  # until the first move
    moves = torch.arange(41) // 5 * 5  # the slow weights stand still from one move to the next
    assert torch.equal(first["slow"], first["lookahead"][moves])
    assert not torch.equal(first["alone"][5], first["lookahead"][5])
    halfway = (first["alone"][0] + first["alone"][5]) / 2
    torch.testing.assert_close(first["lookahead"][5], halfway)


def test_an_average_that_forgets_at_once_is_the_way_and_so_is_a_lookahead_that_goes_all_of_it():
    paths = concept_plots.bowl_paths(0.0, 1.0, 1)
    torch.testing.assert_close(paths["ema"], paths["alone"])
    torch.testing.assert_close(paths["lookahead"], paths["alone"])


def test_the_bowl_draws_the_ways_and_says_their_losses():
    figure = concept_plots.averages_on_a_bowl(0.8, 0.25, 4)
    paths = concept_plots.bowl_paths(0.8, 0.25, 4)
    losses = [(0.5 * (path**2 * torch.tensor([1.0, 8.0])).sum(1))[-13:].mean().item() for path in paths.values()]
    losses = dict(zip(paths, losses, strict=True))
    for axes, name in zip(figure.axes, ("ema", "slow"), strict=True):
        words = labels(axes)
        assert words[0] == f"SGD: loss {losses['alone']:.2f}"
        assert words[-1].endswith(f"every 4: loss {losses[name]:.2f}")
        assert curves(axes)[words[-1]].get_xydata().tolist() == paths[name][::4].tolist()
    assert words[1] == f"Lookahead's fast weights: loss {losses['lookahead']:.2f}"
    assert curves(figure.axes[1])[words[1]].get_xydata().tolist() == paths["lookahead"].tolist()
    with pytest.raises(UserError, match="lookahead_alpha=1.5"):
        concept_plots.averages_on_a_bowl(0.9, 1.5)


# --- ablation ---


def runs(accuracies: list[float], seconds: list[float]) -> list[dict[str, Any]]:
    machine = {"gpu": None, "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 2}
    data = {"name": "CIFAR-10", "n_train": 50_000, "n_test": 10_000}
    return [
        {"seed": i, "accuracy": a, "train_seconds": s, "dataset": data, "environment": machine}
        for i, (a, s) in enumerate(zip(accuracies, seconds, strict=True))
    ]


def test_the_clocks_add_up_to_the_whole():
    line = runs([0.9], [10])[0] | {"evaluate_seconds": 3, "total_seconds": 15.5}
    figure = concept_plots.clocks({"one": line, "two": line | {"total_seconds": 20}})
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[10, 10], [3, 3], [2.5, 7]]
    assert [bar.get_x() for bar in axes.containers[2]] == [13, 13]
    assert axes.texts[0].get_text() == " 10.0 of 15.5 s" and axes.get_xlabel() == "seconds"
    assert "data set: CIFAR-10" in figure.get_suptitle()


def epochs(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"train_seconds": seconds, "test_accuracy": accuracy} for seconds, accuracy in points]


# --- what others published ---


def test_the_published_ladder_splits_seconds_into_epochs_and_seconds_an_epoch():
    figure = concept_plots.published_ladder(ladder())
    left, right = figure.axes
    assert [bar.get_width() for bar in left.containers[0]] == list(LADDER_2019.values())
    shares = {line.get_label(): line.get_xdata() for line in right.get_lines()}
    products = shares["epochs"] * shares["seconds an epoch"] / 100
    assert products == pytest.approx([100 * seconds / 75 for seconds in LADDER_2019.values()])
    titles = [" ".join(text.get_text().split()) for text in left.get_yticklabels()]
    assert titles[7] == "frozen batch-norm scales + faster biases"  # published together
    assert "75 s (24 epochs) to 26 s (10 epochs) in 10 steps" in figure.alt


def test_records_stand_at_their_seconds_by_the_kind_of_hardware():
    figure = concept_plots.records(RECORDS)
    (axes,) = figure.axes
    places = {(x, y) for marks in axes.collections for x, y in marks.get_offsets().tolist()}
    assert places == {(record.seconds, row) for row, record in enumerate(RECORDS)}
    assert labels(axes) == ["vCPU", "V100", "A100", "4090"]
    assert "Fulcrum" in figure.alt and axes.get_xscale() == "log"


def test_the_interval_of_a_share_is_wilsons():
    figure = concept_plots.share_intervals(0.82, 50)
    mark = next(line for line in figure.axes[0].get_lines() if line.get_linewidth() == 2.5)
    assert list(mark.get_ydata()) == pytest.approx([100 * end for end in wilson_interval(41, 50)])
    assert "82.00 % of 50 runs" in figure.alt
    with pytest.raises(UserError, match=r"share=1\.5"):
        concept_plots.share_intervals(1.5, 50)
    with pytest.raises(UserError, match="n=0"):
        concept_plots.share_intervals(0.5, 0)


# --- the ring ---


def test_the_ring_counts_up_to_all_workers_and_frames_what_is_complete():
    figure = concept_plots.all_reduce_ring(4)
    tables = [[int(text.get_text()) for text in axes.texts] for axes in figure.axes]
    framed = [sum(text.get_bbox_patch() is not None for text in axes.texts) for axes in figure.axes]
    assert tables[0] == [1] * 16 and tables[-1] == [4] * 16
    assert [max(table) for table in tables] == [1, 2, 3, 4, 4, 4, 4]
    assert framed == [0, 0, 0, 4, 8, 12, 16]
    assert "6 rounds" in figure.alt
    with pytest.raises(UserError, match="n_workers=6"):
        concept_plots.all_reduce_ring(6)


# --- timeline ---

LINK = Link("wire", latency_seconds=1e-3, bytes_per_second=1e9, source="made up for a test")
COSTS = StepCosts(
    points=(StepPoint(256, 0.0045, 0.0045, 0.0), StepPoint(2048, 0.0225, 0.0225, 0.0)),
    n_parameters=1_000_000,
    precision="float16",
    setup_seconds=0.5,
    evaluate_seconds_per_image=1e-4,
    hardware="Some GPU",
    on_gpu=True,
)


def predicted(world_size: int) -> Any:
    return predict(COSTS, apple_8gpu(), 50_000, 10_000, world_size, LINK)


def test_a_recipe_s_off_values_draw_too():
    assert concept_plots.learning_rates({"custom": Recipe()}).png().startswith(b"\x89PNG")
