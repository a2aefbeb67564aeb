"""Optimisers and what drives them: schedules, parameter groups, Nesterov SGD, Muon, Lookahead."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cifar_fast.recipe import Recipe


@dataclass(frozen=True)
class PiecewiseLinear:
    """A schedule as a value: straight lines through `(knots[i], values[i])`, constant before and after them."""

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, t: float) -> float:
        """Return the value at `t`; where two knots coincide the later one counts from there on."""
        right = bisect_right(self.knots, t)
        if right == 0 or right == len(self.knots):
            return self.values[min(right, len(self.knots) - 1)]
        (t0, t1), (v0, v1) = self.knots[right - 1 : right + 1], self.values[right - 1 : right + 1]
        return v0 + (v1 - v0) * (t - t0) / (t1 - t0)


def lr_schedule(recipe: Recipe) -> PiecewiseLinear:
    """Return the learning rate, as a share of its peak, over time in epochs: up, down, at another pace from a bend on
    if there is one, and flat at the end."""
    bend = ((recipe.epochs * recipe.bend_fraction, recipe.bend_lr_fraction),) if recipe.bend_fraction else ()
    points = (
        (0.0, recipe.start_lr_fraction),
        (recipe.epochs * recipe.warmup_fraction, 1.0),
        *bend,
        (recipe.epochs - recipe.flat_epochs, recipe.final_lr_fraction),
    )
    return PiecewiseLinear(tuple(t for t, _ in points), tuple(value for _, value in points))


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The quintic's coefficients, which favour the slope at zero over convergence to 1. Source: as `orthogonalise`."""


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 3) -> Tensor:
    """Return the matrices, (B, m, n), with their singular values brought near 1 by `steps` Newton-Schulz iterations,
    all at once.

    The quintic's coefficients favour the slope at zero over convergence: the singular values end within about 0.5 ...
    1.5. Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT  # (B, m, m) with m <= n: the smaller of the two products
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Return `orthogonalise` of each of `matrices`, (m, n), whose shapes may differ, in as few batches as pay.

    A GPU, to which many small kernels cost more than arithmetic, takes all at once; a CPU those of one shape, and under
    autocast keeps them in the short format throughout, since turning operands into it again and again costs as much as
    their products.
    """
    if matrices[0].is_cuda:
        return orthogonalise_padded(matrices)
    if torch.is_autocast_enabled("cpu"):
        matrices = [matrix.to(torch.get_autocast_dtype("cpu")) for matrix in matrices]
    return orthogonalise_by_shape(matrices)


def orthogonalise_by_shape(matrices: list[Tensor]) -> list[Tensor]:
    """Do so for the matrices of each shape together."""
    places: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        places[matrix.shape].append(place)
    found = list(matrices)
    for same in places.values():
        for place, update in zip(same, orthogonalise(torch.stack([matrices[i] for i in same])), strict=True):
            found[place] = update
    return found


def orthogonalise_padded(matrices: list[Tensor]) -> list[Tensor]:
    """Do so for all at once, filled up with zeros to the largest: these stay zero, and add nothing to any product."""
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    rows, columns = (max(matrix.shape[side] for matrix in wide) for side in (0, 1))
    padded = wide[0].new_zeros(len(wide), rows, columns)
    for place, matrix in zip(padded, wide, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    found = [each[: m.shape[0], : m.shape[1]] for each, m in zip(orthogonalise(padded), wide, strict=True)]
    return [each if each.shape == matrix.shape else each.mT for each, matrix in zip(found, matrices, strict=True)]


def newton_schulz(values: Tensor, steps: int, coefficients: tuple[float, float, float] = NEWTON_SCHULZ) -> Tensor:
    """Return what `steps` iterations make of singular `values`, 0 ... 1, any shape: the polynomial, again and again."""
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each convolution's filters is orthogonalised.

    torch.optim.Muon takes matrices only. A filter bank (K, C, 3, 3) counts as a matrix (K, 9 C). Source: as
    `orthogonalise`, and airbench94_muon for the norm of sqrt(K).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        """Take filter banks of shape (K, C, H, W)."""
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all filter banks."""
        for group in self.param_groups:
            filters, rate = group["params"], group["lr"]
            updates = orthogonalise_all([each.flatten(1) for each in self._nesterov(filters, group["momentum"])])
            for p, norm, update in zip(filters, torch._foreach_norm(filters), updates, strict=True):
                p.mul_(len(p) ** 0.5 / norm)
                p.sub_((rate * update.to(p.dtype)).view_as(p))

    def _nesterov(self, filters: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        gradients, averages = [], []
        for p in filters:
            assert p.grad is not None
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradients.append(p.grad)
            averages.append(self.state[p]["momentum_buffer"])
        # A GPU does each of these for all filters in one kernel.
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, gradients)
        return torch._foreach_add(gradients, averages, alpha=momentum)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the recipe's optimisers; each parameter group has its `peak_lr`, and those of the whitening bias
    `stop_epoch`.

    Weights and biases are groups of their own. Under `muon` the convolutions' filters are Muon's, the rest SGD's, and
    batch norm's scales, where they are learned, go with its biases.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = [p for name, p in trained.items() if not name.endswith("bias")]
    whitening = [p for name, p in trained.items() if name.endswith("whiten.bias")]
    biases = [p for name, p in trained.items() if name.endswith("bias") and not name.endswith("whiten.bias")]
    filters = [p for p in weights if p.ndim == 4] if recipe.optimizer == "muon" else []
    # Beside Muon `peak_lr` is the rate of the head alone, at which scales end training within a few steps.
    scales = [p for p in weights if p.ndim == 1] if recipe.optimizer == "muon" else []
    others = [p for p in weights if not any(p is taken for taken in (*filters, *scales))]
    slow = {"lr": recipe.peak_lr, "weight_decay": recipe.weight_decay}
    fast = {
        "lr": recipe.peak_lr * recipe.bias_lr_scale,
        "weight_decay": recipe.weight_decay * recipe.bias_weight_decay_scale,
    }
    groups: list[dict[str, Any]] = [{"params": others, **slow}, {"params": [*biases, *scales], **fast}]
    if whitening:
        groups.append({"params": whitening, **fast, "stop_epoch": recipe.whitening_bias_epochs})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    ]
    if filters:
        optimizers.append(Muon(filters, lr=recipe.muon_lr, momentum=recipe.muon_momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], schedule: PiecewiseLinear, epoch: float) -> None:
    """Set every group's learning rate for the time `epoch`, in epochs and fractions; one that is a tensor in place."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            share = schedule(epoch)
            if "stop_epoch" in group:  # its own straight line down to zero
                share = max(0.0, 1 - epoch / group["stop_epoch"]) if group["stop_epoch"] else 0.0
            rate = group["peak_lr"] * share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def keep_learning_rates_on(device: torch.device, optimizers: list[torch.optim.Optimizer]) -> None:
    """Turn every group's learning rate into a number in the memory of `device`: a recorded step reads it from there."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


def fuse(optimizers: list[torch.optim.Optimizer]) -> None:
    """Have torch's own optimisers step with one kernel a group; only that one reads a learning rate on a GPU."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"] = True
