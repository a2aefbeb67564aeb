"""Exercises of the notebooks: code that is checked with hints, and predictions that are compared with the answer."""

from cifar_fast.teaching.exercises.checks import Exercise, Wrong, check, exercise, expect_close, lessons, of_lesson
from cifar_fast.teaching.exercises.predictions import compare

__all__ = ["Exercise", "Wrong", "check", "compare", "exercise", "expect_close", "lessons", "of_lesson"]
