"""Code is checked with hints that grow stronger; a prediction keeps its answer until there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import run_cell
from torch import Tensor, nn

from cifar_fast.errors import UserError
from cifar_fast.teaching.exercises import Wrong, check, checks, compare, exercise, expect_close, of_lesson

# --- predictions ---


@pytest.mark.parametrize("answer", [0.125, 42, "celu", True])
def test_without_a_prediction_the_answer_stays_hidden(answer, capsys):
    compare(None, answer)
    said = capsys.readouterr().out
    assert said.startswith("First predict") and str(answer) not in said


@pytest.mark.parametrize(
    "prediction, answer, within, right",
    [
        (3, 3, 0.0, True),
        (3.0, 3, 0.0, True),
        (2, 3, 0.0, False),
        (2.5, 3.0, 0.5, True),
        (3.5, 3.0, 0.5, True),
        (2.4, 3.0, 0.5, False),
        (0, 0.0, 0.0, True),  # a zero is a prediction
        ("CELU ", "celu", 0.0, True),
        ("relu", "celu", 0.0, False),
        (True, True, 0.0, True),
        (False, True, 0.0, False),  # so is a no
    ],
)
def test_a_prediction_is_right_or_not_and_the_answer_is_told(prediction, answer, within, right, capsys):
    compare(prediction, answer, within=within)
    said = capsys.readouterr().out
    assert said.startswith("Right: the answer is " if right else "Not quite: the answer is ")
    assert said.rstrip().endswith(f"you said {prediction}.")


def test_a_number_has_four_digits_and_its_unit(capsys):
    compare(50, 48.828125, within=5, unit="GB/s")
    assert "the answer is 48.83 GB/s, you said 50" in capsys.readouterr().out
    compare(0.5, 0.25)
    assert "the answer is 0.25, you said 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prediction, answer, kind",
    [("3", 3, "number"), (True, 1, "number"), (1, True, "true or false"), (1, "one", "word")],
)
def test_another_kind_of_prediction_is_told_which_is_wanted(prediction, answer, kind, capsys):
    with pytest.raises(UserError, match=f"prediction={prediction!r} cannot be compared: the answer is a {kind}"):
        compare(prediction, answer)
    assert capsys.readouterr().out == ""


# --- code ---


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exercise 99.1, to double a tensor, and 99.2, to double it in place."""
    monkeypatch.setattr(checks, "_known", {})
    monkeypatch.setattr(checks, "_attempts", {})

    @exercise("99.1", title="Twice", difficulty=1, minutes=5, hints=("Add.", "Add x to x."))
    def twice(answer: Callable[[Tensor], Tensor]) -> None:
        expect_close(answer(torch.tensor([1.0, 2.0])), [2.0, 4.0], "the double of [1, 2]")

    @exercise("99.2", title="In place", difficulty=3, minutes=9, hints=("Use mul_.",), returns_nothing=True)
    def in_place(answer: Callable[[Tensor], None]) -> None:
        answer(x := torch.ones(2))
        if x[0] != 2:
            raise Wrong(f"x holds {x[0]:g}, not 2")


STUBS = {
    "no body": "def f(x):\n    ...",
    "a docstring": 'def f(x):\n    """Double it."""',
    "an ellipsis returned": "def f(x):\n    y = ...\n    return y",
    "nothing returned": "def f(x):\n    y = x + x",
    "an ellipsis in a sum": "def f(x):\n    return x + ...",
    "a value": "f = ...",
    "no value": "f = None",
}


@pytest.mark.parametrize("source", STUBS.values(), ids=STUBS)
def test_an_untouched_stub_is_open_and_costs_no_hint(source, doubling, capsys):
    for _ in range(2):
        check("99.1", run_cell(source)["f"])
        assert capsys.readouterr().out == (
            "Exercise 99.1, Twice: open (easy, 5 minutes). Replace the ... and run the cell again.\n"
        )


def test_a_right_answer_is_right(doubling, capsys):
    check("99.1", lambda x: 2 * x)
    assert capsys.readouterr().out == "Exercise 99.1, Twice: right.\n"


def test_each_wrong_attempt_shows_a_stronger_hint_and_then_where_the_solution_is(doubling, capsys):
    said = []
    for _ in range(3):
        check("99.1", lambda x: x + 1)
        said.append(capsys.readouterr().out)
    wrong = "not yet. The double of [1, 2] should be 4 at [1], not 3 (1 of 2 values are wrong)."
    assert all(one.startswith(f"Exercise 99.1, Twice: {wrong}\n") for one in said)
    assert said[0].endswith("Hint 1 of 2: Add.\n") and said[1].endswith("Hint 2 of 2: Add x to x.\n")
    assert said[2].endswith("Hint 2 of 2: Add x to x.\nA solution is in notebooks/solutions/99.py.\n")
    check("99.1", lambda x: 2 * x)
    check("99.1", lambda x: x)
    assert "Hint 1 of 2" in capsys.readouterr().out  # solved, and begun anew


def test_code_that_stops_is_a_wrong_answer_with_the_line_that_did(doubling, capsys):
    check("99.1", run_cell("def f(x):\n    y = x\n    return y @ nonsense")["f"])
    said = capsys.readouterr().out
    assert "Your code stopped at line 3, `return y @ nonsense` with NameError: name 'nonsense'" in said
    check("99.1", 7)
    assert "The check could not use this answer: TypeError" in capsys.readouterr().out


def test_an_update_in_place_may_return_nothing(doubling, capsys):
    check("99.2", run_cell("def f(x):\n    ...")["f"])
    check("99.2", run_cell("def f(x):\n    x.mul_(2)")["f"])
    check("99.2", run_cell("def f(x):\n    x.mul_(3)")["f"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Exercise 99.2, In place: open (hard, 9 minutes).")
    assert said[1] == "Exercise 99.2, In place: right." and said[2].endswith("not yet. X holds 3, not 2.")


def test_a_stub_within_a_class_is_open_where_its_result_is_compared(doubling):
    @exercise("99.3", title="A layer", difficulty=2, minutes=5, hints=("Call it.",))
    def layer(answer: type[nn.Module]) -> None:
        expect_close(answer()(torch.ones(1)), [1.0], "the output")

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any: ...

    assert checks.complaint_about(checks.find("99.3"), Layer) == ""


@pytest.mark.parametrize(
    "found, wanted, said",
    [
        (torch.ones(2), torch.ones(2), None),
        (torch.ones(2) + 1e-7, [1, 1], None),
        (1, 1.0, None),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.1, None),
        (True, True, None),
        (float("inf"), float("inf"), None),
        (1.001, 1.0, "it should be 1, not 1.001"),
        (torch.ones(2, 1), torch.ones(2), r"it should have the shape \(2,\), not \(2, 1\)"),
        ("a", 1.0, "it should be a number, not of type str"),
        ({}, torch.ones(2), r"it should be a tensor of shape \(2,\), not a dictionary"),
        (float("nan"), 1.0, "it should be 1, not nan"),
    ],
)
def test_expect_close_compares_shape_and_values(found, wanted, said):
    if said is None:
        expect_close(found, wanted, "it")
    else:
        with pytest.raises(Wrong, match=f"^{said}$"):
            expect_close(found, wanted, "it")


def test_expect_close_takes_another_tolerance():
    expect_close(1.1, 1.0, "it", rtol=0.2, atol=0.0)
    expect_close(1e-3, 0.0, "it", atol=1e-2)
    with pytest.raises(Wrong):
        expect_close(1.1, 1.0, "it", atol=0.01)


def test_an_unknown_exercise_is_told(doubling):
    with pytest.raises(UserError, match="lesson 98 has no exercises"):
        check("98.1", None)
    with pytest.raises(UserError, match="lesson 98 has no exercises"):
        of_lesson("98")


def test_a_checker_needs_hints_and_a_difficulty():
    with pytest.raises(ValueError, match="99.4"):
        exercise("99.4", title="", difficulty=1, minutes=1, hints=())
    with pytest.raises(ValueError, match="99.4"):
        exercise("99.4", title="", difficulty=4, minutes=1, hints=("a",))
