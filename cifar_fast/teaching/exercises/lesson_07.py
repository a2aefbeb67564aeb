"""The exercises of notebook 07: frozen scales and the biases' learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


@exercise(
    "07.1",
    title="Filters that absorb a scale",
    difficulty=1,
    minutes=5,
    hints=(
        "Write gamma * x + beta as gamma * (x + something). How does the text take gamma through CELU?",
        "celu(gamma * y, alpha) is gamma * celu(y, alpha / gamma). What then stands in front of CELU, the next filters "
        "can take over.",
    ),
    wrong=(
        lambda gamma, beta, alpha, filters: (beta / gamma, alpha, filters * gamma),
        lambda gamma, beta, alpha, filters: (beta, alpha / gamma, filters * gamma),
    ),
)
def absorb(answer: Callable[[float, Tensor, float, Tensor], Any]) -> None:
    """Compare the outputs of the next convolution, with the scale and without it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=generator)
    filters = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=generator)
    beta, alpha = torch.tensor([-0.5, 0.0, 0.5, 1.0]).double(), 0.3
    for gamma in (0.25, 3.0):
        found = answer(gamma, beta, alpha, filters.clone())
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise Wrong("return three things: the bias, the alpha and the filters")
        new_beta, new_alpha, new_filters = found
        expect_close(new_beta, beta / gamma, "the new bias")
        expect_close(new_alpha, alpha / gamma, "the new alpha")
        if new_filters.shape != filters.shape:
            raise Wrong(f"the new filters should have the shape {tuple(filters.shape)}, not {tuple(new_filters.shape)}")
        with_scale = F.conv2d(F.celu(gamma * x + beta[:, None, None], alpha), filters, padding=1)
        without = F.conv2d(F.celu(x + new_beta[:, None, None], float(new_alpha)), new_filters, padding=1)
        expect_close(without, with_scale, "the output of the next convolution")


@exercise(
    "07.2",
    title="Decay for matrices only",
    difficulty=2,
    minutes=10,
    hints=(
        "p.ndim is the number of dimensions of a parameter, and p.requires_grad says whether it is learned.",
        "A group is a dictionary with the keys 'params', 'lr' and 'weight_decay'; the second one has a weight decay "
        "of 0.",
    ),
    wrong=(
        lambda model, lr, weight_decay: [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        ],
        lambda model, lr, weight_decay: [{"params": model.parameters(), "lr": lr, "weight_decay": weight_decay}],
    ),
)
def decay_matrices_only(answer: Callable[[nn.Module, float, float], Any]) -> None:
    """Look where each parameter ended up, and give the groups to torch's SGD."""
    norm = nn.BatchNorm2d(4)
    norm.weight.requires_grad = False
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = answer(model, 0.1, 5e-4)
    if not isinstance(groups, list | tuple) or len(groups) != 2 or not all(isinstance(each, dict) for each in groups):
        raise Wrong("return a list of two groups, each a dictionary")
    optimizer = torch.optim.SGD([dict(group) for group in groups], lr=1.0)
    wanted = (("first", ["0.weight", "4.weight"], 5e-4), ("second", ["0.bias", "1.bias", "4.bias"], 0.0))
    for (which, params, decay), group in zip(wanted, optimizer.param_groups, strict=True):
        there = [names[parameter] for parameter in group["params"]]
        if sorted(there) != params:
            raise Wrong(f"the {which} group of this model should hold {', '.join(params)}, not {', '.join(there)}")
        expect_close(group["lr"], 0.1, f"the learning rate of the {which} group")
        expect_close(group["weight_decay"], decay, f"the weight decay of the {which} group")


@exercise(
    "07.3",
    title="The factors of the rewriting",
    difficulty=2,
    minutes=10,
    hints=(
        "At a scale of 1/4 the factors are 4, 16 and 1/16. Where does each come from?",
        "The biases become 1 / gamma times as large, their gradients gamma times as large: their learning rate has to "
        "make up for both.",
    ),
    wrong=(lambda gamma: (1 / gamma, 1 / gamma, gamma), lambda gamma: (gamma, gamma**2, 1 / gamma**2)),
)
def factors_of_the_rewriting(answer: Callable[[float], Any]) -> None:
    """Compare the three factors for several scales."""
    for gamma in (0.5, 0.25, 2.0):
        found = answer(gamma)
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise Wrong("return three numbers: the factors of alpha, of the learning rate and of the weight decay")
        wanted = (1 / gamma, 1 / gamma**2, gamma**2)
        for what, ours, theirs in zip(("alpha", "the learning rate", "the weight decay"), found, wanted, strict=True):
            expect_close(ours, theirs, f"the factor of {what} for gamma={gamma}")
