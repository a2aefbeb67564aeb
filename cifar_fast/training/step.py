"""The training loop: a `Recipe` and a data set in, a `RunResult` out; the only file that knows the order of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.distributed.ranks import Ranks
from cifar_fast.hardware.numerics import HALF
from cifar_fast.recipe import Recipe
from cifar_fast.training.evaluate import at_least_float32
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.model import Network


@dataclass
class TrainingStep:
    """One step from a batch to new weights: a function of two tensors, to be called as it is, or recorded and replayed.

    The schedule comes before it, because a recorded step takes no numbers from Python; averages of weights come after.
    """

    model: Network
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    dtype: torch.dtype
    ranks: Ranks
    gradients: Tensor | None = None
    """The buffer of `flat_gradients`, where they lie in one."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take the step; return what `forward_backward` does."""
        half_precision = self.dtype in HALF
        loss, hits = forward_backward(self.model, images, labels, self.recipe, self.dtype)
        if self.gradients is None:
            self.ranks.average_gradients(self.model, half_precision=half_precision, scale=len(images))
        else:
            self.ranks.average_buffer(self.gradients, half_precision=half_precision, scale=len(images))
        # The matrices of Muon's Newton-Schulz iterations are multiplied in half precision, too.
        with torch.autocast(images.device.type, self.dtype, enabled=half_precision):
            for optimizer in self.optimizers:
                optimizer.step()
        self.clear_gradients()
        return loss, hits

    def clear_gradients(self) -> None:
        """Make room for the next ones: none are there, or zeros in the buffer where they all lie."""
        if self.gradients is not None:
            self.gradients.zero_()
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def forward_backward(
    model: Network, images: Tensor, labels: Tensor, recipe: Recipe, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the batch's mean loss in the parameters; return that loss and the number of images hit.

    `images`: (N, 3, H, W), normalised; `labels`: int64 (N,). The convolutions compute in `dtype`. With
    `micro_batch_size` only that many images' activations exist at a time; the gradients add up to the same.
    """
    size = recipe.micro_batch_size or len(images)
    # A mean loss has gradients too small for float16; those of the sum, which the original recipes took, are not.
    loss_scale = len(images) if dtype == torch.float16 else 1
    loss, hits = images.new_zeros(()), images.new_zeros(())
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    for number, (part, target) in enumerate(parts, start=1):
        expect_part(model, number, len(parts))
        with torch.autocast(images.device.type, dtype, enabled=dtype in HALF):
            logits = at_least_float32(model(part))
        smoothing = recipe.label_smoothing
        part_loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / len(images)
        (part_loss * loss_scale).backward()
        loss += part_loss.detach()
        hits += (logits.detach().argmax(1) == target).sum()
    if loss_scale != 1:
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], loss_scale)
    return loss, hits


def expect_part(model: Network, part: int, n_parts: int) -> None:
    """Tell the batch norms which part of the batch comes next, for their running statistics."""
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.expect_part(part, n_parts)


def freeze_whitening_bias(model: Network, frozen: bool) -> None:
    """Stop or go on learning the whitening bias; frozen, nothing need be computed back through the first block."""
    whiten = getattr(model.layers, "whiten", None)
    if isinstance(whiten, nn.Conv2d) and whiten.bias is not None:
        whiten.bias.requires_grad = not frozen
