"""The parts of a training run that a reader can replace: `Tricks`, through which the recipe's own parts go, too."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_fast.errors import TricksError
from cifar_fast.hardware.cuda_graph import StepMode
from cifar_fast.hardware.numerics import Numerics
from cifar_fast.recipe import Recipe
from cifar_fast.training.model import ModelFunction, recipe_layers
from cifar_fast.training.optim import lr_schedule, recipe_optimizers
from cifar_fast.training.own_code import Code, name_of, obstacle, raised_by, read_code
from cifar_fast.training.step import CrossEntropy, Loss

if TYPE_CHECKING:
    from cifar_fast.training.result import EpochResult
    from cifar_fast.training.step import TrainingStep

Optimizers = Callable[[nn.Module, Recipe], Sequence[Optimizer]]
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Schedule = Callable[[float], float]

PARTS = ("model", "optimizers", "loss", "augment", "schedule", "on_epoch", "on_step")
"""The fields of `Tricks` that hold functions."""
NAMED = 5
"""The most parameters that an error names."""


@dataclass(frozen=True, kw_only=True)
class Tricks:
    """Functions of your own in place of the recipe's; None leaves the recipe's part as it is.

    They may be defined in a notebook cell or a script: they travel to other processes together with what they refer
    to. Each process gets copies, so a list that a callback fills stays empty in the process that started the others.

    A run with tricks is repeatable: torch's global generator, which dropout draws from, is seeded from the run's seed
    and the rank. Only what is drawn there differs with the number of processes.
    """

    model: ModelFunction | None = None
    """`model(recipe, n_classes)` returns any `nn.Module` from images to logits (N, n_classes).

    It gets the same images as the recipe's network: normalised by the training set's mean and deviation, (N, 3, H, W),
    contiguous. It is called with torch's generator seeded by the run's seed. Its weights become float32 and move to
    the device. The recipe's fields about the network, whitening, batch norm and the convolution's algorithm no longer
    count, nor does `channels_last`. A whole shard is normalised together by its batch norms, as on as many processes
    as there are shards, and their running statistics are averaged over the processes."""
    optimizers: Optimizers | None = None
    """`optimizers(model, recipe)` returns one or more optimisers, which together hold each learned parameter once.

    `model` is what `model` returned, or the recipe's layers. Gradients are averaged over the processes before each
    step; a parameter that took no part in it has a gradient of zero. Every group's learning rate is its peak: before
    each step it is multiplied by the schedule. The step must need neither a closure nor the loss, and runs in float32;
    use `torch.autocast` for less. The recipe's learning rates, momentum and weight decay no longer count."""
    loss: Loss | None = None
    """`loss(logits, labels)` returns the mean over the images, or a number for each, (N,), from float logits (N, C).

    `labels`: int64 (N,), or what `augment` made of them. It is called for each shard, so that a loss that compares the
    images of a batch is the same on any number of processes. `label_smoothing` no longer counts."""
    augment: Augment | None = None
    """`augment(images, labels, generator)` returns images and labels in place of the recipe's crop, flip, cutout and
    jitter.

    It is called for each shard's local batch: normalised floats (N, 3, H, W) and int64 (N,), on the device. Labels may
    come back as probabilities (N, C), as mixup makes them; training accuracy then counts the likeliest class. The
    number of images must stay. `generator` is a CPU generator that depends on seed, epoch, step and shard, so that any
    number of processes draws the same: `torch.rand(n, generator=generator).to(images.device)`."""
    schedule: Schedule | None = None
    """`schedule(epoch)` returns the factor of every learning rate at a time in epochs, such as 2.5."""
    on_epoch: Callable[[EpochResult, TrainingStep], None] | None = None
    """Called on every process after each epoch and its evaluation; its time counts towards `total_seconds` alone."""
    on_step: Callable[[TrainingStep], None] | None = None
    """Called on every process after each step, within `train_seconds`: `step.done`, `step.model`, `step.optimizers`.
    What it changes, it must change alike on every process."""
    name: str = ""
    """What tables and progress bars call it."""
    _described: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the parts are functions."""
        for part in PARTS:
            value = getattr(self, part)
            if value is not None and not callable(value):
                raise TricksError(f"{part}={value!r} must be a function; write {part}=my_function, without a call")
        if not isinstance(self.name, str):
            raise TricksError(f"name={self.name!r} must be a string")

    def __getstate__(self) -> dict[str, Any]:
        """Travel with the description: the source of a notebook cell cannot be found in another process."""
        return vars(self) | {"_described": self.describe()}

    @property
    def own(self) -> frozenset[str]:
        """The names of the parts that are the reader's own."""
        return frozenset(part for part in PARTS if getattr(self, part) is not None)

    def merged(self, other: Tricks) -> Tricks:
        """Return these tricks with the parts, and the name, that `other` has in their place."""
        changes = {part: getattr(other, part) for part in other.own}
        return replace(self, **changes, name=other.name or self.name)

    def without_callbacks(self) -> Tricks:
        """Return only the parts that decide the computation."""
        return replace(self, on_epoch=None, on_step=None)

    def titled(self, recipe: Recipe) -> str:
        """Return what progress bars call a run of `recipe` with these tricks."""
        return f"{recipe.name} with {self.name or ', '.join(sorted(self.own))}" if self.own else recipe.name

    # --- what a run is made of ---

    def completed(self, recipe: Recipe, numerics: Numerics) -> Tricks:
        """Return these tricks with the recipe's own functions in place of the missing ones.

        One part has none: the recipe draws its crops and flips for a whole epoch and applies them while it gathers a
        batch, so `augment` stays None, and `fitted` turns them off where there is one.
        """
        layers = partial(recipe_layers, convolution=numerics.convolution, fuse_norm=numerics.fuse_norm)
        return replace(
            self,
            model=self.model or layers,
            optimizers=self.optimizers or recipe_optimizers,
            loss=self.loss or CrossEntropy(recipe.label_smoothing),
            schedule=self.schedule or lr_schedule(recipe),
        )

    def fitted(self, recipe: Recipe) -> Recipe:
        """Return `recipe` as it is computed with these tricks: without what belongs to a part that they replace."""
        changes: dict[str, Any] = {}
        if self.augment:
            changes |= {"crop_padding": 0, "flip": "none", "cutout": 0, "color_jitter": 0.0}
        if self.model:
            # A reader's own layers may need contiguous images (`view`), and none of our kernels knows them.
            changes |= {"channels_last": False, "convolution": "direct", "fuse_norm": False}
        if (self.model or self.loss) and recipe.n_shards > 1:
            # Batch norms and losses of the reader's own see one shard at a time, as on `n_shards` processes.
            size = recipe.local_batch_size
            changes["micro_batch_size"] = math.gcd(recipe.micro_batch_size or size, size)
        return replace(recipe, **changes)

    @property
    def memory_format(self) -> torch.memory_format:
        """How the network expects its images in an evaluation."""
        return torch.contiguous_format if self.model else torch.channels_last

    def explained(self, numerics: Numerics) -> Numerics:
        """Return `numerics` with the reason why none of our kernels is used, where the model is the reader's own."""
        if not self.model:
            return numerics
        return replace(numerics, reason=f"the model is the reader's own, with torch's layers; {numerics.reason}")

    def restricted(self, mode: StepMode, recipe: Recipe) -> StepMode:
        """Return `mode` without what does not suit these tricks, and with the reasons.

        A model is compiled, and a model, a loss or an augmentation captured, only if the recipe says `on`, because
        what such a function decides in Python would be decided once. An optimiser is never captured.
        """
        against = {
            "compile": [part for part in ("model",) if recipe.compile != "on"],
            "cuda_graph": [part for part in ("model", "loss", "augment") if recipe.cuda_graph != "on"] + ["optimizers"],
        }
        for name, parts in against.items():
            if found := [part for part in parts if part in self.own]:
                hint = "" if "optimizers" in found else f"; {name}=on tries it"
                if getattr(mode, name):
                    mode = mode.without(name, f"the {' and the '.join(found)} may not suit it, being your own{hint}")
        return mode

    @contextmanager
    def seeded(self, seed: int, rank: int, device: torch.device) -> Iterator[None]:
        """Seed torch's global generator while the block runs, if there are tricks, and restore it."""
        if not self.own:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence((3, seed, rank)).generate_state(1, np.uint32)[0]))
            yield

    # --- what a result keeps of them ---

    def describe(self) -> dict[str, Any]:
        """Return `name`, `fingerprint` and `parts` (name, fingerprint and source of each function) as plain values.

        Empty if nothing is the reader's own.
        """
        if self._described is not None:
            return self._described
        if not self.own:
            return {}
        parts = {part: self.code(part) for part in PARTS if part in self.own}
        together = "\n".join(f"{part} {code.fingerprint}" for part, code in parts.items())
        return {
            "name": self.name,
            "fingerprint": hashlib.sha256(together.encode()).hexdigest()[:16],
            "parts": {part: code.to_dict() for part, code in parts.items()},
        }

    def code(self, part: str) -> Code:
        """Return the source and the fingerprint of one part, which must be the reader's own."""
        return read_code(getattr(self, part))

    def fingerprint(self) -> str:
        """Return sixteen hexadecimal digits that change with the source of any part, and with the constants, functions
        and classes that it refers to; empty if nothing is the reader's own.
        """
        return self.describe().get("fingerprint", "")

    # --- what is refused, and who failed ---

    def require_travel(self) -> None:
        """Raise `TricksError`, which names the part and the object, if a part cannot be sent to other processes."""
        for part in PARTS:
            function = getattr(self, part)
            if function is not None and (found := obstacle(function)):
                raise TricksError(
                    f"the {part} {name_of(function)!r} cannot be sent to other processes, because it holds {found}; "
                    "make it inside the function, keep tensors on the CPU, or train on one process"
                )

    def blame(self, error: BaseException) -> None:
        """Note on `error` which of the reader's own functions raised it, if one did."""
        code = raised_by(error)
        if code is None or not self.own:
            return
        parts = [part for part in PARTS if getattr(getattr(self, part), "__code__", None) is code]
        error.add_note(f"raised in {code.co_qualname}" + "".join(f", the {part} of the tricks" for part in parts))


NO_TRICKS = Tricks()
"""The recipe's own parts."""


# --- what must be true of the parts ---


def require_optimizers(found: object, model: nn.Module) -> list[Optimizer]:
    """Return what an `optimizers` function returned as a list; give each group the `peak_lr` that a schedule scales.

    Raises `TricksError` unless they hold each learned parameter of `model` once, and step without a closure.
    """
    several = isinstance(found, Iterable) and not isinstance(found, Optimizer)
    optimizers: list[Any] = list(found) if several else [found]  # type: ignore[call-overload]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TricksError(f"`optimizers` returned {type(optimizer).__name__}; it must return a list of Optimizers")
        _require_plain_step(optimizer)
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", float(group.get("lr", 0.0)))
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    names = {id(p): name for name, p in model.named_parameters()}
    if strangers := len(held.keys() - names.keys()):
        raise TricksError(f"`optimizers` holds {strangers} tensors that are not parameters of the model it was given")
    times = {name: held[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    if missing := [name for name, count in times.items() if count == 0]:
        raise TricksError(
            f"`optimizers` misses {_listed(missing)}: give every learned parameter to an optimiser, or set its "
            "requires_grad to False in `model`"
        )
    if twice := [name for name, count in times.items() if count > 1]:
        raise TricksError(f"`optimizers` holds {_listed(twice)} more than once: each step would move them twice")
    return optimizers


def _require_plain_step(optimizer: Optimizer) -> None:
    """Raise `TricksError` if the optimiser's step needs an argument, such as LBFGS's closure."""
    needed = [
        name
        for name, parameter in inspect.signature(optimizer.step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise TricksError(
            f"{type(optimizer).__name__} needs {' and '.join(needed)} for a step, but the step is taken from the "
            "averaged gradients alone; choose an optimiser whose `step()` needs no argument"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
