"""No exercise rots: each has its stub in the notebook, its solution passes, and wrong answers are refused."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cells import run_cell
from torch import Tensor, nn

import cifar_fast as cf
from cifar_fast.teaching.exercises import checks, lessons, of_lesson

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "notebooks" / "solutions"
GIVEN = {"cf": cf, "torch": torch, "F": F, "nn": nn, "np": np}
"""What an exercise's cell may use beside what it defines."""
ALL = [exercise for number in lessons() for exercise in of_lesson(number)]
EACH = pytest.mark.parametrize("asked", ALL, ids=lambda asked: asked.id)


@cache
def notebook_cells(number: str) -> list[tuple[str, str]]:
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


@cache
def sections(number: str) -> dict[str, str]:
    """The parts of a file of solutions by exercise; "" is what comes before the first."""
    parts = re.split(r"^# %% *(\d\d\.\d+)\b.*$", (SOLUTIONS / f"{number}.py").read_text(), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def stub(asked: checks.Exercise) -> tuple[str, str]:
    """The cell that poses an exercise, and what it passes to `check`, as an expression."""
    number = asked.id.partition(".")[0]
    cells = [text for kind, text in notebook_cells(number) if kind == "code" and f'check("{asked.id}"' in text]
    assert len(cells) == 1, f"notebook {number} needs one cell that calls cf.exercises.check({asked.id!r}, ...)"
    last = ast.parse(cells[0]).body[-1]
    assert isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and len(last.value.args) == 2, cells[0]
    return cells[0], ast.unparse(last.value.args[1])


def solution(asked: checks.Exercise) -> Any:
    parts = sections(asked.id.partition(".")[0])
    assert asked.id in parts, f"no section '# %% {asked.id}' in {SOLUTIONS.name}"
    return eval(stub(asked)[1], run_cell(parts[""] + parts[asked.id], **GIVEN))


def spoiled(value: Any) -> Any:
    """A value near the right one, and wrong."""
    if isinstance(value, Tensor):
        return ~value if value.dtype == torch.bool else value + 1
    if isinstance(value, tuple | list):
        return type(value)(spoiled(each) for each in value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | np.ndarray | np.number):
        return value + 1
    return value[1:] if isinstance(value, str) else object()


def wrong_answers(asked: checks.Exercise) -> Iterator[Any]:
    yield from asked.wrong
    right = solution(asked)
    if isinstance(right, type) and issubclass(right, nn.Module):
        yield type("Spoiled", (right,), {"forward": lambda self, *given: spoiled(right.forward(self, *given))})
    elif isinstance(right, type):
        return
    elif asked.returns_nothing:
        yield lambda *given, **options: 0  # which changes nothing in place
    elif isinstance(right, Callable):
        yield lambda *given, **options: spoiled(right(*given, **options))
    else:
        yield spoiled(right)


@EACH
def test_the_notebook_poses_the_exercise_as_the_registry_has_it(asked):
    number = asked.id.partition(".")[0]
    prose = "\n".join(text for kind, text in notebook_cells(number) if kind == "markdown")
    assert f"**Exercise {asked.id}** ({asked.label})" in prose
    assert "](solutions" in prose, "the notebook does not say where the solutions are"


@EACH
def test_the_untouched_stub_is_open(asked, capsys, monkeypatch):
    monkeypatch.setattr(checks, "_attempts", {})
    run_cell(stub(asked)[0], **GIVEN)
    assert f"Exercise {asked.id}, {asked.title}: open" in capsys.readouterr().out


@EACH
def test_the_solution_is_right(asked):
    assert checks.complaint_about(asked, solution(asked)) is None


@EACH
def test_wrong_answers_are_refused_in_words(asked):
    answers = list(wrong_answers(asked))
    assert answers, "give the exercise an example of a wrong answer: wrong=(...)"
    for answer in answers:
        assert checks.complaint_about(asked, answer), answer


def test_every_check_in_a_notebook_and_every_solution_has_its_exercise():
    known = {asked.id for asked in ALL}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        code = "\n".join(text for kind, text in notebook_cells(path.name[:2]) if kind == "code")
        assert set(re.findall(r'exercises\.check\("([\d.]+)"', code)) <= known
    for path in sorted(SOLUTIONS.glob("*.py")):
        assert {id for id in sections(path.stem) if id} <= known


def test_what_is_spoiled_is_wrong():
    assert spoiled(1) == 2 and spoiled(True) is False and spoiled("ab") == "b" and spoiled((1.0, [2])) == (2.0, [3])
    assert torch.equal(spoiled(torch.ones(2)), torch.full((2,), 2.0)) and not spoiled(torch.tensor(True))
