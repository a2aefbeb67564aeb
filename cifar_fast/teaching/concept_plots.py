"""Teaching figures: each draws one idea from plain data, without training anything and without pyplot's state.

All colours are Okabe and Ito's (2008), and what differs in colour also differs in marker, dash or hatch. Every figure
has an opaque white background, whatever the theme of the page, and a sentence (`alt`) for those who cannot see it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from cifar_fast.errors import UserError
from cifar_fast.experiments.all_reduce import ring_all_reduce
from cifar_fast.experiments.published import LADDER_2019, Record
from cifar_fast.experiments.statistics import speeds, wilson_interval
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import Rung
from cifar_fast.shown import data_set, hardware, percent
from cifar_fast.teaching.result_plots import Picture
from cifar_fast.training import optim
from cifar_fast.training.averaging import EMA, Lookahead
from cifar_fast.training.evaluate import calibration as calibrate
from cifar_fast.training.model import activation
from cifar_fast.training.optim import NEWTON_SCHULZ, lr_schedule, orthogonalise
from cifar_fast.training.result import RunResult

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": (0, (1, 1)), "marker": "D"},
    {"color": "black", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
)
"""Styles of the first, second, ... of several curves."""


def tidy(axis: Axes) -> None:
    """Reduce an axis to what is needed to read it: a faint grid behind the data, and two spines."""
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# --- the loss and the network ---


def calibration(
    logits: Mapping[str, Tensor], labels: Tensor, *, dataset: str, temperature: float = 1.0, n_bins: int = 10
) -> Picture:
    """Draw how confident networks are, against how often they are right (a reliability diagram).

    Args:
        logits: by the name of the network, at most five: float (N, K).
        labels: int64 (N,).
        dataset: name of the data set.
        temperature: all logits are divided by it.
        n_bins: number of equally wide bins of the confidence.

    Returns:
        The figure. Left: the accuracy of each bin over its confidence, with larger markers for more images; a
        calibrated network lies on the diagonal. Right: the distribution of the confidence.
    """
    figure = Picture(figsize=(9.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="perfect calibration")
    edges, words = torch.linspace(0, 1, n_bins + 1), []
    for (name, some), style in zip(logits.items(), SERIES, strict=False):
        found = calibrate((some / temperature).softmax(1), labels, n_bins)
        there, share = found.count > 0, found.count / found.count.sum()
        means = [(values[there] * share[there]).sum().item() for values in (found.confidence, found.accuracy)]
        words.append(f"{name}: confidence {100 * means[0]:.1f} %, accuracy {100 * means[1]:.1f} %")
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        left.plot(found.confidence[there], found.accuracy[there], **line)
        left.scatter(
            found.confidence[there],
            found.accuracy[there],
            s=8 + 300 * share[there],
            marker=style["marker"],
            color=style["color"],
            alpha=0.8,
            zorder=3,
        )
        left.plot([], [], **style, label=f"{name}: calibration error {100 * found.error:.1f} points")
        right.stairs(100 * share, edges, linewidth=2, label=words[-1], **line)
    left.set(xlabel="confidence: probability of the predicted class", ylabel="accuracy")
    left.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
    right.set(xlabel="confidence", ylabel="images in %", xlim=(0, 1.03))
    right.set_ylim(0, 1.35 * right.dataLim.y1)  # room for the legend
    for axis, place in ((left, "best"), (right, "upper right")):  # overconfident networks lie below the diagonal
        tidy(axis)
        axis.legend(fontsize="small", loc=place)
    figure.suptitle(f"data set: {dataset}, {len(labels):,} images; temperature {temperature:.2f}", fontsize="medium")
    figure.alt = f"Confidence and accuracy at temperature {temperature:.2f}; " + "; ".join(words)
    return figure


def activation_curves(celu_alpha: float = 0.3, *, seed: int = 0) -> Picture:
    """Draw the activations, and which of them commute with max-pool.

    Args:
        celu_alpha: alpha of CELU.
        seed: seed of the random windows.

    Returns:
        The figure. Left: the curves, with a band where they fall. Right: 1,000 windows of 2 x 2 normal random numbers
        of standard deviation 2, the activation of their maximum against the maximum of their activations: equal where
        the curve never falls.
    """
    x = torch.linspace(-3, 2, 501)
    windows = 2 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(seed))
    figure = Picture(figsize=(9.4, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    verdicts = []
    # Markers that are drawn first are larger, so that all are seen where they meet.
    for name, style, size in zip(("relu", "celu", "gelu", "silu"), SERIES, (80, 45, 20, 8), strict=False):
        f = activation(Recipe(activation=name, celu_alpha=celu_alpha))  # type: ignore[arg-type]
        y = f(x)
        title = f"celu, alpha = {celu_alpha:g}" if name == "celu" else name
        left.plot(x, y, color=style["color"], linestyle=style["linestyle"], label=title)
        falls = torch.cat([y.diff() < -1e-7, torch.tensor([False])])
        if falls.any():
            left.plot(x[falls], y[falls], color=style["color"], linewidth=6, alpha=0.35, solid_capstyle="butt")
        pooled_first, pooled_last = f(windows.amax(1)), f(windows).amax(1)
        different = int((pooled_first - pooled_last).abs().gt(1e-6).sum())
        verdicts.append(f"{title}: {different} of {len(windows):,} differ")
        right.scatter(
            pooled_first, pooled_last, s=size, marker=style["marker"], facecolor="none", edgecolor=style["color"],
            linewidth=0.9, label=verdicts[-1],
        )  # fmt: skip
    left.plot([], [], color=GREY, linewidth=6, alpha=0.6, label="where the curve falls")
    left.set(xlabel="input", ylabel="output", xlim=(-3, 2), ylim=(-1.05, 2))
    low = min(-0.3, -celu_alpha) - 0.03
    right.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
    right.set(xlim=(low, 0.05), ylim=(low, 0.05))
    right.locator_params(nbins=6)
    right.set(xlabel="pool first: activation of the maximum", ylabel="pool last: maximum of the activations")
    right.set_title(f"{len(windows):,} windows of random numbers, standard deviation 2", fontsize="small")
    for axis in (left, right):
        tidy(axis)
        axis.legend(fontsize="small", loc="upper left")
    right.legend(fontsize="small", loc="lower right")
    figure.suptitle("max-pool commutes with an activation that never falls", fontsize="medium")
    figure.alt = "Curves of four activations; pooling before or after: " + "; ".join(verdicts)
    return figure


def group_statistics(activations: Tensor, group_size: int | None = None, *, dataset: str, channel: int = 0) -> Picture:
    """Draw the mean and variance that batch norm would take of each ghost group of a batch, over the group size.

    Args:
        activations: float (N, C, H, W), what enters a batch norm, N a power of two times an odd number.
        group_size: images in a group, to be marked; None marks nothing.
        dataset: name of the data set.
        channel: which of the C channels.

    Returns:
        The figure. Dots are groups of consecutive images; the dashed lines show what chance does to the mean: two
        standard deviations of the images' means, over the square root of the group size, to each side.

    Raises:
        UserError: the group size does not divide the batch.
    """
    n = len(activations)
    if group_size is not None and (group_size < 1 or n % group_size):
        raise UserError(f"group_size={group_size} does not divide the batch of {n} images")
    sizes = {2**i for i in range(1, n.bit_length()) if n % 2**i == 0} | {n}
    sizes |= set() if group_size is None else {group_size}
    values = activations[:, channel].double().flatten(1)  # (N, H * W)
    figure = Picture(figsize=(9.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = []
    for size in sorted(sizes):
        groups = values.reshape(n // size, -1)
        marked = size == group_size
        style = {"color": VERMILION, "marker": "D", "s": 26} if marked else {"color": BLUE, "marker": "o", "s": 14}
        for axis, statistic in ((left, groups.mean(1)), (right, groups.var(1, correction=0))):
            axis.scatter([size] * len(groups), statistic, alpha=0.6, linewidth=0, zorder=3, **style)
        if marked:
            left.scatter([], [], label=f"the {n // size} groups of {size}", **style)
            spread = groups.mean(1).std(correction=0).item()
            found.append(f"{n // size} group means with groups of {size} have a standard deviation of {spread:.3g}")
    scale = torch.logspace(math.log2(min(sizes)), math.log2(n), 50, base=2)
    chance = 2 * values.mean(1).std() / scale.double().sqrt()
    for sign in (-1, 1):
        name = r"mean $\pm$ 2 standard deviations of the images' means / $\sqrt{\mathrm{group\ size}}$"
        left.plot(scale, values.mean() + sign * chance, color="black", linestyle="--", label=name if sign > 0 else "_")
    left.scatter([], [], color=BLUE, s=14, label="a group")
    ticks = sorted(size for size in sizes if size & (size - 1) == 0 or size == n)
    for axis, name in ((left, "mean of a group"), (right, "variance of a group")):
        axis.set(xscale="log", xlabel="images in a group", ylabel=name)
        axis.set_xticks(ticks, [str(size) for size in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        tidy(axis)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"data set: {dataset}, a batch of {n} images, channel {channel}", fontsize="medium")
    found = found or ["smaller groups have noisier means and variances"]
    figure.alt = f"Means and variances of groups of {min(sizes)} to {n} images: {found[0]}"
    return figure


def scaled_activation(
    values: Tensor, scale: float = 0.25, bias: float = -0.1, *, celu_alpha: float = 0.075, dataset: str
) -> Picture:
    """Draw CELU of a normalised channel with batch norm's scale and without it, and both after the next batch norm.

    Args:
        values: float, any shape: what batch norm computes before its scale and bias.
        scale: batch norm's scale.
        bias: its bias.
        celu_alpha: alpha of the CELU that follows.
        dataset: name of the data set.

    Returns:
        The figure. Without a scale, bias and alpha are divided by it instead. Left: the two functions, one `scale`
        times the other, over a histogram of the values. Right: both minus their mean over the values and divided by
        their standard deviation: the same.

    Raises:
        UserError: a scale or an alpha is not above 0.
    """
    if scale <= 0 or celu_alpha <= 0:
        raise UserError(f"scale={scale} and celu_alpha={celu_alpha} must be above 0")
    values = values.detach().double().flatten()
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    figure = Picture(figsize=(9.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    ways = {
        f"scale {scale:.3g}, bias {bias:.3g}, alpha {celu_alpha:.3g}": (scale, bias, celu_alpha),
        f"scale 1, bias {bias / scale:.3g}, alpha {celu_alpha / scale:.3g} (no scale)": (
            1.0,
            bias / scale,
            celu_alpha / scale,
        ),
    }
    for number, (name, (gamma, beta, alpha)) in enumerate(ways.items()):
        y, of_values = (F.celu(gamma * one + beta, alpha) for one in (x, values))
        next_norm = (y - of_values.mean()) / of_values.std(correction=0)
        style = SERIES[number]
        line = style | {"marker": "", "linewidth": 2}
        left.plot(x, y, label=name, **line)
        # The second curve lies on the first: it is drawn as markers alone.
        right.plot(x, next_norm, **(style | {"linestyle": "", "markevery": 6} if number else line))
    passed = (scale * values + bias > 0).double().mean().item()
    shares = left.twinx()
    shares.hist(values, bins=48, range=(-3, 3), color="#CCCCCC")
    shares.set(yticks=[], ylim=(0, 2.5 * shares.get_ylim()[1]))
    shares.spines[["top", "right"]].set_visible(False)
    shares.set_zorder(left.get_zorder() - 1)
    left.patch.set_visible(False)
    left.bar(0, 0, color="#CCCCCC", label="distribution of the values")
    left.set(xlabel="value after normalisation", ylabel="output of CELU", title="with a scale, and without")
    right.set(xlabel="value after normalisation", ylabel="in standard deviations", title="after the next norm")
    for axis in (left, right):
        tidy(axis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"data set: {dataset}; {100 * passed:.0f} % of the inputs of CELU are positive", fontsize="medium")
    figure.alt = f"CELU with {' and with '.join(ways)}: curves of one shape, and after the next norm one curve"
    return figure


def number_formats(value: float = 1e-5) -> Picture:
    """Draw the rounding error of number formats over the size of a number, and what each format makes of one value.

    Args:
        value: any positive number; it is marked.

    Returns:
        The figure: the largest relative error within each power of two. An error of 1 is a number that became 0; where
        a curve ends there are no more finite numbers.
    """
    octaves = torch.arange(-45, 40)
    # In each octave 41 numbers that no short format has exactly, and each format's worst, halfway to its second number.
    fractions = torch.cat([(torch.arange(41).double() + 0.37) / 41.5, 2.0 ** -torch.tensor([8, 11, 24]).double()])
    numbers = 2.0 ** octaves[:, None].double() * (1 + fractions)
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axis = figure.subplots()
    found = []
    for dtype, style in zip((torch.float16, torch.bfloat16, torch.float32), SERIES, strict=False):
        errors = ((numbers.to(dtype).double() - numbers).abs() / numbers).amax(1)
        finite = errors.isfinite()
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name}: {value:.4g} becomes {torch.tensor(value, dtype=torch.float64).to(dtype).item():.4g}")
        axis.plot(
            2.0 ** octaves[finite].double(),
            errors[finite],
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=2,
            label=found[-1],
        )
    axis.axvline(value, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", ylim=(1e-8, 3), xlabel="size of a number", ylabel="largest relative error")
    axis.legend(fontsize="small", loc=(0.02, 0.38))
    tidy(axis)
    figure.suptitle("the 16-bit formats: fewer digits (bfloat16) or a shorter range (float16)", fontsize="medium")
    figure.alt = "Relative rounding error over the size of a number; " + "; ".join(found)
    return figure


def gradient_sizes(gradients: Mapping[str, Tensor], loss_scale: float = 1.0) -> Picture:
    """Draw how large the gradients of layers are, and which of them float16 rounds to 0 or to infinity.

    Args:
        gradients: by the layer's name, float (n,) without zeros, of a mean loss. From the sixth layer on the styles
            repeat, with hollow markers.
        loss_scale: the loss, and so each gradient, is multiplied by it before it is rounded.

    Returns:
        The figure: for each layer the share of its gradients in each power of two, beside the limits of float16.
    """
    smallest, normal, largest = -25, -14, 16  # powers of two: rounded to 0 below, short of digits below, infinite above
    octaves = np.arange(-60, 31)
    figure = Picture(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(octaves[0], smallest, facecolor="#FBE3D4", edgecolor=VERMILION, hatch="xx", linewidth=0, alpha=0.7)
    axis.axvspan(smallest, normal, facecolor="#F6F1C4", edgecolor=GREY, hatch="..", linewidth=0, alpha=0.7)
    axis.axvspan(largest, octaves[-1], facecolor="#DDDDDD", edgecolor="black", hatch="//", linewidth=0, alpha=0.7)
    words, all_scaled = [], []
    for number, (name, values) in enumerate(gradients.items()):
        style = SERIES[number % len(SERIES)] | ({"markerfacecolor": "white"} if number >= len(SERIES) else {})
        scaled = values.double() * loss_scale
        all_scaled.append(scaled.abs().log2())
        heights, _ = np.histogram(all_scaled[-1].clamp(octaves[0], octaves[-1] - 0.5).numpy(), bins=octaves)
        rounded = scaled.to(torch.float16)
        words.append(f"{name}: {100 * rounded.eq(0).double().mean().item():.1f} % become 0")
        if overflow := rounded.isinf().double().mean().item():
            words[-1] += f", {100 * overflow:.1f} % infinite"
        shares = 100 * heights / max(1, len(values))
        axis.plot(octaves[:-1] + 0.5, shares, markevery=(len(words), 5), markersize=4, label=words[-1], **style)
    axis.set(xlim=(-44, 24), xlabel=f"gradient times loss scale {loss_scale:g}, as a power of two")
    axis.set(ylim=(0, 1.45 * axis.dataLim.y1), ylabel="share of a layer's gradients in %")
    top = axis.get_ylim()[1]
    zones = {-34.5: "float16: 0", -19.5: "float16:\nfew digits", 1: "float16: 11 bits", 20: "infinite"}
    for place, text in zones.items():
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axis.text(place, 0.97 * top, text, ha="center", va="top", fontsize=9, bbox=box)
    axis.legend(fontsize="small", loc="center right", framealpha=1)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"gradients of the mean loss times {loss_scale:g}, and the range of float16", fontsize="medium")
    figure.alt = f"Sizes of gradients times {loss_scale:g} by layer; in float16 {'; '.join(words)}"
    return figure


def turns(seconds: Mapping[str, Sequence[float]], *, where: str) -> Picture:
    """Draw how fast ways of doing the same work are, relative to the first: a dot for each round, a bar for the median.

    Args:
        seconds: by the way's name, what `clock.in_turns` measured, at most ten ways.
        where: the machine, for the title.

    Returns:
        The figure; right of 1 a way is faster than the first, in the same round.
    """
    found = speeds(seconds)
    figure = Picture(figsize=(9, 1.3 + 0.45 * len(found)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for row, now in enumerate(found.values()):
        middle = median(now)
        axis.plot([1, middle], [row, row], color=BLUE, linewidth=7, alpha=0.35, solid_capstyle="butt")
        axis.scatter(now, [row] * len(now), color=BLUE, s=22, zorder=3)
        axis.plot([middle] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2, zorder=4)
        axis.annotate(
            f"{middle:.2f}",
            (max(now), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set(
        xscale="log", ylim=(len(found) - 0.5, -0.5), xlabel=f"speed relative to: {next(iter(found))} (logarithmic)"
    )
    values = [value for now in found.values() for value in now]
    low, high = min(0.8, *values), max(1.25, *values)
    axis.set_xlim(low / 1.15, high * 1.35)
    subs = (1, 2, 5) if high > 6 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [sub * 10**power for power in range(-3, 4) for sub in subs if low / 1.1 <= sub * 10**power <= 1.1 * high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(found)), list(found))
    tidy(axis)
    figure.suptitle(f"relative speed, measured in turns on: {where}", fontsize="medium")
    figure.alt = "Speeds in turns: " + "; ".join(f"{name} {median(now):.2f}" for name, now in found.items())
    return figure


# --- over the training ---


def learning_rates(recipes: Mapping[str, Recipe], at: float | None = None) -> Picture:
    """Draw the schedules of recipes over the epochs, their knots marked, and their values at one time.

    Args:
        recipes: by the name of the curve, at most five.
        at: a time in epochs at which the values are marked and written out; None for none.

    Returns:
        The figure, in shares of each recipe's peak.
    """
    figure = Picture(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    words = []
    for (name, recipe), style in zip(recipes.items(), SERIES, strict=False):
        schedule = lr_schedule(recipe)
        times = sorted({*schedule.knots, recipe.epochs})  # between knots the lines are straight
        knots = [times.index(knot) for knot in schedule.knots]
        axis.plot(times, [schedule(t) for t in times], markevery=knots, label=name, clip_on=False, **style)
        if at is not None and at <= recipe.epochs:
            words.append(f"{name} {schedule(at):.3g}")
            axis.plot(at, schedule(at), "o", markersize=9, markerfacecolor="white", color=style["color"], zorder=4)
    title = "learning-rate schedules: linear between knots"
    if at is not None:
        axis.axvline(at, color="black", linewidth=0.8)
        title = f"at epoch {at:.2f}: " + (", ".join(words) or "training is over")
    end = max(recipe.epochs for recipe in recipes.values())
    axis.set(xlabel="epochs", ylabel="learning rate as a share of its peak", xlim=(-0.01 * end, 1.01 * end))
    axis.set_ylim(0, 1.05 * axis.dataLim.y1)
    axis.legend(fontsize="small")
    tidy(axis)
    figure.suptitle(title, fontsize="medium")
    figure.alt = f"Learning rates over {end:g} epochs: {', '.join(recipes)}" + (f"; {title}" if words else "")
    return figure


def newton_schulz(matrix: Tensor, steps: int = 3) -> Picture:
    """Draw how Newton-Schulz iterations change singular values, and those of one matrix.

    Args:
        matrix: float (m, n), an update that Muon would orthogonalise.
        steps: iterations.

    Returns:
        The figure: left the quintic of `optim.orthogonalise`, iterated, beside the cubic that converges, with the
        matrix's singular values (over its Frobenius norm) on the curve; right these values before and after.
    """
    matrix = matrix.detach().double().cpu()
    before = torch.linalg.svdvals(matrix / matrix.norm())
    after = torch.linalg.svdvals(orthogonalise(matrix[None], steps)[0])
    figure = Picture(figsize=(9.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = torch.logspace(-3, 0, 301, dtype=torch.float64)
    for axis in (left, right):
        axis.axhspan(0.5, 1.5, color="#DDDDDD", linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0, 1.6)
    left.plot(values, values, color=GREY, linestyle=":", label="before")
    for name, coefficients, style in (
        ("cubic (1.5, -0.5)", (1.5, -0.5, 0.0), SERIES[1]),
        (f"quintic {NEWTON_SCHULZ}", NEWTON_SCHULZ, SERIES[0]),
    ):
        curve = optim.newton_schulz(values, steps, coefficients)
        left.plot(values, curve, color=style["color"], linestyle=style["linestyle"], label=name)
    mapped = optim.newton_schulz(before, steps)
    left.scatter(before, mapped, s=20, color=BLUE, edgecolor="black", linewidth=0.6, zorder=3, label="this matrix")
    left.set(xlabel="singular value before", ylabel=f"after {steps} iterations", xscale="log", xlim=(1e-3, 1.05))
    numbers = range(1, len(before) + 1)
    right.plot(numbers, before, label="before", linewidth=0.8, markersize=4, **SERIES[1])
    # The polynomial is not monotonic: sorted values are not in the order of those before.
    right.plot(numbers, after, label=f"after {steps} iterations", linewidth=0.8, markersize=4, **SERIES[0])
    right.set(xlabel="index, largest first", ylabel="singular value")
    for axis in (left, right):  # the legends stand below: the curves use all of the height
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
        tidy(axis)
    figure.suptitle(
        f"a {matrix.shape[0]} x {matrix.shape[1]} matrix, divided by its norm; grey: 0.5 to 1.5", fontsize="medium"
    )
    figure.alt = (
        f"{steps} Newton-Schulz iterations bring the singular values of a {matrix.shape[0]} x {matrix.shape[1]} matrix "
        f"from {before.min().item():.2g} ... {before.max().item():.2g} to {after.min().item():.2g} ... "
        f"{after.max().item():.2g}"
    )
    return figure


CURVATURE = (1.0, 8.0)
"""The loss in `averages_on_a_bowl` is half the curvature times the squared weight, summed over both weights."""


def bowl_paths(
    ema_decay: float, lookahead_alpha: float, every: int, *, steps: int = 40, seed: int = 0
) -> dict[str, Tensor]:
    """Train two weights on a noisy bowl, without and with Lookahead, and return their paths, (steps + 1, 2) each.

    Args:
        ema_decay: what a step keeps of the average, 0 ... 1, 1 excluded, as in a recipe.
        lookahead_alpha: fraction of the way that the slow weights move, 0 ... 1.
        every: steps between two updates of the average, and between two moves.
        steps: steps of SGD at a constant learning rate.
        seed: seed of the noise, which is the same with and without Lookahead.

    Returns:
        `alone`: the weights; `ema`: their average; `lookahead`: the fast weights that Lookahead moves; `slow`: its slow
        weights, which stand still between two moves.

    Raises:
        UserError: a decay, a fraction or an interval is out of range.
    """
    if not 0 <= ema_decay < 1 or not 0 <= lookahead_alpha <= 1 or every < 1:
        raise UserError(
            f"ema_decay={ema_decay} must be at least 0 and below 1, lookahead_alpha={lookahead_alpha} 0 ... 1, and "
            f"every={every} at least 1 step"
        )
    paths: dict[str, list[Tensor]] = {"alone": [], "ema": [], "lookahead": [], "slow": []}
    for steered in (False, True):
        random = torch.Generator().manual_seed(seed)
        model: Any = nn.Linear(2, 1, bias=False)
        model.weight.data = torch.tensor([[-4.0, 1.6]])
        ema, lookahead = EMA(model, ema_decay**every), Lookahead(model, lookahead_alpha)
        for step in range(steps + 1):
            if step:
                gradient = torch.tensor([CURVATURE]) * model.weight.data + 2.5 * torch.randn(1, 2, generator=random)
                model.weight.data -= 0.15 * gradient
                if step % every == 0:
                    ema.update(model)
                    if steered:
                        lookahead.move()
            paths["lookahead" if steered else "alone"].append(model.weight.detach().flatten().clone())
            second = lookahead.slow[0] if steered else ema.model.get_parameter("weight")
            paths["slow" if steered else "ema"].append(second.detach().flatten().clone())
    return {name: torch.stack(path) for name, path in paths.items()}


def averages_on_a_bowl(
    ema_decay: float = 0.9, lookahead_alpha: float = 0.5, every: int = 5, *, steps: int = 40, seed: int = 0
) -> Picture:
    """Draw the path of two weights under noisy gradients: with their average, which does not change it, and with
    Lookahead, which does.

    Args:
        ema_decay: as in `bowl_paths`.
        lookahead_alpha: as in `bowl_paths`.
        every: as in `bowl_paths`.
        steps: steps of SGD.
        seed: seed of the noise.

    Returns:
        The figure; losses in the legends are means over the last third of the steps.
    """
    paths = bowl_paths(ema_decay, lookahead_alpha, every, steps=steps, seed=seed)
    curvature = torch.tensor(CURVATURE)
    losses = {name: (0.5 * curvature * path**2).sum(1)[-(steps // 3) :].mean().item() for name, path in paths.items()}
    everything = torch.cat(list(paths.values()))
    (low_x, low_y), (high_x, high_y) = (everything.amin(0) - 0.4).tolist(), (everything.amax(0) + 0.4).tolist()
    high_y += 0.4 * (high_y - low_y)  # room for the legend
    x, y = torch.linspace(low_x, high_x, 80), torch.linspace(low_y, high_y, 80)
    loss = 0.5 * CURVATURE[0] * x[None] ** 2 + 0.5 * CURVATURE[1] * y[:, None] ** 2
    figure = Picture(figsize=(9.4, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    second = {
        "ema": (f"their EMA, decay {ema_decay:g} a step, every {every}", BLUE, "o"),
        "slow": (f"Lookahead's slow weights, alpha {lookahead_alpha:g}, every {every}", VERMILION, "s"),
    }
    found = [f"SGD: loss {losses['alone']:.2f}", f"Lookahead's fast weights: loss {losses['lookahead']:.2f}"]
    for axis, (name, (title, color, marker)) in zip(axes, second.items(), strict=True):
        axis.contour(x, y, loss, levels=[0.25, 1, 2.5, 5, 9, 14, 20], colors="#CCCCCC", linewidths=0.7)
        axis.plot(*paths["alone"].T, color=GREY, linewidth=0.9, label=found[0])
        if name == "slow":
            axis.plot(*paths["lookahead"].T, color=color, linewidth=0.9, linestyle=":", label=found[1], zorder=3)
        found.append(f"{title}: loss {losses[name]:.2f}")
        style: Any = {"color": color, "linewidth": 2, "marker": marker, "markersize": 4}
        axis.plot(*paths[name][::every].T, **style, label=found[-1], zorder=4)
        axis.scatter([0], [0], marker="*", s=110, color="black", zorder=5)
        axis.legend(fontsize="small", loc="upper center")
        axis.set(xlabel="first weight", xlim=(low_x, high_x), ylim=(low_y, high_y))
        tidy(axis)
    axes[0].set_ylabel("second weight")
    axes[0].set_title("EMA only watches: the path stays the same", fontsize="medium")
    axes[1].set_title("Lookahead steers: the fast weights restart from each square", fontsize="medium")
    figure.suptitle(f"{steps} noisy steps towards the minimum (star)", fontsize="medium")
    figure.alt = f"Paths of two weights to the minimum of a bowl; {'; '.join(found)}"
    return figure


def clocks(runs: Mapping[str, RunResult | Mapping[str, Any]]) -> Picture:
    """Draw where the time of runs went: training, evaluation, and what neither clock counts.

    Args:
        runs: by name: results, or lines of results.jsonl.

    Returns:
        The figure; each bar is as long as `total_seconds`, and `train_seconds` is what DAWNBench counts.
    """
    lines = {name: run.to_dict() if isinstance(run, RunResult) else run for name, run in runs.items()}
    parts: dict[str, dict[str, Any]] = {
        "train_seconds": {"color": BLUE, "hatch": ""},
        "evaluate_seconds": {"color": "#56B4E9", "hatch": "///"},
        "the rest of total_seconds: imports, data, warm-up": {"color": "#BBBBBB", "hatch": "xxx"},
    }
    figure = Picture(figsize=(9, 1.5 + 0.5 * len(lines)), layout="constrained")
    axis = figure.subplots()
    starts = [0.0] * len(lines)
    for part, style in parts.items():
        lengths = [
            line[part] if part in line else line["total_seconds"] - line["train_seconds"] - line["evaluate_seconds"]
            for line in lines.values()
        ]
        axis.barh(range(len(lines)), lengths, 0.65, left=starts, label=part, edgecolor="white", linewidth=0, **style)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for row, line in enumerate(lines.values()):
        text = f" {line['train_seconds']:.1f} of {line['total_seconds']:.1f} s"
        axis.text(line["total_seconds"], row, text, va="center", fontsize=8)
    axis.set(xlabel="seconds", ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), [textwrap.fill(name, 24) for name in lines])
    axis.margins(x=0.15)
    tidy(axis)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    first = next(iter(lines.values()))
    figure.suptitle(f"data set: {data_set(first['dataset'])}; {hardware(first['environment'])}", fontsize="medium")
    figure.alt = "; ".join(
        f"{name}: {line['train_seconds']:.1f} s of training in {line['total_seconds']:.1f} s"
        for name, line in lines.items()
    )
    return figure


def published_ladder(rungs: Sequence[Rung], seconds: Mapping[str, float] = LADDER_2019) -> Picture:
    """Draw the published seconds of the ladder's rungs, split into epochs and seconds an epoch.

    Args:
        rungs: as `recipes.ladder` gives them, in order.
        seconds: by the name of the rung's recipe; those that have none are not drawn.

    Returns:
        The figure. A retuned rung carries the titles of all rungs since the one drawn before it.
    """
    drawn: list[tuple[str, float, float]] = []
    titles: list[str] = []
    for rung in rungs:
        titles += [rung.title] if rung.kind != "retune" else []
        if rung.recipe.name in seconds:
            drawn.append((" + ".join(titles), seconds[rung.recipe.name], rung.recipe.epochs))
            titles = []
    figure = Picture(figsize=(9.4, 1.2 + 0.42 * len(drawn)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rows = range(len(drawn))
    left.barh(rows, [time for _, time, _ in drawn], 0.65, color=BLUE)
    for row, (_, time, epochs) in enumerate(drawn):
        left.text(time, row, f" {time:g} s = {epochs:g} epochs x {time / epochs:.2f} s", va="center", fontsize=8)
    left.set_yticks(rows, [textwrap.fill(name, 44) for name, _, _ in drawn], fontsize=8)
    left.set(xlabel="seconds on one V100, as published", xlim=(0, 1.5 * max(time for _, time, _ in drawn)))
    left.set_ylim(len(drawn) - 0.5, -0.5)
    start = drawn[0]
    for values, name, style in (
        ([100 * epochs / start[2] for _, _, epochs in drawn], "epochs", SERIES[0]),
        ([100 * time / epochs * start[2] / start[1] for _, time, epochs in drawn], "seconds an epoch", SERIES[1]),
    ):
        right.plot(values, rows, label=name, **style)
    right.set(xlabel="% of the first rung's", xlim=(0, 112))
    right.legend(fontsize="small", loc="upper left")
    for axis in (left, right):
        tidy(axis)
    figure.suptitle("Page 2019: each rung reaches 94.1 % (mean of 50 runs)", fontsize="medium")
    figure.alt = (
        f"The ladder falls from {start[1]:g} s ({start[2]:g} epochs) to {drawn[-1][1]:g} s ({drawn[-1][2]:g} epochs) "
        f"in {len(drawn) - 1} steps"
    )
    return figure


def records(published: Sequence[Record]) -> Picture:
    """Draw published times to 94 %, a row each, the oldest at the top; the axis of seconds is logarithmic.

    Args:
        published: at least one, for instance `published.RECORDS`.

    Returns:
        The figure; marker and colour show what each was measured on.
    """
    kinds = list(dict.fromkeys(record.hardware.split()[-1] for record in published))
    figure = Picture(figsize=(9.4, 1.3 + 0.3 * len(published)), layout="constrained")
    axis = figure.subplots()
    for kind, style in zip(kinds, SERIES, strict=False):
        rows = [i for i, record in enumerate(published) if record.hardware.split()[-1] == kind]
        axis.scatter(
            [published[i].seconds for i in rows], rows, s=50, color=style["color"], marker=style["marker"],
            label=kind, zorder=3,
        )  # fmt: skip
    for row, record in enumerate(published):
        hours = record.seconds >= 3600
        time = f"{record.seconds / 3600:g} h" if hours else f"{record.seconds:g} s"
        place: dict[str, Any] = {"xytext": (-9, 0), "ha": "right"} if hours else {"xytext": (9, 0), "ha": "left"}
        axis.annotate(
            f"{time}, {record.hardware}", (record.seconds, row), textcoords="offset points", va="center", fontsize=8,
            **place,
        )  # fmt: skip
    axis.set(xscale="log", xlabel="seconds, logarithmic", ylim=(len(published) - 0.5, -0.5))
    axis.margins(x=0.12)
    axis.set_yticks(range(len(published)), [f"{record.system} ({record.year})" for record in published], fontsize=8)
    tidy(axis)
    axis.legend(fontsize="small", loc="upper right" if len(published) < 6 else "lower right")
    figure.suptitle("published training times to 94 %, each by its own clock", fontsize="medium")
    fastest = min(published, key=lambda record: record.seconds)
    figure.alt = f"{len(published)} published times to 94 %; the shortest is {fastest.seconds:g} s, {fastest.system}"
    return figure


def share_intervals(share: float, n: int, *, most: int = 1000) -> Picture:
    """Draw how precisely n runs determine a share: Wilson's 95 % interval, and the textbook's for comparison.

    Args:
        share: share of runs that reached the target, 0 ... 1.
        n: number of runs, which is marked; 1 ... `most`.
        most: end of the axis of runs.

    Returns:
        The figure. The textbook's interval (share +- 1.96 standard errors) leaves 0 ... 1 where n is small.
    """
    if not (0 <= share <= 1 and 1 <= n <= most):
        raise UserError(f"share={share} must be 0 ... 1 and n={n} must be 1 ... {most}")
    runs = sorted({round(x) for x in np.geomspace(1, most, 200)})
    wilson = np.array([wilson_interval(share * count, count) for count in runs])
    error = 1.96 * np.sqrt(share * (1 - share) / np.array(runs))
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(runs, 100 * wilson[:, 0], 100 * wilson[:, 1], color=BLUE, alpha=0.25, label="Wilson's interval")
    for sign in (-1, 1):
        label = "share \u00b1 1.96 standard errors" if sign > 0 else "_"
        axis.plot(runs, 100 * (share + sign * error), color=VERMILION, linestyle="--", label=label)
    axis.axhline(100 * share, color="black", linewidth=0.8)
    low, high = wilson_interval(share * n, n)
    axis.plot([n, n], [100 * low, 100 * high], color="black", linewidth=2.5, solid_capstyle="butt", zorder=3)
    axis.plot(n, 100 * share, "D", color="black", markersize=6, zorder=3)
    axis.set(xscale="log", xlabel="runs, logarithmic", ylabel="runs at the target in %", ylim=(-20, 120))
    for edge in (0, 100):
        axis.axhline(edge, color=GREY, linestyle=":", linewidth=1)
    axis.legend(fontsize="small", loc="lower right")
    tidy(axis)
    words = f"{percent(share)} of {n} runs: 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    figure.suptitle(words, fontsize="medium")
    figure.alt = f"Two intervals of a share over the number of runs; {words}"
    return figure


def all_reduce_ring(n_workers: int = 4) -> Picture:
    """Draw the rounds of an all-reduce in a ring: how much of the sum each worker has of each piece of the gradient.

    Args:
        n_workers: 2 ... 5, so that the rounds can be read side by side.

    Returns:
        The figure: a table for each round, with a row for each worker and a column for each piece. The number counts
        the workers whose gradients are in that piece, and a framed piece is complete.

    Raises:
        UserError: too few or too many workers.
    """
    if not 2 <= n_workers <= 5:
        raise UserError(f"n_workers={n_workers} must be 2 ... 5: more than eight rounds do not fit side by side")
    gradients = [torch.ones(n_workers, dtype=torch.int64) for _ in range(n_workers)]
    states = [torch.stack(gradients)]
    for _ in ring_all_reduce(gradients):
        states.append(torch.stack(gradients))
    figure = Picture(figsize=(9.4, 2.3 if n_workers < 5 else 2.1), layout="constrained")
    axes = figure.subplots(1, len(states), sharey=True)
    for number, (axis, state) in enumerate(zip(axes, states, strict=True)):
        axis.imshow(state.numpy(), cmap="Blues", vmin=0, vmax=1.6 * n_workers)  # pale enough for black numbers
        for row, column in np.ndindex(n_workers, n_workers):
            count = int(state[row, column])
            frame = {"boxstyle": "square,pad=0.25", "facecolor": "none", "edgecolor": VERMILION, "linewidth": 1.2}
            complete = {"bbox": frame} if count == n_workers else {}
            axis.text(column, row, str(count), ha="center", va="center", fontsize=8, **complete)
        phase = "add" if number < n_workers else "pass on"
        axis.set_title(f"round {number}:\n{phase}" if number else "at the\nstart", fontsize=8)
        axis.set_xticks(range(n_workers), [str(piece + 1) for piece in range(n_workers)], fontsize=8)
        axis.set_xlabel("piece", fontsize=8)
    axes[0].set_yticks(range(n_workers), [f"worker {rank + 1}" for rank in range(n_workers)], fontsize=8)
    figure.suptitle("number of workers whose gradients are in each piece; framed: complete", fontsize="medium")
    figure.alt = (
        f"Tables of {n_workers} workers and {n_workers} pieces after each of {len(states) - 1} rounds: in the first "
        f"{n_workers - 1} each piece gathers its sum on its way round the ring, in the others the sums go round"
    )
    return figure
