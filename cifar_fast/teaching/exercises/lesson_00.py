"""Exercises of notebook 00: numbers that follow from a confusion matrix."""

from __future__ import annotations

from typing import Any

import torch

from cifar_fast.teaching.exercises.checks import exercise, expect_close

CONFUSION = torch.tensor([[50, 3, 7, 0], [1, 40, 9, 10], [12, 5, 30, 3], [0, 8, 2, 20]])


@exercise(
    "00.1",
    title="Precision",
    difficulty=1,
    minutes=5,
    hints=(
        "Recall divides the diagonal by the sums of the rows. Which sums does precision divide by?",
        "The images predicted as class j are column j: C.sum(0).",
    ),
    wrong=(lambda C: C.diagonal() / C.sum(1), lambda C: C.diagonal() / C.sum()),
)
def precision(answer: Any) -> None:
    """Check the precision of each class."""
    expect_close(answer(CONFUSION.clone()), CONFUSION.diagonal() / CONFUSION.sum(0), "the precision of the classes")


@exercise(
    "00.2",
    title="The pair most often confused",
    difficulty=2,
    minutes=10,
    hints=(
        "The mistakes from i to j and from j to i are two entries of the matrix. Which operation adds them?",
        "C + C.T counts both directions. The diagonal must not win: set it to zero, or take triu(1).",
        "argmax gives one number for the place in the flattened matrix: divmod it by the number of classes.",
    ),
    wrong=(lambda C: (2, 0), lambda C: (0, 0), lambda C: divmod(int(C.argmax()), len(C))),
)
def most_confused(answer: Any) -> None:
    """Check the pair on a matrix where the largest single entry is not of the right pair, and on its transpose."""
    both = torch.tensor([[90, 9, 0], [1, 70, 8], [0, 7, 80]])
    for matrix, pair in ((CONFUSION, (0, 2)), (both, (1, 2)), (both.T.contiguous(), (1, 2))):
        expect_close(answer(matrix.clone()), pair, f"the pair of {matrix.tolist()}")
