"""A prediction before a cell is run, compared with what was found."""

from __future__ import annotations

from cifar_fast.errors import UserError

Answer = float | str | bool


def compare(prediction: Answer | None, answer: Answer, *, within: float = 0.0, unit: str = "") -> None:
    """Print whether a prediction is right; without one, ask for it and withhold the answer.

    `within`: how far off a number may be, in the answer's `unit`. Raises `UserError` for a prediction of a different
    kind from the answer.
    """
    if prediction is None:
        print("First predict: put your answer in place of None and run the cell again.")
        return
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if number != (isinstance(prediction, int | float) and not isinstance(prediction, bool)):
        wanted = "number" if number else "true or false" if isinstance(answer, bool) else "word"
        raise UserError(f"prediction={prediction!r} cannot be compared: the answer is a {wanted}")
    if number:
        assert isinstance(answer, int | float) and isinstance(prediction, int | float)
        right, shown = abs(prediction - answer) <= within, f"{answer:.4g}{' ' * bool(unit)}{unit}"
    else:
        right, shown = str(prediction).strip().lower() == str(answer).strip().lower(), str(answer)
    print(f"{'Right' if right else 'Not quite'}: the answer is {shown}, you said {prediction}.")
