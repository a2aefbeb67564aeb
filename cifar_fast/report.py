"""What runs come to, as numbers and as text: intervals, summaries, the run log, the published runs beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLOCKS = ("train_seconds", "evaluate_seconds", "total_seconds")
CIFAR10_FINGERPRINT = "9048fcbac9c08a64"
"""`Dataset.fingerprint` of the official CIFAR-10, which alone the published figures can be compared with."""


@dataclass(frozen=True)
class Published:
    """What others published of their runs on CIFAR-10: accuracies as shares 0 ... 1, times in seconds."""

    name: str
    source: str
    hardware: str
    runs: int
    target: float
    at_target: int
    min_accuracy: float
    median_accuracy: float
    mean_seconds: float
    max_seconds: float
    clock: str


APPLE_2019 = Published(
    name="Apple 2019 on 8 V100",
    source="Apple, ml-cifar-10-faster (github.com/apple/ml-cifar-10-faster), 2019",
    hardware="8 V100-SXM2 32 GB, one 20-core Xeon Gold 6148",
    runs=50,
    target=0.94,
    at_target=41,
    min_accuracy=0.9374,
    median_accuracy=0.9419,
    mean_seconds=7.81,
    max_seconds=10.31,
    clock="training with preprocessing, without validation; its code leaves out about 0.47 s of whitening statistics",
)


@dataclass(frozen=True)
class Record:
    """A published time of training to 94 % of CIFAR-10's test images, by that publication's own clock."""

    system: str
    year: int
    hardware: str
    seconds: float
    added: str
    """What was new in it; `-` where we found no description."""


RECORDS = (
    Record("DAWNBench's first, ResNet-164", 2017, "16 vCPU", 79 * 3600.0, "the clock to beat"),
    Record("fast.ai", 2018, "8 V100", 174.0, "-"),
    Record("Page, DAWNBench", 2018, "1 V100", 75.0, "a small ResNet-9: baseline_2018"),
    Record("Page, bag of tricks", 2019, "1 V100", 26.0, "the ladder of 01: page_2019"),
    Record("Baidu", 2019, "8 V100", 44.0, "-"),
    Record("Kakao Brain", 2019, "4 V100", 28.0, "-"),
    Record("Apple, ml-cifar-10-faster", 2019, "8 V100", 9.43, "Page's tricks on 8 GPUs: apple_8gpu"),
    Record("Arasanipalai", 2020, "4 V100", 10.7, "-"),
    Record("hlb-CIFAR10", 2023, "1 A100", 6.3, "Page's system written anew, memory format, tuning"),
    Record("airbench94", 2024, "1 A100", 3.83, "dirac start, 2x2 whitening, alternating flip, Lookahead, 6-view TTA"),
    Record("airbench94, compiled", 2024, "1 A100", 3.09, "the same through torch.compile"),
    Record("airbench94 with Muon", 2024, "1 A100", 2.59, "Muon: orthogonalised momentum on the filters"),
    Record("Hiverge", 2025, "1 A100", 1.98, "batched Newton-Schulz, colour jitter, TTA on unsure images only"),
)
"""Sources: DAWNBench's list (2017 to 2020), Page (2018, 2019), the systems' own repositories and arXiv 2404.00498.

Their clocks differ; of those since 2023 the time of compiling is left out. Apple's is the first epoch at 94 %, of 50
runs the mean to the last epoch is 7.81 s.
"""

LADDER_2019 = {
    "baseline_2018": 75.0,
    "preload_2019": 70.0,
    "pool_before_activation_2019": 67.0,
    "pool_before_norm_retuned_2019": 64.0,
    "label_smoothing_retuned_2019": 59.0,
    "celu_retuned_2019": 52.0,
    "ghost_batch_norm_retuned_2019": 46.0,
    "bias_lr_retuned_2019": 43.0,
    "whitening_retuned_2019": 36.0,
    "ema_retuned_2019": 33.5,
    "page_2019": 26.0,
}
"""Seconds of training on one V100 that Page published, by the rung of `recipe.ladder`; the mean accuracy of 50 runs is
94.1 % at each of them. Source: David Page, "How to train your ResNet 8: bag of tricks", 2019."""


# --- statistics ---


def wilson_interval(k: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `k` of `n` were seen; unlike k/n +- 1.96 s it stays in 0 ... 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k={k} of n={n} is no share")
    z = statistics.NormalDist().inv_cdf(0.975)
    share, scale = k / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half_width = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the formula is 0 and 1; only rounding is not.
    return (0.0 if k == 0 else centre - half_width), (1.0 if k == n else centre + half_width)


def student_t_quantile(degrees_of_freedom: int) -> float:
    """Return the t that Student's distribution stays within, on both sides, with 95 % probability.

    For whole degrees of freedom P(|T| < t) is a finite sum in sines and cosines of atan(t / sqrt(degrees of freedom))
    (Abramowitz and Stegun, 26.7.3 and 26.7.4), which rises with that angle: halving finds the angle.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom={degrees_of_freedom} must be at least 1")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _probability_within(middle, degrees_of_freedom) < 0.95:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(high)


def _probability_within(angle: float, degrees_of_freedom: int) -> float:
    """Return P(|T| < t) where t = sqrt(degrees of freedom) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(degrees_of_freedom // 2):
        total += term
        term *= cosine**2 * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean (Student's t) of independent values; None for fewer than 2."""
    if len(values) < 2:
        return None
    half_width = student_t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half_width, mean + half_width


def excludes(values: Sequence[float], target: float) -> bool:
    """Return whether at least 3 values are there and the 95 % interval of their mean leaves out the target.

    Asked after every run this is wrong about the mean more often than 1 time in 20: it is a reason to stop, not a test.
    """
    interval = mean_interval(values)
    return interval is not None and len(values) >= 3 and not interval[0] <= target <= interval[1]


def reaches(accuracy: float, target: float) -> bool:
    """Return whether an accuracy is at the target or above; less than any one image is rounding, not a shortfall."""
    return accuracy >= target - 1e-9


# --- summaries ---


def summarise(runs: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Return what `runs` (lines of results.jsonl, at least one) come to, as plain values ready for JSON.

    Shares, accuracies and `target` are 0 ... 1, clocks in seconds, `..._95` a 95 % interval (None where there is none).
    """
    first = runs[0]
    at_target = sum(reaches(run["accuracy"], target) for run in runs)
    return {
        "recipe": first["recipe"]["name"],
        "dataset": first["dataset"],
        "hardware": hardware(first["environment"]),
        "numerics": _different(
            f"{run['environment']['precision']}, {run['environment']['convolution']} convolution" for run in runs
        ),
        "versions": {
            "cifar_fast": _different(run["version"] for run in runs),
            **{name: _different(run["environment"][name] for run in runs) for name in ("torch", "python")},
        },
        "seeds": [run["seed"] for run in runs],
        "n": len(runs),
        "target": target,
        "at_target": at_target,
        "share_at_target": at_target / len(runs),
        "share_at_target_95": list(wilson_interval(at_target, len(runs))),
        **{figure: spread([run[figure] for run in runs]) for figure in ("accuracy", *CLOCKS)},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return min, median, mean with its 95 % interval, and max of at least one value."""
    interval = mean_interval(values)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "mean_95": None if interval is None else list(interval),
        "max": max(values),
    }


def hardware(environment: Mapping[str, Any]) -> str:
    """Return the machine that an environment names, in words, with the processes that shared the work."""
    processes, backend = environment.get("world_size", 1), environment.get("backend")
    together = f", {processes} processes" + (f" ({backend})" if backend else "") if processes > 1 else ""
    if environment["gpu"]:
        return f"{processes} x {environment['gpu']}{together}" if processes > 1 else environment["gpu"]
    threads = f"{environment['threads']} thread" + ("s" if environment["threads"] != 1 else "")
    each = " each" if together else ""
    return f"{environment['cpu']}, {environment['cpu_capability']}{together}, {threads}{each}"


def data_set(data: Mapping[str, Any]) -> str:
    """Return the name and the size of the data set that `Dataset.describe` describes, in words."""
    return f"{data['name']} ({data['n_train']:,} training and {data['n_test']:,} test images)"


def comparable(dataset: Mapping[str, Any]) -> bool:
    """Return whether figures of this data set may stand beside published ones: it is CIFAR-10 to the last pixel."""
    return dataset["fingerprint"] == CIFAR10_FINGERPRINT


def _different(values: Iterable[str]) -> str:
    """Return the different values there are, in the order in which they came."""
    return " / ".join(dict.fromkeys(values))


# --- text ---


def run_log(runs: Sequence[Mapping[str, Any]], target: float) -> str:
    """Return the log of a benchmark: what was run where, a line a run, a closing summary."""
    found = summarise(runs, target)
    tta, data = runs[0]["recipe"]["tta"], found["dataset"]
    lines = [
        f"recipe: {found['recipe']}",
        f"data set: {data_set(data)}, fingerprint {data['fingerprint']}",
        f"hardware: {found['hardware']}; {found['numerics']}",
        f"versions: {_versions(found)}",
        "train: last epoch, images as they were trained on (augmented, with the recipe's label smoothing)",
        f"validation: the test images after the last epoch (TTA: {tta}); wall time: train_seconds, without validation",
        "",
    ]
    rows = [("run", "seed", "train acc %", "train loss", "val acc %", "val loss", "wall time s")]
    for run in runs:
        last = run["epochs"][-1]
        train = (f"{100 * last['train_accuracy']:.2f}", f"{last['train_loss']:.4f}")
        validation = (f"{100 * run['accuracy']:.2f}", f"{run['loss']:.4f}")
        rows.append((str(run["run"]), str(run["seed"]), *train, *validation, f"{run['train_seconds']:.2f}"))
    seconds, accuracy = found["train_seconds"], found["accuracy"]
    lines += [
        table(rows, right=True),
        "",
        f"runs: {found['n']}",
        f"wall time: max {seconds['max']:.2f} s, median {seconds['median']:.2f} s",
        f"validation accuracy: lowest {percent(accuracy['min'])}, median {percent(accuracy['median'])}",
        f"runs at {percent(target)} or more: {_share(found['at_target'], found['n'])}",
    ]
    return "\n".join(lines) + "\n"


def comparison_table(summary: Mapping[str, Any], published: Published = APPLE_2019) -> str:
    """Return the runs of `summary` beside published ones, as text; loud where the data set forbids to compare."""
    same_data = comparable(summary["dataset"])
    accuracy, seconds = summary["accuracy"], summary["train_seconds"]
    same_target = math.isclose(summary["target"], published.target)
    there = (
        _share(published.at_target, published.runs)
        if same_target
        else f"{_share(published.at_target, published.runs)} at {percent(published.target)}"
    )
    rows = [
        ("", "here", f"published: {published.name}"),
        ("data set", data_set(summary["dataset"]), "CIFAR-10" + ("" if same_data else ": NOT COMPARABLE")),
        ("hardware", summary["hardware"], published.hardware),
        ("recipe", f"{summary['recipe']} ({summary['numerics']})", "the one that apple_8gpu repeats"),
        ("versions", _versions(summary), "not published"),
        ("n", _runs(summary["n"]), _runs(published.runs)),
        (f"at {percent(summary['target'])}", _share(summary["at_target"], summary["n"]), there),
        ("accuracy min", percent(accuracy["min"]), percent(published.min_accuracy)),
        ("accuracy median", percent(accuracy["median"]), percent(published.median_accuracy)),
        ("accuracy mean", _mean(accuracy, 100, "%"), "not published"),
        ("accuracy max", percent(accuracy["max"]), "not published"),
        ("train_seconds min", f"{seconds['min']:.2f} s", "not published"),
        ("train_seconds median", f"{seconds['median']:.2f} s", "not published"),
        ("train_seconds mean", _mean(seconds, 1, "s"), f"{published.mean_seconds:.2f} s"),
        ("train_seconds max", f"{seconds['max']:.2f} s", f"{published.max_seconds:.2f} s"),
    ]
    for clock in CLOCKS[1:]:
        values = summary[clock]
        text = f"{values['median']:.2f} s ({values['min']:.2f} to {values['max']:.2f})"
        rows.append((f"{clock} median", text, "not published"))
    notes = [
        "train_seconds here: first byte to the device to the last step, whitening included, validation left out;",
        "total_seconds: a whole run, with processes, imports and a warm-up paid for before the first.",
        f"Published clock: {published.clock}.",
        f"Source: {published.source}. Wilson intervals of both columns are ours.",
    ]
    banner = []
    if not same_data:
        rule = "!" * 100
        banner = [
            rule,
            f"NOT COMPARABLE: these runs are of the data set {data_set(summary['dataset'])}, which is not the whole "
            "of CIFAR-10. Neither their accuracies nor their times say anything about the published ones.",
            rule,
        ]
    return "\n".join([*banner, table(rows), *notes])


def _versions(summary: Mapping[str, Any]) -> str:
    versions = summary["versions"]
    return f"cifar_fast {versions['cifar_fast']}, torch {versions['torch']}, Python {versions['python']}"


def _runs(n: int) -> str:
    return f"{n} run" + ("s" if n != 1 else "")


def _share(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"{k} of {n} ({100 * k / n:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f})"


def _mean(values: Mapping[str, Any], scale: float, unit: str) -> str:
    text = f"{scale * values['mean']:.2f} {unit}"
    if values["mean_95"] is None:
        return text
    low, high = values["mean_95"]
    return f"{text} (95 % interval {scale * low:.2f} to {scale * high:.2f})"


def table(rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """Return the rows with their columns aligned, to the left or to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def percent(share: float) -> str:
    """Return a share of 0 ... 1 in per cent."""
    return f"{100 * share:.2f} %"
