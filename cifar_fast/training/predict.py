"""Predicts picture files with a trained network, and writes predictions to a CSV or JSON file."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_fast.data.dataset import IMAGE_SIZE
from cifar_fast.data.pictures import read_picture
from cifar_fast.errors import DataError, UserError
from cifar_fast.files import written_whole
from cifar_fast.training.evaluate import predict_logits
from cifar_fast.training.result import RunResult

_BATCH = 500  # pictures read and predicted at a time, so that a large folder needs no more memory


@dataclass(frozen=True)
class Predictions:
    """What a network says about named images."""

    names: Sequence[str]
    """The path of each picture, or its place in a data set, such as "test[17]"."""
    classes: Sequence[str]
    """The class names."""
    probabilities: Tensor = field(repr=False)
    """float32 (N, classes)."""
    labels: Sequence[str] | None = None
    """The true class of each, where it is known."""

    def counts(self) -> Counter[str]:
        """Return how often each class was predicted; the most frequent first when asked for `most_common`."""
        return Counter(self.classes[label] for label in self.probabilities.argmax(1).tolist())

    def rows(self, *, with_all: bool = False) -> list[dict[str, Any]]:
        """Return each image's path, class and probability, and whether the class is right, where the label is known.

        `with_all` adds the probability of every class, as `probabilities`.
        """
        values, labels = self.probabilities.max(1)
        rows = []
        for index, (name, value, label) in enumerate(zip(self.names, values.tolist(), labels.tolist(), strict=True)):
            row = {"path": name, "class": self.classes[label], "probability": round(value, 6)}
            if self.labels is not None:
                row |= {"label": self.labels[index], "correct": self.classes[label] == self.labels[index]}
            if with_all:
                each = self.probabilities[index].tolist()
                row["probabilities"] = {one: round(share, 6) for one, share in zip(self.classes, each, strict=True)}
            rows.append(row)
        return rows


def check_target(path: Path) -> None:
    """Raise `UserError` if predictions cannot be written to `path`: before they are made, which may take a while."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out {path} must end in .csv or .json, which says how it is written")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file in it, such as {path / 'predictions.csv'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")


def write_predictions(predictions: Predictions, path: Path, *, with_all: bool = False) -> None:
    """Write predictions to a CSV or JSON file, by its suffix, completely or not at all.

    The columns of a CSV file are those of `Predictions.rows`; the probability of a class is in the column `p_<class>`.

    Raises `UserError` if the file cannot be written.
    """
    check_target(path)
    rows = predictions.rows(with_all=with_all)
    text = json.dumps(rows, indent=1) + "\n" if path.suffix.lower() == ".json" else _as_csv(rows)
    try:
        # A path may hold bytes that are not text in this encoding; they are written as they are.
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from error


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        each = row.get("probabilities", {})
        flat.append(
            {key: value for key, value in row.items() if key != "probabilities"}
            | {f"p_{name}": value for name, value in each.items()}
        )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def predict_pictures(
    result: RunResult, paths: Sequence[Path], *, tta: str | None = None, on_batch: Callable[[int], None] | None = None
) -> tuple[Tensor, dict[Path, str]]:
    """Predict picture files with a run's network, at the size that it was trained on.

    Args:
        result: a finished run.
        paths: picture files; those that cannot be read are left out.
        tta: test-time augmentation; None: the recipe's.
        on_batch: called with the number of pictures in each batch when it is done.

    Returns:
        The logits of the readable pictures, float32 (N, classes) on the CPU; and for each unreadable file the reason.
    """
    image_size = result.dataset.get("image_size", IMAGE_SIZE)
    logits, unreadable = [torch.zeros(0, len(result.dataset["classes"]))], {}
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        pictures = []
        for path in batch:
            try:
                pictures.append(read_picture(path, image_size))
            except DataError as error:
                unreadable[path] = str(error)
        if pictures:
            logits.append(predict_logits(result.model, torch.stack(pictures), tta=tta or result.recipe.tta).cpu())
        if on_batch:
            on_batch(len(batch))
    return torch.cat(logits), unreadable


def labels_of(paths: Sequence[Path], classes: Sequence[str]) -> list[int]:
    """Return the label of each picture: its class is the name of the folder that it lies in.

    Raises `UserError` if the name of a folder is not that of a class.
    """
    known = {name: label for label, name in enumerate(classes)}
    folders = {path: path.absolute().parent.name for path in paths}
    unknown = sorted({folder for folder in folders.values() if folder not in known})
    if unknown:
        raise UserError(
            f"the network knows no class {', '.join(unknown[:5])}; a picture's class is the name of its folder, one of "
            f"{', '.join(classes)}"
        )
    return [known[folders[path]] for path in paths]
