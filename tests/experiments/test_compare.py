"""A comparison stops when it may, is wrong as seldom as it promises, and ends the same however often it was killed."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import FORKS, die, in_a_child
from made_up import MACHINE

import cifar_fast
from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.experiments.all_reduce import published_link
from cifar_fast.experiments.compare import Comparison, load_comparison, run_line, runs_needed
from cifar_fast.experiments.forecast import Forecast
from cifar_fast.experiments.plan import predict
from cifar_fast.experiments.power import RunsNeeded, decide, expected_deviation, run_seconds, saved_deviation
from cifar_fast.experiments.saved import results_folder, saved_runs
from cifar_fast.experiments.statistics import anytime_interval, anytime_t_bound, mean_interval, wilson_interval
from cifar_fast.experiments.step_costs import measure_step
from cifar_fast.hardware.device import environment
from cifar_fast.recipe import Recipe
from cifar_fast.training.result import EpochResult, RunResult, save_run
from cifar_fast.training.tricks import NO_TRICKS, Tricks

comparing = importlib.import_module(
    "cifar_fast.experiments.compare"
)  # the module: `cifar_fast.compare` is the function
compare = comparing.compare

RECIPE = replace(
    recipes.smoke(), widths=(4, 4, 4), n_shards=1, global_batch_size=40, epochs=1.0, label_smoothing=0.2,
    precision="float32", convolution="direct", fuse_norm=False,
)  # fmt: skip
OTHER = replace(RECIPE, label_smoothing=0.0)
NAMES = ("smoke", "smoke, label_smoothing=0.0")
DATASET = {"name": "made up", "fingerprint": "0", "n_train": 50_000, "n_test": 10_000, "classes": ["a", "b"]}


def made_up(differences: list[float], *, longer: list[float] | None = None, **changes: Any) -> Comparison:
    """Pairs with these differences, in points, and longer runs of A, an epoch each."""

    def run(seed: int, points: float, epochs: float = 1.0) -> dict[str, Any]:
        line = {"seed": seed, "accuracy": 0.9 + points / 100, "train_seconds": 10.0, "evaluate_seconds": 2.0}
        recipe = replace(RECIPE, epochs=epochs).to_dict()
        return line | {"recipe": recipe, "dataset": DATASET, "environment": MACHINE}

    arms = {"a": [run(seed, 0.0) for seed in range(len(differences))]}
    arms["b"] = [run(seed, points) for seed, points in enumerate(differences)]
    if longer is not None:
        arms["longer"] = [run(seed, points, 2.0) for seed, points in enumerate(longer)]
    return Comparison(**{"names": NAMES, "arms": arms, "resolution": 0.2, "max_runs": 8} | changes)


# --- the interval ---


def t_of(differences: np.ndarray) -> np.ndarray:
    n = differences.shape[-1]
    return differences.mean(-1) / (differences.std(-1, ddof=1) / math.sqrt(n))


def test_the_bound_is_where_a_ratio_of_likelihoods_with_mean_one_reaches_20():
    random = np.random.default_rng(0)
    for n in (2, 5, 12):
        k = 1 + n

        def ratio(t: Any, n: int = n, k: int = k) -> Any:
            return k**-0.5 * ((1 + t**2 / (n - 1)) / (1 + t**2 / (k * (n - 1)))) ** (n / 2)

        found = ratio(t_of(random.standard_normal((200_000, n))))
        assert found.mean() == pytest.approx(1, abs=5 * found.std() / math.sqrt(len(found)))
        if math.isfinite(bound := anytime_t_bound(n)):
            assert ratio(bound) == pytest.approx(20)
        else:
            assert ratio(1e12) < 20
    assert [n for n in range(1, 10) if math.isinf(anytime_t_bound(n))] == [1, 2, 3, 4]


@pytest.mark.parametrize("draw", ["standard_normal", "five degrees of freedom"])
def test_10_000_comparisons_of_equal_arms_report_a_difference_at_most_5_times_in_100(draw):
    random, shape = np.random.default_rng(0), (10_000, 50)
    noise = random.standard_normal(shape) if draw == "standard_normal" else random.standard_t(5, shape)
    wrong = int((decide(noise, resolution=0.0)[1] != 0).sum())
    assert wilson_interval(wrong, len(noise))[1] < 0.05 and wrong > 50
    # An ordinary interval, asked as often, is wrong five times as often.
    peeked = [np.abs(t_of(noise[:, :n])) > student_bound(n) for n in range(3, 31)]
    assert np.any(peeked, axis=0).mean() > 0.2


def student_bound(n: int) -> float:
    interval = mean_interval([-1.0, 1.0, *[0.0] * (n - 2)])
    assert interval is not None
    return interval[1] / (math.sqrt(2 / (n - 1)) / math.sqrt(n))


def test_the_intervals_of_a_growing_series_hold_the_mean_all_at_once():
    series = 0.3 + 0.2 * np.random.default_rng(1).standard_normal((500, 20))
    missed = 0
    for values in series.tolist():
        intervals = [found for n in range(5, 21) if (found := anytime_interval(values[:n]))]
        missed += any(not low <= 0.3 <= high for low, high in intervals)
    assert wilson_interval(missed, len(series))[0] < 0.05
    assert 0 < missed < 25


def test_equal_differences_do_not_pass_for_an_exact_mean():
    assert anytime_interval([1.0] * 4) is None
    assert anytime_interval([1.0] * 6) == (1.0, 1.0)
    low, high = anytime_interval([1.0] * 6, least_deviation=0.5) or (0.0, 0.0)
    assert low == pytest.approx(1 - anytime_t_bound(6) * 0.5 / 6**0.5) and high == pytest.approx(2 - low)


# --- when to stop ---


def test_many_simulated_comparisons_stop_where_a_single_one_does():
    random = np.random.default_rng(2)
    series = np.concatenate(
        [
            np.round(mean + deviation * random.standard_normal((8, 12)), 2)
            for mean, deviation in ((0.3, 0.2), (-0.3, 0.1), (0.0, 0.02), (0.0, 0.5), (0.0, 0.0), (0.2, 0.0))
        ]
    )
    pairs, signs = decide(series, resolution=0.2, least_deviation=0.01)
    for values, n, sign in zip(series.tolist(), pairs, signs, strict=True):
        stops = next(m for m in range(1, 13) if made_up(values[:m], max_runs=12).finished)
        better = made_up(values[:stops]).better
        assert (n, sign) == (stops, {"a": -1, "b": 1, None: 0}[better])
    assert len(set(pairs.tolist())) > 3 and set(signs.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("differences", "better", "resolved", "words"),
    [
        ([], None, False, "Too early to say: it takes 5 pairs of runs for an interval, and there are 0."),
        ([0.5, 0.6, 0.4, 0.5], None, False, "Too early to say"),
        ([0.5, 0.6, 0.4, 0.5, 0.5], "b", False, f"{NAMES[1]} is more accurate than {NAMES[0]}, by 0.50 points (95 % "),
        ([-0.5, -0.6, -0.4, -0.5, -0.5], "a", False, "is less accurate than smoke, by 0.50 points (95 % interval -0."),
        ([0.01, -0.01, 0.02, -0.02, 0.0, 0.0], None, True, "is smaller than 0.2 points (95 % interval -0.0"),
        ([0.5, -0.6, 0.4, -0.5, 0.5, 0.1, -0.2], None, False, "7 pairs of runs do not show which is more accurate"),
    ],
)
def test_the_verdict_says_what_the_interval_allows(differences, better, resolved, words):
    found = made_up(differences)
    assert (found.better, found.resolved) == (better, resolved) and words in found.verdict()
    assert found.finished == (better is not None or resolved)
    assert found.summary()["better"] == better and json.dumps(found.summary())


def test_it_ends_after_the_most_pairs_allowed():
    undecided = [0.5, -0.6, 0.4, -0.5, 0.5, 0.1, -0.2, 0.1]
    assert not made_up(undecided[:7]).finished and made_up(undecided).finished
    assert not made_up(undecided, max_runs=9).finished


def test_the_table_names_what_holds_and_what_is_for_reference():
    found = made_up([0.5, 0.6, 0.4, 0.0, 0.5, 0.5])
    low, high = found.interval or (0, 0)
    text = found.table()
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "A: smoke" in text and f"B: {NAMES[1]}" in text
    assert lines["mean difference"].endswith("+0.42")
    assert lines["95 % interval, valid at every look"].endswith(f"{low:+.2f} to {high:+.2f}")
    ordinary = mean_interval(found.differences) or (0, 0)
    assert lines["paired t, 95 % *"].endswith(f"{ordinary[0]:+.2f} to {ordinary[1]:+.2f}")
    assert low < ordinary[0] and ordinary[1] < high
    assert "B ahead in 5 of 6 pairs, 1 equal; p = 0.062" in lines["sign test *"]  # 2 / 2**5
    assert "* for reference: valid only where the number of pairs was fixed beforehand" in text
    assert "epochs" not in lines and f"VERDICT: {found.verdict()}" in text and "Some Processor" in text
    page = found._repr_html_()
    assert page.count("<table>") == 2 and "<b>" in page and f"{low:+.2f} to {high:+.2f}" in page
    assert "&lt;i&gt;" in replace(found, names=("<i>", "b"))._repr_html_()
    assert str(found) == repr(found) == f"{found.verdict()} (n = 6 pairs; `table` shows all)"


def test_a_difference_is_expressed_in_epochs_where_longer_runs_show_what_an_epoch_is_worth():
    random = np.random.default_rng(3)
    ours, longer = (
        (mean + 0.1 * random.standard_normal(12)).round(2).tolist() for mean in (0.4, 0.8)
    )  # half of what an epoch gains
    found = made_up(ours, longer=longer)
    epochs, low, high = found.equivalent_epochs or (0, 0, 0)
    assert epochs == pytest.approx(np.mean(ours) / np.mean(longer)) and low < 0.5 < high
    assert (
        "as a change of A's epochs" in found.table() and f"{epochs:+.1f} ({low:+.1f} to {high:+.1f})" in found.table()
    )
    assert "A, 2 epochs" in found.table()

    # At the ends of the interval, and nowhere within it, B minus that many epochs just differs from zero.
    def relative(ratio: float) -> float:
        left = np.array(ours) - ratio * np.array(longer)
        step = 0.01**2 * (1 + ratio**2)
        return abs(left.mean()) / math.sqrt((left.var(ddof=1) + step) / len(left)) / anytime_t_bound(len(left))

    assert (relative(low), relative(high)) == (pytest.approx(1), pytest.approx(1))
    assert relative(epochs) < 0.1 < 1 < relative(low - 0.1)
    unclear = made_up(ours, longer=[0.5, -0.5] * 6)
    assert unclear.equivalent_epochs is None and "unknown: it is not clear yet" in unclear.table()
    assert made_up(ours).equivalent_epochs is None and made_up(ours[:2], longer=longer[:2]).equivalent_epochs is None


# --- before it starts ---


def test_saved_pairs_say_how_much_a_difference_varies():
    deviation, pairs = saved_deviation()
    runs = {(run["arm"], run["seed"]): 100 * run["accuracy"] for run in saved_runs("ablation")}
    alone = [runs["flip=random", seed] - runs["as it is", seed] for seed in range(3)]
    assert 0.1 < deviation < np.std(alone, ddof=1) and pairs > 20
    assert expected_deviation(10_000)[0] == deviation
    assert expected_deviation(2_500)[0] == pytest.approx(2 * deviation)
    assert "scaled from 10,000 to 2,500 test images" in expected_deviation(2_500)[1]


def test_smaller_differences_need_more_runs_and_more_time():
    needed = RunsNeeded(
        deviation=0.2, source="a test", resolution=0.1, max_runs=40, pair_seconds=90.0, differences=(0.6, 0.3, 0.1, 0.0)
    )
    medians, most, found = zip(*(needed.pairs(difference) for difference in needed.differences), strict=True)
    assert medians[0] < medians[1] < medians[2] <= 40 and list(most) == sorted(most)
    assert found[0] > 0.99 > found[2] and found[3] > 0.95  # equal arms are found to be so, 5 times in 100 at most not
    text = needed.table()
    assert (
        "0.3 points" in text
        and f"about {round(1.5 * medians[0])} min" in text
        and "at most 40 pairs, about 60 min" in text
    )
    assert "<table>" in needed._repr_html_()
    unknown = replace(needed, pair_seconds=None).table()
    assert "?" in unknown and "unknown until the first pair" in unknown


def test_the_saved_simulation_is_what_the_script_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    script = importlib.import_module("compare_error")
    saved = json.loads((results_folder() / "compare" / "compare_error.json").read_text())
    assert saved["error"]["normal"]["up to 200 pairs"]["share_95"][1] < 0.05
    assert saved["methods"]["ordinary 95 % interval, from 3 pairs on"]["error"] > 0.2
    assert saved["deviation"]["points"] == pytest.approx(saved_deviation()[0])
    monkeypatch.setattr(script, "NULLS", {"normal": script.NULLS["normal"]})
    found = script.error()["normal"]["up to 30 pairs"]["share"]
    assert found == pytest.approx(saved["error"]["normal"]["up to 30 pairs"]["share"], abs=0.005)
    pairs, _ = script.simulate(0.3, saved_deviation()[0], resolution=0.0, max_runs=400, least_deviation=script.IMAGE)
    assert abs(np.median(pairs) - saved["runs_needed"]["0.3 points"]["median"]) <= 1


# --- training, in no time ---


@pytest.fixture(scope="module")
def data(tiny_data: Dataset) -> Dataset:
    """80 training and 40 test images."""
    cut = {"train_images": 80, "train_labels": 80, "test_images": 40, "test_labels": 40}
    return replace(tiny_data, **{name: getattr(tiny_data, name)[:n] for name, n in cut.items()})


class FakeTrainer:
    """Trains in no time: hard labels add two of 40 images to an accuracy that depends on the seed, or one more."""

    calls: list[Any] = []
    is_main = True

    def __init__(self, data: Dataset, *, world_size, device, backend, timeout) -> None:
        self.data = data

    def __enter__(self) -> FakeTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("close")

    def agree(self, value: Any) -> Any:
        return value

    def warm_up(self, recipe: Recipe, tricks: Tricks) -> None:
        self.calls.append("warm up")

    def train(self, recipe, *, tricks=NO_TRICKS, seed, out, save_logits=False, progress) -> RunResult:
        self.calls.append((recipe.label_smoothing, recipe.epochs, seed))
        better = (2 + seed % 2) * (recipe.label_smoothing == 0) + 3 * (recipe.epochs - 1)
        accuracy = (20 + 7 * seed % 5 + better) / 40
        epoch = EpochResult(
            epoch=1, train_loss=1.0, train_accuracy=0.5, test_loss=0.25, test_accuracy=accuracy, tta=recipe.tta,
            train_seconds=1.0,
        )  # fmt: skip
        numerics = {"precision": "float32", "convolution": "direct", "world_size": 1, "backend": None}
        model: Any = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, seed)
        torch.nn.init.constant_(model.bias, seed)
        result = RunResult(
            recipe=recipe, dataset=self.data.describe(), environment=environment(torch.device("cpu")) | numerics,
            seed=seed, epochs=[epoch], model=model, first_step_seconds=0.25, peak_memory_gb=1.0,
            tricks=tricks.describe(), train_seconds=1.0 + recipe.epochs, evaluate_seconds=0.5, total_seconds=2.0,
        )  # fmt: skip
        if out is not None:
            save_run(result, out)
        return result


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    """The trainer of this test's comparisons, with an empty memory; nothing is measured either."""

    class Fresh(FakeTrainer):
        calls: list[Any] = []

    monkeypatch.setattr(comparing, "Trainer", Fresh)
    monkeypatch.setattr(comparing, "run_seconds", lambda recipe, *_, **options: 10 * recipe.epochs)
    return Fresh


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_arms_take_turns_until_the_difference_is_clear(data, tmp_path, trainer, capsys):
    told: list[Any] = []
    found = compare(
        RECIPE, OTHER, data, out=tmp_path, extra_epochs=1.0, progress=False,
        on_plan=told.append, on_run=lambda arm, so_far: told.append((arm, so_far.pairs)),
    )  # fmt: skip
    assert found.better == "b" and found.names == NAMES
    turns = [(0.2, 1.0), (0.0, 1.0), (0.2, 2.0)]
    expected = [(*turn, seed) for seed in range(found.pairs) for turn in (turns if seed % 2 == 0 else turns[::-1])]
    assert trainer.calls == ["warm up", "warm up", *expected, "close"]
    plan, *runs = told
    assert plan.pair_seconds == 10 + 10 + 20 and plan.max_runs == 30 and plan.least_deviation == 2.5
    assert runs[:4] == [("a", 0), ("b", 0), ("longer", 1), ("longer", 1)] and len(runs) == 3 * found.pairs
    # The first moment at which it could have stopped.
    assert not replace(found, arms={arm: lines[:-1] for arm, lines in found.arms.items()}).finished
    assert load_comparison(tmp_path) == found
    assert (tmp_path / "comparison.txt").read_text() == found.table() + "\n"
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found.summary()))
    for arm in ("a", "b", "longer"):  # each is a benchmark
        assert cifar_fast.load_benchmark(tmp_path / arm).runs == found.arms[arm]
    assert capsys.readouterr() == ("", "")

    # The same call has nothing to do, and one that wants more goes on with the runs so far.
    trainer.calls.clear()
    assert compare(RECIPE, OTHER, data, out=tmp_path, extra_epochs=1.0, progress=False) == found
    assert trainer.calls == ["close"] and "nothing is left to do" in capsys.readouterr().err
    lines = [run_line(arm, found) for arm in ("a", "b")]
    assert "A: smoke" in lines[0] and f"{found.pairs} pairs: B - A" in lines[1]


def test_what_is_printed_says_first_how_long_it_may_take(data, trainer, capsys):
    found = compare(RECIPE, OTHER, data, first_seed=4, max_runs=5, progress=True)
    assert [run["seed"] for run in found.arms["b"]] == [4, 5, 6, 7, 8]
    out = capsys.readouterr().out
    assert out.index("PREDICTION: pairs of runs") < out.index("seed   4") < out.index("1 pair: B - A")
    assert "a pair takes about 20 s: predicted from a few steps" in out and "at most 5 pairs, about 2 min" in out


def test_a_resumed_comparison_expects_what_its_own_runs_show(data, tmp_path, trainer, capsys):
    arms = {"a": (RECIPE, NO_TRICKS), "b": (OTHER, NO_TRICKS)}
    found = made_up([0.5, -0.6, 0.4, -0.5, 0.5, 0.1])
    needed = runs_needed(found, arms, data, world_size=1, device="cpu")
    assert needed.deviation == max(np.std(found.differences, ddof=1), 2.5) and "6 pairs so far" in needed.source
    assert needed.pair_seconds == 24 and needed.timing == "as the runs so far"


class Stop(Exception):
    """Ends a comparison from outside."""


def test_resumed_after_any_run_it_ends_like_an_uninterrupted_one(data, tmp_path, trainer, monkeypatch):
    whole = compare(RECIPE, OTHER, data, out=tmp_path / "whole", progress=False)
    expected = contents(tmp_path / "whole")
    train, out = trainer.train, tmp_path / "resumed"
    for _ in itertools.count():  # each call trains one run and breaks in the next
        done: list[int] = []

        def once(self, *args, done=done, **options):
            if done:
                raise Stop
            done.append(1)
            return train(self, *args, **options)

        monkeypatch.setattr(trainer, "train", once)
        try:
            found = compare(RECIPE, OTHER, data, out=out, progress=False)
            break
        except Stop:
            assert sum(map(len, load_comparison(out).arms.values())) > 0
    assert found == whole and contents(out) == expected


@FORKS
def test_killed_at_any_write_it_goes_on_to_the_same_end(data, tmp_path, trainer, monkeypatch):
    write = comparing.write_json
    monkeypatch.setattr(comparing, "Trainer", FakeTrainer)
    compare(RECIPE, OTHER, data, out=tmp_path / "whole", progress=False)
    expected = contents(tmp_path / "whole")
    for number in (1, 2, 3, 6):
        out, count = tmp_path / str(number), itertools.count(1)

        def dying(path: Path, values: Any, number: int = number, count: itertools.count = count) -> None:
            if next(count) == number:
                (path.parent / "comparison.json.left.part").write_text("{")
                die()
            write(path, values)

        with monkeypatch.context() as patch:
            patch.setattr(comparing, "write_json", dying)
            assert in_a_child(lambda out=out: compare(RECIPE, OTHER, data, out=out, progress=False))
        assert len(contents(out / "a")) > 0 or number == 1
        compare(RECIPE, OTHER, data, out=out, progress=False)
        assert contents(out) == expected, number


def smooth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def test_runs_of_other_arms_are_never_mixed_in(data, tmp_path, trainer):
    compare(RECIPE, OTHER, data, out=tmp_path, max_runs=5, progress=False)
    before = contents(tmp_path)
    trainer.calls.clear()
    mine = Tricks(loss=smooth, name="mine")
    for a, b, changes, words in (
        (OTHER, RECIPE, {}, "the recipe's label_smoothing is 0.2 there and 0.0 now"),
        (RECIPE, replace(RECIPE, epochs=2.0), {}, "the recipe's label_smoothing|the recipe's epochs"),
        (RECIPE, (OTHER, mine), {}, "the code of the tricks' loss is the recipe's own there and smooth"),
        (RECIPE, OTHER, {"data": replace(data, fingerprint="another")}, "the data set"),
        (RECIPE, OTHER, {"first_seed": 1}, "the first seed is 0 there and 1 now"),
    ):
        with pytest.raises(RunError, match=words):
            compare(a, b, changes.pop("data", data), out=tmp_path, max_runs=7, progress=False, **changes)
    assert trainer.calls == ["close"] * 5 and contents(tmp_path) == before
    for folder, what in ((tmp_path / "a", "a benchmark"), (tmp_path / "run", "a single run")):
        folder.mkdir(exist_ok=True)
        (folder / "recipe.json").touch() if what == "a single run" else None
        with pytest.raises(RunError, match=f"is the folder of {what}; choose another --out"):
            compare(RECIPE, OTHER, data, out=folder, progress=False)
    with pytest.raises(RunError, match="comparison.json cannot be read: .*; name the folder that `compare` wrote"):
        load_comparison(tmp_path / "a")


@pytest.mark.parametrize(
    ("arms", "options", "error", "words"),
    [
        ((RECIPE, replace(RECIPE, name="same")), {}, UserError, "both arms are smoke: change a field or a trick"),
        ((RECIPE, "laptop"), {}, UserError, r"an arm must be a recipe or a pair \(recipe, tricks\), not 'laptop'"),
        ((RECIPE, (OTHER, smooth)), {}, UserError, "an arm must be a recipe or a pair"),
        ((RECIPE, OTHER), {"resolution": -0.1}, UserError, "resolution=-0.1 must be a width in percentage points"),
        ((RECIPE, OTHER), {"resolution": math.nan}, UserError, "resolution=nan"),
        ((RECIPE, OTHER), {"max_runs": 4}, UserError, "max_runs=4 must be at least 5"),
        ((RECIPE, OTHER), {"extra_epochs": -1.0}, UserError, "extra_epochs=-1 must be at least 0"),
        ((RECIPE, OTHER), {"first_seed": -1}, UserError, "first_seed=-1 must be at least 0"),
        ((RECIPE, replace(OTHER, global_batch_size=400)), {}, RecipeError, "global_batch_size=400"),
    ],
)
def test_an_impossible_comparison_is_refused_before_anything_starts(
    data, tmp_path, trainer, arms, options, error, words
):
    with pytest.raises(error, match=words):
        compare(*arms, data, out=tmp_path / "runs", progress=False, **options)
    assert not trainer.calls and not list(tmp_path.iterdir())


def test_arms_are_named_by_what_differs():
    names = comparing.arm_names
    mine = Tricks(loss=smooth, name="mine")
    plain, other = (RECIPE, NO_TRICKS), (OTHER, NO_TRICKS)
    assert names(plain, other) == NAMES
    assert names(plain, (recipes.laptop(), NO_TRICKS)) == ("smoke", "laptop")
    assert names(plain, (RECIPE, mine)) == ("smoke", "smoke with mine")
    assert names((RECIPE, mine), (OTHER, mine)) == ("smoke with mine", "smoke with mine, label_smoothing=0.0")
    assert names((RECIPE, mine), (RECIPE, replace(mine, loss=t_of))) == (
        "smoke with mine",
        "smoke with mine (other code)",
    )
    many = replace(OTHER, epochs=2.0, momentum=0.5, tta="none")
    assert names(plain, (many, NO_TRICKS))[1].endswith(", 1 more")


def test_every_rank_under_torchrun_decides_alike_and_only_rank_0_writes(data, tmp_path, trainer, monkeypatch):
    said: list[Any] = []

    class Rank0(trainer):
        calls: list[Any] = []

        def agree(self, value):
            said.append(pickle.dumps(value))
            return value

    class Rank1(trainer):
        calls: list[Any] = []
        is_main = False

        def agree(self, value):
            assert value == (None, None)
            return pickle.loads(said.pop(0))

        def train(self, recipe, *, out, **options):
            return super().train(recipe, out=None, **options)

    found, plans = [], []
    for rank, out in ((Rank0, tmp_path / "runs"), (Rank1, tmp_path / "none")):
        monkeypatch.setattr(comparing, "Trainer", rank)
        found.append(compare(RECIPE, OTHER, data, out=out, progress=False, on_plan=plans.append))
    assert found[0].summary() == found[1].summary() and plans[0] == plans[1]
    assert Rank0.calls == Rank1.calls and not said and not (tmp_path / "none").exists()


# --- with the real trainer ---


def test_real_runs_are_what_train_gives_for_each_arm_and_seed(data, tmp_path):
    mine = Tricks(loss=smooth, name="mine")
    plans: list[RunsNeeded] = []
    found = compare(
        RECIPE, (RECIPE, mine), data, out=tmp_path, max_runs=5, device="cpu", progress=False, on_plan=plans.append
    )
    assert found.names == ("smoke", "smoke with mine") and found.pairs == 5
    for arm, tricks in (("a", NO_TRICKS), ("b", mine)):
        for seed in (0, 3):
            alone = cifar_fast.train(RECIPE, data, tricks=tricks, seed=seed, device="cpu", progress=False)
            assert (found.arms[arm][seed]["accuracy"], found.arms[arm][seed]["loss"]) == (alone.accuracy, alone.loss)
    assert found.arms["a"][0]["loss"] != found.arms["b"][0]["loss"]
    (needed,) = plans
    assert needed.pair_seconds is not None and needed.pair_seconds > 0 and "measured now" in needed.timing


def test_the_time_of_a_run_is_a_forecast_and_on_gpus_a_plan(data, monkeypatch):
    power = importlib.import_module("cifar_fast.experiments.power")
    monkeypatch.setattr(power, "forecast", lambda recipe, data, *, tricks, device: Forecast(recipe, 7.0, "a test"))
    assert run_seconds(RECIPE, data, world_size=1, device="cpu") == 7.0
    measured, asked = measure_step(RECIPE, device="cpu", n_train=80, n_test=40, world_sizes=(1,)), []
    monkeypatch.setattr(power, "select_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(power, "measure_step", lambda *_, **options: asked.append(options) or measured)
    small = replace(RECIPE, resolutions=(16, 32), n_shards=2)
    expected = predict(measured, replace(small, resolutions=()), 80, 40, 2, published_link("nvlink_nccl"))
    found = run_seconds(small, data, tricks=Tricks(loss=smooth, on_step=print), world_size=2, device=None)
    assert found == expected.train_seconds + expected.evaluate_seconds
    assert asked[0]["world_sizes"] == (2,) and asked[0]["n_classes"] == 10
    assert (asked[0]["tricks"].loss, asked[0]["tricks"].on_step) == (smooth, None)
