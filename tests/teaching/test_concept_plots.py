"""Teaching figures draw what the package computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.errors import UserError
from cifar_fast.experiments.all_reduce import Link
from cifar_fast.experiments.plan import predict
from cifar_fast.experiments.published import LADDER_2019, RECORDS
from cifar_fast.experiments.statistics import mean_interval, wilson_interval
from cifar_fast.experiments.step_costs import StepCosts, StepPoint
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import apple_8gpu, ladder, page_2019
from cifar_fast.teaching import concept_plots
from cifar_fast.training.averaging import EMA
from cifar_fast.training.evaluate import calibration
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.optim import orthogonalise
from cifar_fast.training.result import EpochResult, RunResult

CLASSES = ("cat", "dog", "ship")
LOGITS = torch.tensor([3.0, 1.0, -2.0])


def curves(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# --- label smoothing ---


def test_the_bars_are_the_smoothed_target_and_the_softmax_at_the_temperature():
    left, _ = concept_plots.label_smoothing(LOGITS, 1, CLASSES, label_smoothing=0.3, temperature=2.0).axes
    target, predicted = ([bar.get_height() for bar in bars] for bars in left.containers)
    assert target == pytest.approx([0.1, 0.8, 0.1])
    assert predicted == pytest.approx((LOGITS / 2).softmax(0).tolist())
    assert [tick.get_text() for tick in left.get_xticklabels()] == list(CLASSES)


def test_the_loss_is_cross_entropy_with_label_smoothing_and_its_floor_the_entropy_of_the_target():
    _, right = concept_plots.label_smoothing(LOGITS, 0, CLASSES, label_smoothing=0.3, temperature=2.0).axes
    hard = F.cross_entropy(LOGITS[None] / 2, torch.tensor([0])).item()
    smoothed = F.cross_entropy(LOGITS[None] / 2, torch.tensor([0]), label_smoothing=0.3).item()
    target = torch.tensor([0.8, 0.1, 0.1])
    entropy = -(target * target.log()).sum().item()
    assert labels(right) == [
        f"hard target: loss {hard:.3f}",
        f"smoothed target: loss {smoothed:.3f}",
        f"entropy of the target: {entropy:.3f}",
    ]
    drawn = curves(right)
    assert min(drawn[f"smoothed target: loss {smoothed:.3f}"].get_ydata()) >= entropy
    points = [line.get_xydata().tolist() for line in right.get_lines() if len(line.get_xdata()) == 1]
    assert points == [[[2.0, pytest.approx(hard)]], [[2.0, pytest.approx(smoothed)]]]


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


def test_the_positions_of_max_pool_are_those_of_a_block_with_a_fresh_norm():
    convolved = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 5
    figure = concept_plots.pool_positions(convolved, dataset="noise")
    norm = nn.BatchNorm2d(2)
    expected = {
        "after_activation": norm(convolved),
        "before_activation": F.max_pool2d(norm(convolved), 2),
        "before_norm": norm(F.max_pool2d(convolved, 2)),
    }
    for (name, values), text, steps in zip(
        expected.items(), labels(figure.axes[0]), figure.axes[0].patches, strict=True
    ):
        assert text.startswith(f"{name}: {100 * (values > 0).double().mean():.1f} % above 0")
        drawn, edges = steps.get_data().values, steps.get_data().edges
        within = ((values >= edges[0]) & (values <= edges[-1])).double().mean().item()
        assert drawn.sum() == pytest.approx(100 * within)
        assert drawn[edges[:-1] >= -1e-6].sum() == pytest.approx(
            100 * ((values > 0) & (values <= 4)).double().mean().item(), abs=0.1
        )


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


@pytest.mark.parametrize(("which", "word"), [("bias", "bias"), ("weight", "scale")])
def test_every_channel_of_every_norm_is_a_dot(which, word):
    networks = {}
    for name, value in (("first", 0.5), ("second", -2.0)):
        networks[name] = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        for norm in (networks[name][0], networks[name][2]):
            getattr(norm, which).data.copy_(value * torch.arange(norm.num_features))
    figure = concept_plots.norm_parameters(networks, which)
    (axes,) = figure.axes
    dots = [one.get_offsets() for one in axes.collections if len(one.get_offsets()) > 1]
    drawn = sorted(float(y) for some in dots for y in some[:, 1])
    assert drawn == sorted(value * i for value in (0.5, -2.0) for count in (3, 4) for i in range(count))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "2"]
    assert axes.get_ylabel() == f"{word} of a channel"
    assert "first: mean 0.643, root mean square 0.824" in figure.alt


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


def test_the_average_is_the_one_that_ema_keeps():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(values[0])
    ema = EMA(model, decay=0.8)  # type: ignore[arg-type]
    expected = [values[0]]
    for step, value in enumerate(values[1:], start=1):
        model.weight.data.fill_(value)
        if step % 3 == 0:
            ema.update(model)  # type: ignore[arg-type]
        expected.append(ema.model.weight.item())
    assert concept_plots.running_average(values, 0.8, 3) == pytest.approx(expected, abs=1e-6)


def test_the_weights_of_past_steps_are_those_of_the_average():
    left, right = concept_plots.ema_horizon(0.75, 4, steps=400, values=[0.0] * 396 + [1.0] * 5).axes
    heights = [segment[1][1] for segment in left.collections[0].get_segments()]
    assert heights[:3] == pytest.approx([0.25, 0.1875, 0.140625])
    assert sum(heights) == pytest.approx(1, abs=1e-6)
    # After the last five steps, two of them updates, the average has taken the two newest weights.
    assert curves(right)["average, decay 0.75 every 4"].get_ydata()[-1] == pytest.approx(heights[0] + heights[1])
    mean_age = sum(4 * i * weight for i, weight in enumerate(heights))
    assert f"mean age {mean_age:.4g} steps" == "mean age 12 steps" == labels(left)[1]


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (-0.1, 1), (0.5, 0)])
def test_an_average_that_cannot_be_is_refused(decay, every):
    with pytest.raises(UserError, match=f"decay={decay}.*every={every}"):
        concept_plots.ema_horizon(decay, every)


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


def test_every_run_is_a_dot_and_the_difference_is_paired_by_seed():
    without, smoothed = runs([0.90, 0.91, 0.92], [10, 11, 12]), runs([0.92, 0.925, 0.94], [10.5, 11, 12])
    figure = concept_plots.ablation({"off": without, "on": smoothed[::-1]})
    for axes, field, scale, unit in zip(figure.axes, ("accuracy", "train_seconds"), (100, 1), ("%", "s"), strict=True):
        dots = [one.get_offsets()[:, 0].tolist() for one in axes.collections if len(one.get_offsets()) == 3]
        assert [sorted(some) for some in dots] == [[scale * run[field] for run in arm] for arm in (without, smoothed)]
        differences = [scale * (b[field] - a[field]) for a, b in zip(without, smoothed, strict=True)]
        low, high = mean_interval(differences)
        mean = sum(differences) / 3
        assert axes.get_title() == f"difference: {mean:+.2f} (95 % interval {low:+.2f} to {high:+.2f}) {unit}"
    assert figure.axes[0].get_xlabel() == "test accuracy in %" and figure.axes[1].get_xlabel() == "train_seconds"
    assert figure.get_suptitle() == (
        "data set: CIFAR-10 (50,000 training and 10,000 test images); Some Processor, AVX512, 2 threads"
    )


def test_other_seeds_or_more_arms_give_no_difference():
    other = [run | {"seed": run["seed"] + 1} for run in runs([0.9, 0.91], [10, 11])]
    some = runs([0.9, 0.91], [10, 11])
    for arms in ({"a": some, "b": other}, {"a": some, "b": some, "c": runs([0.9], [10])}):
        assert [axes.get_title() for axes in concept_plots.ablation(arms).axes] == ["", ""]


def test_the_name_of_an_arm_breaks_behind_its_equals_sign():
    names = ["label_smoothing=0", "pool_position=after_activation", "a name of several words in a row"]
    figure = concept_plots.ablation({name: runs([0.9, 0.91], [10, 11]) for name in names})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        "label_smoothing=0",
        "pool_position=\nafter_activation",
        "a name of several words\nin a row",
    ]


def test_results_are_drawn_like_their_lines():
    (line,) = runs([0.9], [10])
    epoch = EpochResult(
        epoch=1, train_loss=1, train_accuracy=0.5, test_loss=1, test_accuracy=0.9, tta="none", train_seconds=10
    )
    result = RunResult(
        recipe=Recipe(),
        dataset=line["dataset"],
        environment=line["environment"],
        seed=0,
        epochs=[epoch],
        train_seconds=10,
        evaluate_seconds=1,
        total_seconds=12,
        first_step_seconds=1,
        peak_memory_gb=1,
        model=nn.Identity(),  # type: ignore[arg-type]
    )
    for arm in ([line], [result]):
        accuracy, seconds = concept_plots.ablation({"off": arm}).axes
        assert [axes.texts[0].get_text() for axes in (accuracy, seconds)] == ["90.00 %, n = 1", "10.00 s, n = 1"]


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


def test_a_run_reaches_its_target_at_the_end_of_the_first_epoch_that_does():
    line = runs([0.9], [10])[0]
    up_and_down = line | {"epochs": epochs((2, 0.5), (4, 0.94), (6, 0.93))}
    below = line | {"epochs": epochs((3, 0.4), (6, 0.9399))}
    figure = concept_plots.time_to_accuracy({"a": up_and_down, "b": below}, 0.94)
    (axes,) = figure.axes
    assert list(axes.get_lines()[0].get_ydata()) == [50, 94, 93]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a: after 4.0 s of 6.0 s", "b: not reached"]
    (drop,) = axes.collections  # one vertical line, where the target is reached
    assert drop.get_segments()[0][0][0] == 4
    assert axes.get_ylabel() == "test accuracy in %" and "data set: CIFAR-10" in figure.get_suptitle()


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


def test_the_timeline_repeats_each_lane_s_step_and_says_that_it_is_a_prediction():
    figure = concept_plots.timeline(predicted(8), predicted(1))
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "one worker",
        *(f"worker {i} of 8" for i in range(1, 9)),
    ]
    now = predicted(8)
    compute, reduce = 1000 * now.compute_seconds / now.steps, 1000 * now.all_reduce_seconds / now.steps
    lanes = [[path.get_extents().intervalx for path in bars.get_paths()] for bars in axes.collections]
    alone, first_compute, first_reduce = lanes[:3]
    assert len(alone) == 1 and alone[0].tolist() == pytest.approx([0, 22.5])
    assert first_compute[1].tolist() == pytest.approx([compute + reduce, 2 * compute + reduce])
    assert first_reduce[0].tolist() == pytest.approx([compute, compute + reduce])
    assert "PREDICTION, not a measurement" in figure.get_suptitle() and "Some GPU" in figure.get_suptitle()
    assert f"{22.5 / (compute + reduce):.2f} times as fast as one" in figure.get_suptitle()


def test_workers_that_are_not_drawn_are_mentioned():
    many = predict(COSTS, replace(apple_8gpu(), n_shards=64), 50_000, 10_000, 64, LINK)
    figure = concept_plots.timeline(many)
    assert len(figure.axes[0].get_yticklabels()) == 8
    assert "56 more look the same" in figure.get_suptitle()


def test_a_recipe_s_off_values_draw_too():
    assert concept_plots.learning_rates({"custom": Recipe()}).png().startswith(b"\x89PNG")
