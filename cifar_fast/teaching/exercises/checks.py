"""Checks a reader's code for an exercise, and gives a stronger hint after each wrong attempt.

The exercises of notebook 04 are in `lesson_04.py`, loaded on first use. Each is a function that gets the reader's
answer and raises `Wrong` with what is wrong.
"""

from __future__ import annotations

import dis
import functools
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from cifar_fast.errors import UserError

DIFFICULTIES = {1: "easy", 2: "medium", 3: "hard"}
_NOTHING_BUT_RETURN = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}


class Wrong(Exception):
    """What is wrong with an answer, in a sentence for the reader."""


class _Open(Exception):
    """The answer is still the stub."""


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """An exercise that asks for code."""

    id: str
    """Lesson and number: `04.1`."""
    title: str
    difficulty: int
    """A key of `DIFFICULTIES`."""
    minutes: int
    """How long it should take."""
    hints: tuple[str, ...]
    """From a nudge to nearly the answer."""
    checker: Callable[[Any], None]
    """Raises `Wrong` for a wrong answer."""
    wrong: tuple[Any, ...] = ()
    """Answers that must be refused, for the tests."""
    returns_nothing: bool = False
    """Whether a right answer is a function that returns None, such as an update in place."""

    @property
    def label(self) -> str:
        """Difficulty and time, as the notebook gives them: `easy, 5 minutes`."""
        return f"{DIFFICULTIES[self.difficulty]}, {self.minutes} minutes"


_known: dict[str, Exercise] = {}
_attempts: dict[str, int] = {}  # wrong ones, in this kernel


def exercise(
    id: str,
    *,
    title: str,
    difficulty: int,
    minutes: int,
    hints: Sequence[str],
    wrong: Sequence[Any] = (),
    returns_nothing: bool = False,
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the decorated function as the checker of exercise `id`; the other arguments are those of `Exercise`.

    The checker gets what the reader passed to `check`. It raises `Wrong`, or lets `expect_close` do so.
    """
    if difficulty not in DIFFICULTIES or not hints or isinstance(hints, str):
        raise ValueError(f"exercise {id}: needs a difficulty of 1, 2 or 3, and a tuple of hints")

    def register(checker: Callable[[Any], None]) -> Callable[[Any], None]:
        if checker.__module__.rpartition("_")[2] != id.partition(".")[0] and "lesson_" in checker.__module__:
            raise ValueError(f"exercise {id} does not belong in {checker.__module__}")
        _known[id] = Exercise(
            id=id,
            title=title,
            difficulty=difficulty,
            minutes=minutes,
            hints=tuple(hints),
            checker=checker,
            wrong=tuple(wrong),
            returns_nothing=returns_nothing,
        )
        return checker

    return register


def lessons() -> list[str]:
    """Return the numbers of the lessons that have exercises: `04`, ..."""
    package = Path(__file__).parent
    names = [module.name for module in pkgutil.iter_modules([str(package)])]
    return sorted(name.removeprefix("lesson_") for name in names if name.startswith("lesson_"))


def of_lesson(number: str) -> list[Exercise]:
    """Return the exercises of the lesson with that number, `04`; raise `UserError` if it has none."""
    if number not in lessons():
        raise UserError(f"lesson {number} has no exercises that are checked; lessons with some: {', '.join(lessons())}")
    import_module(f"{__package__}.lesson_{number}")
    return [_known[id] for id in sorted(_known) if id.startswith(f"{number}.")]


def find(id: str) -> Exercise:
    """Return the exercise `id`; raise `UserError` if there is none."""
    if id in _known:
        return _known[id]
    there = of_lesson(id.partition(".")[0])
    if id not in _known:
        raise UserError(f"there is no exercise {id!r}; this lesson has {', '.join(one.id for one in there)}")
    return _known[id]


def check(id: str, answer: Any) -> None:
    """Print whether `answer` solves exercise `id`; after a wrong attempt print what is wrong, and the next hint.

    Raises `UserError` if there is no such exercise.
    """
    asked = find(id)
    name = f"Exercise {id}, {asked.title}"
    if (complaint := complaint_about(asked, answer)) is None:
        print(f"{name}: right.")
        _attempts.pop(id, None)
    elif not complaint:
        print(f"{name}: open ({asked.label}). Replace the ... and run the cell again.")
    else:
        attempt = _attempts[id] = _attempts.get(id, 0) + 1
        print(f"{name}: not yet. {complaint}")
        print(f"Hint {min(attempt, len(asked.hints))} of {len(asked.hints)}: {asked.hints[:attempt][-1]}")
        if attempt > len(asked.hints):
            print(f"A solution is in notebooks/solutions/{id.partition('.')[0]}.py.")


def complaint_about(asked: Exercise, answer: Any) -> str | None:
    """Return what is wrong with an answer, an empty text if it is still the stub, and None if it is right."""
    if _is_blank(answer) or (_does_nothing(answer)):
        return ""
    if isinstance(answer, FunctionType) and not asked.returns_nothing:
        answer = _watched(answer)
    try:
        asked.checker(answer)
    except _Open:
        return ""
    except Wrong as wrong:
        return _sentence(str(wrong))
    except AssertionError as wrong:
        return _sentence(str(wrong) or "A check failed")
    except Exception as error:  # the reader's code, whatever it does
        return "" if "llipsis" in str(error) else _what_stopped(error)
    return None


def expect_close(found: Any, wanted: Any, what: str, *, rtol: float | None = None, atol: float | None = None) -> None:
    """Raise `Wrong` unless `found` equals `wanted`, in shape and up to rounding.

    Args:
        found: what the reader's code gave: a number, or a tensor or nested sequence of numbers.
        wanted: the same from the model answer.
        what: what is compared, in words that fit into "<what> should be 1, not 2".
        rtol: relative tolerance, given together with `atol`. None: that of the less precise of the two number formats.
        atol: absolute tolerance.
    """
    if _is_blank(found):
        raise _Open
    try:
        ours, theirs = (torch.as_tensor(value).detach().cpu() for value in (wanted, found))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} should be {_kind(wanted)}, not {_kind(found)}") from None
    if ours.shape != theirs.shape:
        raise Wrong(f"{what} should have the shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    if rtol is None:
        coarse = max((torch.finfo(each.dtype).eps for each in (ours, theirs) if each.is_floating_point()), default=0.0)
        rtol, atol = max(1e-5, 8 * coarse), max(1e-6, 8 * coarse) if atol is None else atol
    ours, theirs = ours.double(), theirs.double()
    close = torch.isclose(theirs, ours, rtol=rtol, atol=atol or 0.0, equal_nan=True)
    if close.all():
        return
    if ours.ndim == 0:
        raise Wrong(f"{what} should be {ours.item():.6g}, not {theirs.item():.6g}")
    place = tuple(int(each) for each in (~close).nonzero()[0])
    raise Wrong(
        f"{what} should be {ours[place].item():.6g} at {list(place)}, not {theirs[place].item():.6g} "
        f"({int((~close).sum())} of {close.numel()} values are wrong)"
    )


def _is_blank(value: Any) -> bool:
    return value is None or value is ...


def _does_nothing(answer: Any) -> bool:
    """Whether a function's body is only `...`, `pass` or a docstring."""
    if not isinstance(answer, FunctionType):
        return False
    steps = [step for step in dis.get_instructions(answer) if step.opname not in _NOTHING_BUT_RETURN]
    constants = [step.argval for step in dis.get_instructions(answer) if step.opname in ("LOAD_CONST", "RETURN_CONST")]
    return not steps and all(map(_is_blank, constants)) and not inspect.isgeneratorfunction(answer)


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, wrapped so that it says so when it gives nothing back."""

    @functools.wraps(function)
    def watched(*args: Any, **options: Any) -> Any:
        if _is_blank(found := function(*args, **options)):
            raise _Open
        return found

    return watched


def _what_stopped(error: Exception) -> str:
    """Return the error, with the line of the reader's cell that raised it: the code that is in no file."""
    said = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    cell = [frame for frame in traceback.extract_tb(error.__traceback__) if not Path(frame.filename).exists()]
    if not cell:
        return _sentence(f"The check could not use this answer: {said}")
    at = f"line {cell[-1].lineno}" + (f", `{cell[-1].line}`" if cell[-1].line else "")
    return _sentence(f"Your code stopped at {at} with {said}")


def _sentence(text: str) -> str:
    text = text.strip().split("\n\n")[0]
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int | float):
        return "a number"
    return "a dictionary" if isinstance(value, Mapping) else f"of type {type(value).__name__}"
