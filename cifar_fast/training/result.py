"""The result of a training run: `RunResult` in memory, a run folder on disk.

A run folder holds `recipe.json`, `environment.json`, and the logs `epochs.jsonl` and `timing_log.tsv`, which grow by a
line an epoch, so an interrupted run keeps them. A finished run adds `result.json` and `weights.safetensors`, and
`logits.safetensors` if its logits are kept. A run on a part of a training set has `train_indices.npy`. A run with
tricks keeps their source in `tricks.py`, to be read: nothing ever executes it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cifar_fast.errors import RunError
from cifar_fast.files import write_text, written_whole
from cifar_fast.hardware.numerics import Numerics
from cifar_fast.recipe import Recipe
from cifar_fast.shown import data_set, epochs, hardware, html_table, percent, table
from cifar_fast.training.model import Network, build_network
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.tricks import NO_TRICKS, Tricks

LOGITS = "logits.safetensors"
INDICES = "train_indices.npy"


@dataclass(frozen=True)
class EpochResult:
    """One epoch: losses are means over images, accuracies shares 0 ... 1."""

    epoch: int
    """Epochs done, from 1."""
    train_loss: float
    """Mean loss over the training batches, augmented and with label smoothing."""
    train_accuracy: float
    """Share of the images in those batches that were classified correctly."""
    test_loss: float
    test_accuracy: float
    tta: str
    """Test-time augmentation used for the two test figures."""
    train_seconds: float


@dataclass(repr=False)
class RunResult:
    """A finished training run. It prints as a few lines, or as a table in a notebook."""

    recipe: Recipe
    dataset: dict[str, Any]
    """`name`, `fingerprint`, `n_train`, `n_test`, `classes`; for a subset, also `subset`."""
    environment: dict[str, Any]
    """Hardware, versions, numerics, step mode and processes, from `Setup.environment`."""
    seed: int | Seeds
    """One number if all random choices had the same seed."""
    epochs: list[EpochResult]
    train_seconds: float
    evaluate_seconds: float
    total_seconds: float
    first_step_seconds: float
    """From the start of the command (or of the call) to the first training step."""
    peak_memory_gb: float
    """Largest memory of the process so far, in 1e9 bytes: allocated on the GPU, or resident on the CPU. Several
    processes add up, and count the pages that they share more than once. A notebook counts its whole kernel."""
    model: Network
    """The network that was evaluated: the averaged one if the recipe averages."""
    warm_up_seconds: float = 0.0
    """Compiling and capturing the step, before anything is learned; in `total_seconds`, not in `train_seconds`."""
    logits: Tensor | None = None
    """float16 (n_test, classes) on the CPU, in the order of the test set, with the recipe's test-time augmentation, as
    `halved` returns them; None unless the run was asked to keep them."""
    test_labels: Tensor | None = None
    """int64 (n_test,): the labels that belong to the logits, kept with them."""
    train_indices: Tensor | None = None
    """int64 (n_train,): the images of the full training set that the run was trained on; None for all."""
    tricks: dict[str, Any] = field(default_factory=dict)
    """Name, fingerprint and source of the reader's own parts, from `Tricks.describe`; empty if there are none."""

    @property
    def accuracy(self) -> float:
        """Final test accuracy, with the recipe's test-time augmentation, 0 ... 1."""
        return self.epochs[-1].test_accuracy

    @property
    def loss(self) -> float:
        """Final test loss, with the recipe's test-time augmentation."""
        return self.epochs[-1].test_loss

    def notes(self) -> list[str]:
        """Return what a table of this run leaves out, a line each."""
        recipe, seeds = self.recipe, Seeds.of(self.seed).simplest
        seed = f"seed {seeds}" if isinstance(seeds, int) else str(seeds)
        return [
            f"n = 1 run, {seed}; recipe {recipe.name!r}, {epochs(recipe.epochs)}; TTA: {recipe.tta}",
            f"data set: {data_set(self.dataset)}",
            f"hardware: {hardware(self.environment)}; torch {self.environment['torch']}",
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """Return accuracy, loss and clocks as the rows of a table."""
        clocks = ("train_seconds", "evaluate_seconds", "total_seconds")
        values = tuple(f"{getattr(self, clock):.1f} s" for clock in clocks)
        return [("test accuracy", "test loss", *clocks), (percent(self.accuracy), f"{self.loss:.3f}", *values)]

    def __repr__(self) -> str:
        return "\n".join([table(self.rows()), *self.notes()])

    def _repr_html_(self) -> str:
        return html_table(self.rows(), self.notes())

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors (weights, logits, indices) as plain values, ready for JSON."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "train_seconds": self.train_seconds,
            "evaluate_seconds": self.evaluate_seconds,
            "total_seconds": self.total_seconds,
            "first_step_seconds": self.first_step_seconds,
            "warm_up_seconds": self.warm_up_seconds,
            "peak_memory_gb": self.peak_memory_gb,
            "seed": Seeds.of(self.seed).plain(),
            "dataset": self.dataset,
            "environment": self.environment,
            "recipe": self.recipe.to_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        } | ({"tricks": self.tricks} if self.tricks else {})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path`, completely or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def save_weights(model: Network, path: Path | str) -> None:
    """Write the network's weights and statistics to a safetensors file."""
    # A copy of each, because layers that share a weight name it twice, and the format holds no shared memory.
    save_file({name: value.clone().contiguous().cpu() for name, value in model.state_dict().items()}, path)


def halved(logits: Tensor) -> Tensor:
    """Return `logits` (N, classes) as float16, each row shifted so that its largest is 0.

    The shift changes no probability. Near 0 float16 is finest, so the likeliest class stays the likeliest: unshifted,
    two logits of about 8 that differ by less than 0.008 would round to a tie.
    """
    half = torch.finfo(torch.float16)
    return (logits - logits.max(1, keepdim=True).values).clamp(min=half.min).to(torch.float16)


def save_logits(result: RunResult, path: Path) -> None:
    """Write the logits of `result` and their labels to a safetensors file, completely or not at all."""
    assert result.logits is not None and result.test_labels is not None
    with written_whole(path) as temporary:
        save_file({"logits": result.logits.contiguous(), "labels": result.test_labels.contiguous()}, temporary)
        temporary.chmod(0o644)  # safetensors lets only the owner read its files


def load_logits(path: Path) -> tuple[Tensor, Tensor]:
    """Read logits, float16 (n_test, classes), and labels, int64 (n_test,), from a file of `save_logits`.

    Raises `RunError` if the file cannot be read.
    """
    try:
        tensors = load_file(path)
        return tensors["logits"], tensors["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(f"the logits in {path} cannot be read: {error}; remove the file, or train the run again") from (
            error
        )


class RunFolder:
    """The folder of one run, created before training starts and filled while it runs."""

    def __init__(
        self,
        path: Path | str,
        recipe: Recipe,
        dataset: Mapping[str, Any],
        environment: Mapping[str, Any],
        tricks: Mapping[str, Any],
        train_indices: Tensor | None = None,
    ) -> None:
        """Create the folder; `tricks` is from `Tricks.describe`. Raise `RunError` if it exists or cannot be written."""
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True)
            write_json(self.path / "recipe.json", recipe.to_dict())
            write_json(self.path / "environment.json", {"dataset": dict(dataset), **environment})
            (self.path / "timing_log.tsv").write_text("epoch\thours\ttop1Accuracy\n")
            if train_indices is not None:
                with written_whole(self.path / INDICES) as temporary, temporary.open("wb") as file:
                    np.save(file, train_indices.numpy())
            if tricks:
                write_text(self.path / "tricks.py", tricks_file(tricks))
        except FileExistsError as error:
            raise RunError(
                f"{self.path} exists already; choose another --out, or remove it: a run never overwrites another"
            ) from error
        except OSError as error:
            raise RunError(
                f"the run folder {self.path} cannot be written: {error.strerror}; choose another with --out"
            ) from error

    def log(self, epoch: EpochResult) -> None:
        """Append one epoch to the logs and flush them to disk."""
        try:
            self._append("epochs.jsonl", json.dumps(asdict(epoch)))
            # The columns of DAWNBench: hours of training, accuracy in percent.
            self._append(
                "timing_log.tsv", f"{epoch.epoch}\t{epoch.train_seconds / 3600:.8f}\t{100 * epoch.test_accuracy:.2f}"
            )
        except OSError as error:
            raise RunError(
                f"the log in {self.path} cannot be written: {error.strerror}; free some space and start again"
            ) from error

    def _append(self, name: str, line: str) -> None:
        with open(self.path / name, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, result: RunResult) -> None:
        """Write the logits if there are any, the weights and the result, each completely or not at all."""
        try:
            if result.logits is not None:
                save_logits(result, self.path / LOGITS)
            with written_whole(self.path / "weights.safetensors") as temporary:
                save_weights(result.model, temporary)
                temporary.chmod(0o644)  # safetensors lets only the owner read its files
            write_json(self.path / "result.json", result.to_dict())
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the result cannot be written to {self.path}: {error}; the logs are there; free some space and train "
                "again"
            ) from error


def save_run(result: RunResult, path: Path | str) -> None:
    """Write a finished run to the new folder `path`; raise `RunError` if it exists or cannot be written."""
    folder = RunFolder(path, result.recipe, result.dataset, result.environment, result.tricks, result.train_indices)
    for epoch in result.epochs:
        folder.log(epoch)
    folder.finish(result)


def tricks_file(tricks: Mapping[str, Any]) -> str:
    """Return the source of the parts in `tricks`, from `Tricks.describe`, as one text to be read."""
    title = f"# The tricks of this run: {tricks['name'] or 'unnamed'}, fingerprint {tricks['fingerprint']}."
    parts = [
        f"# --- {part}: {code['function']}, fingerprint {code['fingerprint']} ---\n\n{code['source']}"
        for part, code in tricks["parts"].items()
    ]
    return "\n\n\n".join([title, *parts]) + "\n"


class MissingModel:
    """Stands in for the network of a run whose `model` function is not at hand; whoever uses it is told what to do."""

    def __init__(self, function: str, where: object) -> None:
        self._advice = (
            f"the network of this run was built by the function {function!r}, which is not part of the package: call "
            f"load_run({str(where)!r}, tricks=Tricks(model=...)) with it; the run keeps its source in `tricks`"
        )

    def __repr__(self) -> str:
        return f"<no network: {self._advice}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for, and do without
            raise AttributeError(name)
        raise RunError(self._advice)

    def __call__(self, *_: object) -> Any:
        raise RunError(self._advice)


def load_run(path: Path | str, *, tricks: Tricks | None = None) -> RunResult:
    """Read a run folder, with the network on the CPU.

    Args:
        path: the folder.
        tricks: those that the run was trained with, if their `model` built its network. Without them the result has
            everything but the network, and says so when it is used. A warning follows if the function is not the same.

    Raises:
        RunError: the folder is incomplete, or the weights do not fit.
    """
    folder = Path(path)
    try:
        values = json.loads((folder / "result.json").read_text())
        weights = load_file(folder / "weights.safetensors")
        indices = torch.from_numpy(np.load(folder / INDICES)) if (folder / INDICES).exists() else None
    except FileNotFoundError as error:
        raise RunError(f"{folder} is not a finished run ({error}); train it again to another folder") from error
    except (OSError, EOFError, ValueError, SafetensorError) as error:  # also what is not JSON or not an array
        raise RunError(f"the run in {folder} cannot be read: {error}; train it again") from error
    logits, labels = load_logits(folder / LOGITS) if (folder / LOGITS).exists() else (None, None)
    try:
        own_model = values["tricks"]["parts"].get("model") if "tricks" in values else None
        if own_model and (tricks is None or not tricks.model):
            run = _without_weights(values, MissingModel(own_model["function"], path))
        else:
            run = run_from_dict(values, weights, tricks or NO_TRICKS)
            if own_model and tricks and own_model["fingerprint"] != tricks.code("model").fingerprint:
                warnings.warn(
                    f"the run in {folder} was trained with another source of `model` (fingerprint "
                    f"{own_model['fingerprint']}); its weights fit, but may mean something else",
                    stacklevel=2,
                )
        return replace(run, logits=logits, test_labels=labels, train_indices=indices)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"result.json in {folder} was written by another version (field {error}); train the run again"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the weights in {folder} do not fit its recipe {values['recipe']['name']!r}: {error}"
        ) from error


def run_from_dict(values: Mapping[str, Any], weights: dict[str, Tensor], tricks: Tricks = NO_TRICKS) -> RunResult:
    """Rebuild a run from the values of `RunResult.to_dict` and the network's state dict, with the network on the CPU.

    `tricks` are those that the run was trained with, or at least their `model`.

    Raises `KeyError` or `TypeError` for values of another version, `RuntimeError` for weights that do not fit.
    """
    recipe = Recipe.from_dict(values["recipe"])
    # With the algorithms of the training run, where this machine has them, the logits agree to the last bit.
    where = values["environment"]
    fused = where.get("fused_norm", False) and not where.get("gpu")  # a GPU has kernels of its own
    numerics = Numerics(torch.float32, where.get("convolution", "direct"), "as in the training run", fused)
    function = tricks.completed(recipe, numerics).model
    assert function is not None
    n_classes = len(values["dataset"]["classes"])
    model = build_network(
        function, recipe, n_classes, torch.zeros(3), torch.ones(3), memory_format=tricks.memory_format
    )
    channels_last = tricks.fitted(recipe).channels_last
    model = model.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    if any(value.dtype == torch.float64 for value in weights.values()):
        model.double()
    model.load_state_dict(weights)
    return _without_weights(values, model.eval())


def _without_weights(values: Mapping[str, Any], model: Any) -> RunResult:
    clocks = {
        key: values[key]
        for key in ("train_seconds", "evaluate_seconds", "total_seconds", "first_step_seconds", "peak_memory_gb")
    }
    return RunResult(
        recipe=Recipe.from_dict(values["recipe"]),
        dataset=values["dataset"],
        environment=values["environment"],
        seed=Seeds.of(values["seed"]).simplest,
        epochs=[EpochResult(**epoch) for epoch in values["epochs"]],
        model=model,
        warm_up_seconds=values.get("warm_up_seconds", 0.0),  # older results did not count it
        tricks=values.get("tricks", {}),
        **clocks,
    )
