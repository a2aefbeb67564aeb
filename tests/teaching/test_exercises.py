"""An exercise keeps its answer until there is a prediction, and compares like with like."""

from __future__ import annotations

import pytest

from cifar_fast.errors import UserError
from cifar_fast.teaching.exercises import check


@pytest.mark.parametrize("answer", [0.125, 42, "celu", True])
def test_without_a_prediction_the_answer_stays_hidden(answer, capsys):
    check(None, answer)
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
    check(prediction, answer, within=within)
    said = capsys.readouterr().out
    assert said.startswith("Right: the answer is " if right else "Not quite: the answer is ")
    assert said.rstrip().endswith(f"you said {prediction}.")


def test_a_number_has_four_digits_and_its_unit(capsys):
    check(50, 48.828125, within=5, unit="GB/s")
    assert "the answer is 48.83 GB/s, you said 50" in capsys.readouterr().out
    check(0.5, 0.25)
    assert "the answer is 0.25, you said 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prediction, answer, kind",
    [("3", 3, "number"), (True, 1, "number"), (1, True, "true or false"), (1, "one", "word")],
)
def test_another_kind_of_prediction_is_told_which_is_wanted(prediction, answer, kind, capsys):
    with pytest.raises(UserError, match=f"prediction={prediction!r} cannot be compared: the answer is a {kind}"):
        check(prediction, answer)
    assert capsys.readouterr().out == ""
