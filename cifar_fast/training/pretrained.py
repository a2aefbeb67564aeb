"""Loads trained networks that ship with the package: weights in bfloat16, and a JSON file that tells their origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from cifar_fast.errors import RunError, UserError
from cifar_fast.files import written_whole
from cifar_fast.recipe import Recipe
from cifar_fast.shown import data_set, epochs, hardware, html_table, percent, table
from cifar_fast.training.model import Network
from cifar_fast.training.result import RunResult, run_from_dict, write_json

WEIGHTS = Path(__file__).parents[1] / "weights"
"""`NAME.safetensors` and `NAME.json` for each network."""
CHECKED_IMAGES = 1000
"""Test images, the first of the set, whose single views check a network quickly."""


@dataclass(frozen=True, repr=False)
class Pretrained:
    """A trained network that ships with the package. It prints as a few lines, in a notebook as a table."""

    name: str
    run: RunResult
    """The training run; its accuracy is that before the weights were rounded, its network holds the rounded ones."""
    accuracy: float
    """Test accuracy 0 ... 1 of the rounded weights, with the recipe's test-time augmentation."""
    checked_accuracy: float
    """Test accuracy 0 ... 1 on the first `CHECKED_IMAGES` test images, on single views."""
    sha256: str
    """Of the file of weights."""
    commit: str
    """Of the package that made the file."""

    @property
    def model(self) -> Network:
        """The network, on the CPU, in float32, ready to predict."""
        return self.run.model

    @property
    def recipe(self) -> Recipe:
        """What it was trained with."""
        return self.run.recipe

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, size, classes and fingerprint of its data set."""
        return self.run.dataset

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return list(self.dataset["classes"])

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table as rows of text."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return [
            ("network", "test accuracy", "parameters", "trained in"),
            (self.name, percent(self.accuracy), f"{parameters:,}", f"{self.run.train_seconds:.1f} s"),
        ]

    def notes(self) -> list[str]:
        """Return what the table leaves out, a line each."""
        recipe = self.recipe
        return [
            f"recipe {recipe.name!r}, {epochs(recipe.epochs)}; TTA: {recipe.tta}; weights in bfloat16",
            f"data set: {data_set(self.dataset)}",
            f"hardware: {hardware(self.run.environment)}",
        ]

    def __repr__(self) -> str:
        return "\n".join([table(self.rows()), *self.notes()])

    def _repr_html_(self) -> str:
        return html_table(self.rows(), self.notes())


def names() -> list[str]:
    """Return the names of the networks that ship with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.json"))


def pretrained(name: str) -> Pretrained:
    """Return the trained network `name`, which ships with the package.

    Raises `UserError` if there is none of that name, `RunError` if its files are incomplete or damaged.
    """
    if name not in names():
        there = f"there are {', '.join(names())}" if names() else "none ships with this version"
        raise UserError(f"there is no pretrained network {name!r}; {there}")
    path = WEIGHTS / f"{name}.safetensors"
    try:
        values, content = json.loads((WEIGHTS / f"{name}.json").read_text()), path.read_bytes()
    except (OSError, ValueError) as error:
        raise RunError(f"the pretrained network {name!r} cannot be read: {error}; install the package again") from error
    if (found := hashlib.sha256(content).hexdigest()) != values["sha256"]:
        raise RunError(
            f"{path} is damaged: its SHA-256 is {found}, and {values['sha256']} was expected; install the package again"
        )
    return _restored(name, values, load(content))


def _restored(name: str, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Pretrained:
    whole = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in weights.items()}
    # Torch's own convolution, which every machine has.
    anywhere = values["run"]["environment"] | {"convolution": "direct", "fused_norm": False}
    run = run_from_dict({**values["run"], "environment": anywhere}, whole)
    return Pretrained(
        name=name,
        run=replace(run, environment=values["run"]["environment"]),
        accuracy=values["accuracy"],
        checked_accuracy=values["checked_accuracy"],
        sha256=values["sha256"],
        commit=values["commit"],
    )


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with matrices and filters in bfloat16; vectors, which take little room, stay as they are."""
    return {
        name: value.to(torch.bfloat16).contiguous() if value.is_floating_point() and value.ndim > 1 else value.clone()
        for name, value in weights.items()
    }


def ship(run: RunResult, name: str, *, commit: str, accuracy: Any) -> Pretrained:
    """Write the network of `run` to `WEIGHTS` as `name`, and return it as `pretrained` will.

    Args:
        run: a run with a network of the package's own.
        name: what to call it; files of that name are replaced.
        commit: of the package.
        accuracy: called with the rounded network, returns what `Pretrained` calls `accuracy` and `checked_accuracy`.

    Raises:
        UserError: the network is the reader's own, so that the package cannot build it.
    """
    if run.tricks:
        raise UserError("this run used tricks of its own; only networks of the package can ship with it")
    content = save(rounded(run.model.state_dict()))
    values = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "commit": commit,
        "run": run.to_dict(),
        "accuracy": 0.0,
        "checked_accuracy": 0.0,
    }
    whole, part = accuracy(_restored(name, values, load(content)).model)
    values |= {"accuracy": whole, "checked_accuracy": part}
    WEIGHTS.mkdir(exist_ok=True)
    with written_whole(WEIGHTS / f"{name}.safetensors") as temporary:
        temporary.write_bytes(content)
    write_json(WEIGHTS / f"{name}.json", values)
    return pretrained(name)
