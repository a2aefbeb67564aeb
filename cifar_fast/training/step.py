"""The training step: the only place that knows its order.

Schedule, forward, loss, backward, average the gradients, update the weights, move the averages. `Update` is the part
that works on tensors alone, so that a GPU can capture it; `TrainingStep` adds what Python decides at each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_fast.errors import TricksError
from cifar_fast.hardware.numerics import HALF
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import Alone
from cifar_fast.training.averaging import EMA, Lookahead
from cifar_fast.training.evaluate import at_least_float32
from cifar_fast.training.gradients import fill_in_zeros
from cifar_fast.training.layers import GhostBatchNorm, whitening_layer
from cifar_fast.training.model import Network
from cifar_fast.training.optim import set_learning_rates

UpdateFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From normalised images (N, 3, H, W) and int64 labels (N,) to the mean loss and the number of correct predictions."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (N, classes) and labels, int64 (N,) or probabilities (N, classes), to each image's loss or the mean."""
Score = Callable[[Loss, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The type of `scored`."""


@dataclass
class TrainingStep:
    """One training step after the other, from a batch to new weights and averages."""

    recipe: Recipe
    model: Network
    optimizers: list[torch.optim.Optimizer]
    schedule: Callable[[float], float]
    steps_per_epoch: int
    ema: EMA | None
    lookahead: Lookahead | None
    updates: dict[bool, UpdateFunction]
    """The update while the whitening bias is learned (False) and when it is frozen (True): a captured update cannot
    find out which."""
    done: int = 0
    """Steps taken so far."""
    own: frozenset[str] = frozenset()
    """The parts of the training run that are the reader's own, by their names in `Tricks`."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on normalised images (N, 3, H, W) and int64 labels (N,).

        Returns the mean loss and the number of correct predictions, two scalars on the device. The next captured step
        writes to the same place: copy what you keep.
        """
        frozen = self.done / self.steps_per_epoch >= self.recipe.whitening_bias_epochs
        freeze_whitening_bias(self.model, frozen)
        at = self.done + (self.recipe.schedule_time == "end")
        set_learning_rates(self.optimizers, self.schedule, at / self.steps_per_epoch)
        loss, correct = self.updates[frozen](images, labels)
        self.done += 1
        if self.ema and self.done % self.recipe.ema_every == 0:
            self.ema.update(self.model)
        if self.lookahead and self.done % self.recipe.lookahead_every == 0:
            self.lookahead.move()
        return loss, correct

    def start_epoch(self, epoch: int) -> None:
        """Drop the EMA for good once the recipe no longer evaluates it; epochs count from 0."""
        if epoch >= self.recipe.epochs - self.recipe.ema_off_epochs:
            self.ema = None

    @property
    def evaluated(self) -> Network:
        """The network to evaluate now: the averaged one, or the trained one where there is no average."""
        return self.ema.model if self.ema else self.model


@dataclass
class Update:
    """Forward, loss, backward, average the gradients, update the weights: a function of two tensors."""

    model: Network
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    dtype: torch.dtype
    """The number format of the convolutions."""
    ranks: Alone = field(default_factory=Alone)
    gradients: Tensor | None = None
    """The buffer of `flat_gradients`, where all gradients lie in one."""
    loss: Loss | None = None
    """None: the recipe's."""
    own: frozenset[str] = frozenset()
    """As for `TrainingStep`."""
    score: Score | None = None
    """A compiled `scored`; None: not compiled."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights once; arguments and result as for `forward_backward`."""
        loss, correct = forward_backward(self.model, images, labels, self.recipe, self.dtype, self.loss, self.score)
        fill_in_zeros(self.model)
        # Nobody knows how large the gradients of a reader's own loss are: float16 might not hold them.
        send_half = self.dtype in HALF and not self.own & {"model", "loss"}
        if self.gradients is None:
            self.ranks.average_gradients(self.model, half_precision=send_half, scale=len(images))
        else:
            self.ranks.average_buffer(self.gradients, half_precision=send_half, scale=len(images))
        self.move_weights()
        self.clear_gradients()
        return loss, correct

    def move_weights(self) -> None:
        """Have the optimisers take a step."""
        # Muon multiplies its matrices in half precision, too.
        half_precision = self.dtype in HALF and "optimizers" not in self.own
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=half_precision):
            for optimizer in self.optimizers:
                optimizer.step()

    def clear_gradients(self) -> None:
        """Remove the gradients; those that lie in one buffer become zeros instead."""
        if self.gradients is not None:
            self.gradients.zero_()
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class CrossEntropy:
    """The recipe's loss: each image's cross entropy with its label, a share of which smoothing gives to all classes."""

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        """Return the loss of each image, (N,), or with `reduction="sum"` their sum, which takes fewer kernels."""
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=self.label_smoothing)


def forward_backward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    loss_function: Loss | None = None,
    score: Score | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the batch's mean loss in the parameters.

    Args:
        model: the network.
        images: (N, 3, H, W), normalised.
        labels: int64 (N,), or probabilities (N, classes).
        recipe: with a `micro_batch_size`, only that many images' activations exist at a time; the gradients add up to
            the same.
        dtype: the number format of the convolutions.
        loss_function: from logits and labels to each image's loss, or to their mean; None: the recipe's.
        score: `scored`, compiled; None: not compiled.

    Returns:
        The mean loss and the number of correct predictions, two scalars on the device.
    """
    loss_function, score = loss_function or CrossEntropy(recipe.label_smoothing), score or scored
    size = recipe.micro_batch_size or len(images)
    # A mean loss has gradients too small for float16; those of the sum, which the original recipes took, are not.
    of_sum = dtype == torch.float16
    losses, hits = [], []
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    for number, (part, target) in enumerate(parts, start=1):
        expect_part(model, number, len(parts))
        with torch.autocast(images.device.type, dtype, enabled=dtype in HALF):
            outputs = model(part)
        part_sum, correct = score(loss_function, outputs, target)
        part_loss = part_sum / len(images)
        (part_sum if of_sum else part_loss).backward()
        losses.append(part_loss.detach())
        hits.append(correct)
    if of_sum:
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], len(images))
    return sum(losses[1:], losses[0]), sum(hits[1:], hits[0])


def scored(loss_function: Loss, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the images' losses and the number of correct predictions, two scalars of the logits' type.

    Args:
        loss_function: as for `forward_backward`.
        outputs: of the network, (N, classes), in any number format.
        labels: int64 (N,), or probabilities (N, classes).
    """
    logits = at_least_float32(outputs)
    correct = logits.detach().argmax(1) == likeliest(labels)
    return summed(loss_function, logits, labels).to(logits.dtype), correct.sum(dtype=logits.dtype)


def summed(loss_function: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the images' losses; raise `TricksError` if the function gives neither these nor their mean."""
    if isinstance(loss_function, CrossEntropy):
        return loss_function(logits, labels, reduction="sum")
    losses, n_images = loss_function(logits, labels), len(logits)
    if not isinstance(losses, Tensor) or losses.shape not in ((), (n_images,)):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise TricksError(
            f"the loss returned {got} for {n_images} images; return their mean, a scalar, or ({n_images},) numbers"
        )
    if not losses.requires_grad:
        raise TricksError("the loss has no gradient: compute it from the logits, without `detach`, `item` or `argmax`")
    return losses.sum() if losses.ndim else losses * n_images


def likeliest(labels: Tensor) -> Tensor:
    """Return the classes, int64 (N,), of `labels` that are classes already or probabilities (N, classes)."""
    return labels.argmax(1) if labels.ndim == 2 else labels


def expect_part(model: nn.Module, part: int, n_parts: int) -> None:
    """Tell the batch norms which part of the batch comes next, so that their running statistics come out right."""
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.expect_part(part, n_parts)
        elif isinstance(module, _BatchNorm) and n_parts > 1 and module.momentum is not None:
            share_momentum(module, part, n_parts)


def share_momentum(norm: _BatchNorm, part: int, n_parts: int) -> None:
    """Do for torch's batch norm what `GhostBatchNorm.expect_part` does: the parts count equally, and together once."""
    whole: Any = getattr(norm, "batch_momentum", norm.momentum)
    norm.batch_momentum = whole
    share = whole / n_parts
    norm.momentum = share / (1 - share * (n_parts - part))


def freeze_whitening_bias(model: nn.Module, frozen: bool) -> None:
    """Freeze the whitening bias or learn it; while it is frozen the backward pass stops before the first layer."""
    whiten = whitening_layer(model)
    if whiten is not None and whiten.bias is not None:
        whiten.bias.requires_grad = not frozen
