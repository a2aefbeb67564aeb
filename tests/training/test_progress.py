"""What is shown while a network trains: epoch, time left and accuracy, from the first second."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.training.progress import Progress, clock_time, counted, in_a_notebook, step_work, views_per_image
from cifar_fast.training.result import EpochResult

# Ten steps in the first epoch, on small images, and five in the second, the last.
RECIPE = replace(recipes.smoke(), n_shards=1, global_batch_size=64, epochs=1.5, resolutions=(16, 32))


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


def epoch_result(epoch: int, accuracy: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        train_loss=1.0,
        train_accuracy=0.5,
        test_loss=1.0,
        test_accuracy=accuracy,
        tta="none",
        train_seconds=1.0,
    )


def test_without_a_terminal_there_is_a_line_at_the_start_and_then_one_every_ten_seconds(tiny_data: Dataset) -> None:
    time, out = Time(), io.StringIO()
    with Progress(RECIPE, tiny_data, expected_seconds=65.0, stream=out, clock=time) as shown:
        assert out.getvalue() == ("smoke on synthetic: 0%, epoch 1 of 2, 1:05 left, accuracy follows after epoch 1\n")
        for done in range(1, 11):
            time.now += 4
            shown.step(done, accuracy=done / 10)
        shown.evaluated(epoch_result(1, 0.4567))
        time.now += 11
        shown.tick()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    assert [line.split(", ")[0] for line in lines[1:]] == [f"smoke on synthetic: {n}%" for n in (20, 40, 60, 67)]
    assert [line.split(", ")[-1] for line in lines[1:]] == [
        "training accuracy 20.0%", "training accuracy 35.0%", "training accuracy 50.0%", "test accuracy 45.67%",
    ]  # fmt: skip
    assert "epoch 2 of 2" in lines[-1]


def test_a_terminal_gets_a_bar_and_who_wants_nothing_gets_nothing(tiny_data: Dataset) -> None:
    time, out, nothing = Time(), Terminal(), io.StringIO()
    with Progress(RECIPE, tiny_data, expected_seconds=30.0, stream=out, clock=time) as shown:
        assert "0:30 left" in out.getvalue() and "epoch 1 of 2" in out.getvalue()
        shown.evaluated(epoch_result(1, 0.4567))
    assert "\r" in out.getvalue() and "test accuracy 45.67%" in out.getvalue()
    with Progress(RECIPE, tiny_data, show=False, stream=nothing, clock=time) as shown:
        time.now += 60
        shown.step(1, 0.1)
    assert nothing.getvalue() == ""


@pytest.mark.parametrize("expected", [None, 100.0])
@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, resolutions=(), epochs=2.0, tta="none")])
def test_a_run_that_takes_as_long_as_its_arithmetic_has_exactly_that_time_left(
    tiny_data: Dataset, recipe: Recipe, expected: float | None
) -> None:
    n_test, side = len(tiny_data.test_labels), 32
    work = [step_work(recipe, side, done // 10) for done in range(int(10 * recipe.epochs))]
    evaluations = [n_test * views_per_image(recipe, epoch) for epoch in range(2)]
    pace = 100.0 / (sum(work) + sum(evaluations))
    time, left = Time(), 100.0
    with Progress(recipe, tiny_data, expected_seconds=expected, stream=io.StringIO(), clock=time) as shown:
        assert shown.seconds_left == expected
        for done, units in enumerate(work, start=1):
            time.now += pace * units
            left -= pace * units
            shown.step(done)
            assert shown.seconds_left == pytest.approx(left)
            if done in (10, len(work)):
                time.now += pace * evaluations[done > 10]
                left -= pace * evaluations[done > 10]
                shown.evaluated(epoch_result(1 + (done > 10), 0.5))
                assert shown.seconds_left == pytest.approx(left, abs=1e-6)


def test_a_forecast_that_was_wrong_loses_its_say(tiny_data: Dataset) -> None:
    recipe, time = replace(RECIPE, resolutions=(), epochs=10.0, tta="none"), Time()
    with Progress(recipe, tiny_data, expected_seconds=10.0, stream=io.StringIO(), clock=time) as shown:
        for done in range(1, 51):
            time.now += 2
            shown.step(done)
        for epoch in range(1, 6):
            shown.evaluated(epoch_result(epoch, 0.5))
        assert shown.seconds_left == pytest.approx(100)  # half is done, in 100 s; ten were expected for all of it


def test_times_are_written_as_people_read_them() -> None:
    assert [clock_time(seconds) for seconds in (0, 59.6, 65, 3725)] == ["0:00", "1:00", "1:05", "1:02:05"]


# --- in a notebook ---


class Cell:
    """What one output of a notebook's cell showed, one after the other."""

    def __init__(self, data: dict[str, str]) -> None:
        self.shown = [data["text/plain"]]

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.shown.append(data["text/plain"])


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The outputs of a notebook's cell, in which the code of a test runs."""
    made: list[Cell] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Cell:
        made.append(Cell(data))
        return made[-1]

    kernel = SimpleNamespace(kernel="a kernel")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr("cifar_fast.training.progress.BAR_SECONDS", 0.0)
    assert in_a_notebook()
    return made


def test_in_a_notebook_a_bar_becomes_a_line_of_the_form_that_it_began_with(tiny_data, cells, capfd) -> None:
    time = Time()
    with Progress(RECIPE, tiny_data, seed=3, clock=time) as shown:
        for done in range(1, 16):
            time.now += 1
            shown.step(done, accuracy=0.25)
        shown.evaluated(epoch_result(1, 0.4567))
        shown.evaluated(epoch_result(2, 0.5))
    (cell,) = cells
    first, live, last = cell.shown[0], cell.shown[1:-1], cell.shown[-1]
    assert first == "smoke on synthetic, seed 3: 0.00 % after 0.0 s of training"
    assert last == "smoke on synthetic, seed 3: 50.00 % after 1.0 s of training"
    assert len(live) == 18 and all("smoke on synthetic, epoch " in line for line in live)
    assert live[5].startswith("\u2588" * 7 + "\u2591" * 13) and "training accuracy 25.0%" in live[5]
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_run_says_where_it_stopped(tiny_data, cells) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(RECIPE, tiny_data, seed=0) as shown:
        shown.step(12)
        raise KeyboardInterrupt
    assert cells[0].shown[-1] == "smoke on synthetic, seed 0: stopped in epoch 2 of 2"


def test_a_count_of_runs_ends_as_a_line_too(cells) -> None:
    with counted("ablation", 2, "run") as begin:
        begin("a, seed 0")
        begin("b, seed 0")
    assert cells[0].shown[0] == "ablation: 2 runs in 0.0 s"
    assert cells[0].shown[2].endswith(" ablation, run 2 of 2: b, seed 0") and "\u2588" * 10 in cells[0].shown[2]
    assert cells[0].shown[-1].startswith("ablation: 2 runs in ")
    with pytest.raises(ValueError), counted("ablation", 2, "run") as begin:
        begin("a, seed 0")
        raise ValueError
    assert cells[1].shown[-1] == "ablation: stopped in run 1 of 2"
    with counted("nothing", 1, "run", show=False):
        pass
    assert len(cells) == 2


def test_elsewhere_a_count_is_a_bar_on_standard_error(capsys) -> None:
    with counted("ablation", 2, "run") as begin:
        begin("a, seed 0")
        begin("b, seed 0")
    assert "ablation: 100%" in capsys.readouterr().err
    assert not in_a_notebook()
