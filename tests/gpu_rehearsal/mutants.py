"""Deliberate faults in the package, to prove that the rehearsal sees them."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import cifar_fast.hardware.cuda_graph as cuda_graph
import cifar_fast.training.batches as batches
import cifar_fast.training.capture as capture
import cifar_fast.training.loop as loop
import cifar_fast.training.optim as optim
import cifar_fast.training.setup as setup
import cifar_fast.training.step as step

_sources: dict[str, str] = {}
"""The text of each function that has been edited in this process, in which a second edit looks."""


@dataclass(frozen=True)
class Edit:
    """A line of a function that is replaced by another."""

    module: ModuleType
    function: str
    old: str
    new: str

    def apply(self) -> None:
        """Change the function wherever it has been imported; its text must hold `old` once."""
        function = self._function()
        source = _sources.get(self.function) or textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise LookupError(
                f"{self.function} holds {self.old!r} {source.count(self.old)} times; bring the mutant up to date"
            )
        namespace: dict[str, Any] = {}
        _sources[self.function] = source.replace(self.old, self.new)
        exec(_sources[self.function], self.module.__dict__, namespace)
        function.__code__ = inspect.unwrap(namespace[function.__name__]).__code__

    def _function(self) -> FunctionType:
        found: Any = self.module
        for name in self.function.split("."):
            found = inspect.getattr_static(found, name)
        return inspect.unwrap(found)


ANOTHER_RANK = "another rank"
"""The mark of a mutant that needs gradients to be averaged with another rank's."""

MUTANTS: dict[str, tuple[Edit, ...]] = {
    "a number read in the step": (
        Edit(
            step,
            "forward_backward",
            "losses.append(part_loss.detach())",
            "losses.append(images.new_tensor(part_loss.item()))",
        ),
    ),
    "the loss read after every step": (Edit(loop, "train_epoch", 'if setup.device.type == "cpu":', "if True:"),),
    "a learning rate recorded as a number": (
        Edit(capture, "_capture", "keep_learning_rates_on(setup.device, setup.optimizers)", "pass"),
    ),
    "a tensor made on the CPU": (
        Edit(
            step,
            "forward_backward",
            "losses, hits = [], []",
            "losses, hits = [torch.zeros(()).to(images.device)], []",
        ),
    ),
    "channels_last forgotten for the weights": (
        Edit(setup, "set_up", "torch.channels_last if fitted.channels_last else", ""),
    ),
    f"gradients set to None between captures ({ANOTHER_RANK})": (
        Edit(step, "Update.clear_gradients", "self.gradients.zero_()", "self.model.zero_grad(set_to_none=True)"),
    ),
    "gradients never cleared": (Edit(step, "Update.__call__", "self.clear_gradients()", "pass"),),
    "SGD not fused": (Edit(optim, "recipe_optimizers", "fuse(optimizers)", "pass"),),
    "a warm-up on the default stream that keeps its graph": (
        Edit(
            cuda_graph,
            "CapturedFunction.__init__",
            "with torch.cuda.stream(stream):",
            "with torch.cuda.stream(before):",
        ),
        Edit(step, "forward_backward", "outputs = model(part)", "outputs = model.kept = model(part)"),
    ),
    "no warm-up": (Edit(cuda_graph, "CapturedFunction.__init__", "range(WARM_UPS)", "range(0)"),),
    "nothing rolled back": (Edit(capture, "_capture", "with rolled_back(setup.model, setup.optimizers):", "if True:"),),
    "results not copied": (Edit(loop, "train_epoch", "losses.append(loss.clone())", "losses.append(loss)"),),
    "pageable copies in every step": (
        Edit(batches, "TrainBatches.epoch", "make(*now)", "make(*(value.cpu() for value in now))"),
    ),
}
