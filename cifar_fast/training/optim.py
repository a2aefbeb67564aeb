"""Optimisers and what drives them: schedules, parameter groups, Nesterov SGD, Muon."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar_fast.recipe import Recipe
from cifar_fast.training.layers import whitening_layer


@dataclass(frozen=True)
class PiecewiseLinear:
    """A schedule as a value: straight lines through `(knots[i], values[i])`, constant before and after them."""

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, t: float) -> float:
        """Return the value at `t`; where two knots coincide, the later one counts from there on."""
        return float(np.interp(t, self.knots, self.values))


def lr_schedule(recipe: Recipe) -> PiecewiseLinear:
    """Return the learning rate, as a share of its peak, over time in epochs.

    It rises, decays (with two slopes, if the recipe says so), and stays flat at the end.
    """
    bend = ((recipe.epochs * recipe.bend_fraction, recipe.bend_lr_fraction),) if recipe.bend_fraction else ()
    points = (
        (0.0, recipe.start_lr_fraction),
        (recipe.epochs * recipe.warmup_fraction, 1.0),
        *bend,
        (recipe.epochs - recipe.flat_epochs, recipe.final_lr_fraction),
    )
    return PiecewiseLinear(tuple(t for t, _ in points), tuple(value for _, value in points))


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic: a steep slope at zero instead of convergence to 1. Source: see `orthogonalise`."""


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 3) -> Tensor:
    """Return the matrices, (B, m, n), with singular values brought near 1 by `steps` Newton-Schulz iterations.

    The coefficients of the quintic favour a steep slope at zero over convergence, so the singular values end between
    about 0.5 and 1.5. Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = _iterated(_shrunk(wide), steps)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def _shrunk(matrices: Tensor) -> Tensor:
    """Return the matrices, (B, m, n), with no singular value above 1."""
    return matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)


def _iterated(x: Tensor, steps: int = 3) -> Tensor:
    """Return matrices (B, m, n), m <= n, none with a singular value above 1, after `steps` Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT  # (B, m, m): the smaller of the two products
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Return `orthogonalise` of each of `matrices`, (m, n), whose shapes may differ.

    A GPU takes all of them in one batch, because many small kernels cost it more than the arithmetic. A CPU takes those
    of one shape together. Under autocast it keeps them in 16 bits throughout: converting the operands of each product
    would take as long as the product.
    """
    if matrices[0].is_cuda:
        return orthogonalise_padded(matrices)
    if torch.is_autocast_enabled("cpu"):
        matrices = [matrix.to(torch.get_autocast_dtype("cpu")) for matrix in matrices]
    return orthogonalise_by_shape(matrices)


def orthogonalise_by_shape(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalise the matrices of each shape together."""
    places: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        places[matrix.shape].append(place)
    found = list(matrices)
    for same in places.values():
        for place, update in zip(same, orthogonalise(torch.stack([matrices[i] for i in same])), strict=True):
            found[place] = update
    return found


def orthogonalise_padded(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalise all matrices in one batch, padded with zeros, which stay zero and add nothing to any product.

    Under autocast they are first divided by their norms, since float16 might not hold them as they come, and then stay
    in 16 bits.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    rows, columns = (max(matrix.shape[side] for matrix in wide) for side in (0, 1))
    padded = wide[0].new_zeros(len(wide), rows, columns)
    for place, matrix in zip(padded, wide, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    device = padded.device.type
    shrunk = _shrunk(padded)
    if torch.is_autocast_enabled(device):
        shrunk = shrunk.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        orthogonal = _iterated(shrunk)
    found = [each[: m.shape[0], : m.shape[1]] for each, m in zip(orthogonal, wide, strict=True)]
    return [each if each.shape == matrix.shape else each.mT for each, matrix in zip(found, matrices, strict=True)]


def newton_schulz(values: Tensor, steps: int, coefficients: tuple[float, float, float] = NEWTON_SCHULZ) -> Tensor:
    """Apply the polynomial of the iteration `steps` times to singular `values`, 0 ... 1, of any shape."""
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


class VelocitySGD(torch.optim.Optimizer):
    """Nesterov SGD with the learning rate inside the velocity.

        u = lr (g + weight_decay w),   v <- momentum v + u,   w <- w - u - momentum v

    In `torch.optim.SGD` the velocity adds up plain gradients, and the rate of the current step multiplies them all.
    Here each gradient keeps the rate of the step it came from. The two are equal while the rate is constant; while it
    rises, torch's form runs ahead. Sources: David Page's code, cifar10-fast, 2019, and Apple's, ml-cifar-10-faster,
    2019.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            learned = [p for p in group["params"] if p.grad is not None]
            if not learned:
                continue
            for p in learned:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in learned]
            # A GPU computes each of these for all parameters in one kernel.
            updates = torch._foreach_add([p.grad for p in learned], learned, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, group["lr"])
            if learned[0].is_cuda:  # what follows is torch's SGD at a rate of 1, for which a GPU has one kernel
                torch._fused_sgd_(
                    learned, updates, velocities, weight_decay=0.0, momentum=group["momentum"], lr=1.0, dampening=0.0,
                    nesterov=True, maximize=False, is_first_step=False,
                )  # fmt: skip
                continue
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(updates, velocities, alpha=group["momentum"])
            torch._foreach_sub_(learned, updates)


def as_matrix(bank: Tensor) -> Tensor:
    """Return a filter bank (K, C, H, W) as a matrix (K, C H W).

    On a GPU its columns have the order that channels_last has in memory, so nothing is copied: the order of the columns
    does not change what `orthogonalise` does to each.
    """
    return (bank.permute(0, 2, 3, 1) if bank.is_cuda else bank).flatten(1)


def as_bank(matrix: Tensor, bank: Tensor) -> Tensor:
    """Return what `as_matrix` made of a filter bank in the shape of that `bank`."""
    k, c, h, w = bank.shape
    return matrix.view(k, h, w, c).permute(0, 3, 1, 2) if bank.is_cuda else matrix.view_as(bank)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update of each filter bank, which first gets the norm sqrt(K).

    `torch.optim.Muon` accepts only matrices; here a filter bank (K, C, H, W) counts as a matrix (K, C H W). Sources:
    the one of `orthogonalise`; airbench94_muon for the norm.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def update(self, *arguments: Any) -> None:
        """Call `move_banks`; a compiled function can take this one's place."""
        move_banks(*arguments)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all filter banks."""
        for group in self.param_groups:
            gradients, averages = [], []
            for p in group["params"]:
                assert p.grad is not None
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients.append(p.grad)
                averages.append(self.state[p]["momentum_buffer"])
            self.update(group["params"], gradients, averages, group["lr"], group["momentum"])


@torch.no_grad()
def move_banks(
    banks: list[Tensor], gradients: list[Tensor], averages: list[Tensor], lr: float | Tensor, momentum: float
) -> None:
    """Move filter banks (K, C, H, W) by one step of `Muon`, and the averages of their gradients with them."""
    # A GPU computes each operation on a list in one kernel.
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, gradients)
    nesterov = torch._foreach_add(gradients, averages, alpha=momentum)
    updates = orthogonalise_all([as_matrix(each) for each in nesterov])
    moves = [torch.empty_like(p).copy_(as_bank(each, p)) for p, each in zip(banks, updates, strict=True)]
    norms = torch._foreach_reciprocal(torch._foreach_norm(banks))
    scales = torch.stack(torch._foreach_mul(norms, [len(p) ** 0.5 for p in banks]))
    # Zeros, and numbers so small that their norm underflows, cannot be scaled: the update alone moves them.
    scales.nan_to_num_(nan=math.nan, posinf=1.0)
    torch._foreach_mul_(banks, scales.unbind())
    torch._foreach_mul_(moves, lr)
    torch._foreach_sub_(banks, moves)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the recipe's optimisers: SGD, and with `muon` a second one for the filters of the convolutions.

    Each parameter group has its `peak_lr`; the group of the whitening bias also has a `stop_epoch`.
    """
    learned = _by_group(model, muon=recipe.optimizer == "muon")
    weight_rates = {"lr": recipe.peak_lr, "weight_decay": recipe.weight_decay}
    bias_rates = {
        "lr": recipe.peak_lr * recipe.bias_lr_scale,
        "weight_decay": recipe.weight_decay * recipe.bias_weight_decay_scale,
    }
    groups: list[dict[str, Any]] = [
        {"params": learned["weights"], **weight_rates},
        {"params": learned["biases"], **bias_rates},
    ]
    if learned["whitening bias"]:
        stop = recipe.whitening_bias_epochs
        groups.append({"params": learned["whitening bias"], **bias_rates, "stop_epoch": stop})
    sgd: torch.optim.Optimizer
    if recipe.lr_in_velocity:
        sgd = VelocitySGD(groups, momentum=recipe.momentum)
    else:
        sgd = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    optimizers: list[torch.optim.Optimizer] = [sgd]
    if learned["filters"]:
        optimizers.append(Muon(learned["filters"], lr=recipe.muon_lr, momentum=recipe.muon_momentum))
    for group in _groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def _by_group(model: nn.Module, *, muon: bool) -> dict[str, list[nn.Parameter]]:
    """Return the learned parameters by the group they belong to; `filters` is Muon's and empty without it."""
    learned: dict[str, list[nn.Parameter]] = {"weights": [], "biases": [], "whitening bias": [], "filters": []}
    whitening = whitening_layer(model)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if whitening is not None and p is whitening.bias:
            group = "whitening bias"
        elif name.endswith("bias"):
            group = "biases"
        elif muon and p.ndim == 4:
            group = "filters"
        elif muon and p.ndim == 1:
            # A scale of batch norm. Beside Muon, `peak_lr` is tuned for the head and ruins scales in a few steps.
            group = "biases"
        else:
            group = "weights"
        learned[group].append(p)
    return learned


def _groups(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups


def recipe_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return `build_optimizers`, fused if the model is on a GPU."""
    optimizers = build_optimizers(model, recipe)
    if next(model.parameters()).is_cuda:
        fuse(optimizers)
    return optimizers


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], schedule: Callable[[float], float], epoch: float
) -> None:
    """Set every group's learning rate for the time `epoch`, in epochs and fractions; a rate that is a tensor keeps its
    place in memory.
    """
    share = schedule(epoch)
    for group in _groups(optimizers):
        rate = group["peak_lr"] * (_share_until(group["stop_epoch"], epoch) if "stop_epoch" in group else share)
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _share_until(stop_epoch: float, epoch: float) -> float:
    """Return a share that decays linearly from 1 at epoch 0 to 0 at `stop_epoch`."""
    return max(0.0, 1 - epoch / stop_epoch) if stop_epoch else 0.0


def keep_learning_rates_on(device: torch.device, optimizers: list[torch.optim.Optimizer]) -> None:
    """Turn every group's learning rate into a number in the memory of `device`, where a captured step reads it."""
    for group in _groups(optimizers):
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


def fuse(optimizers: list[torch.optim.Optimizer]) -> None:
    """Have torch's own optimisers step with one kernel per group; only fused ones read a learning rate on a GPU."""
    for group in _groups(optimizers):
        if "fused" in group:
            group["fused"] = True
