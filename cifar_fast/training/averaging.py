"""Averages of a network's weights over time: an EMA, which leaves the network alone, and Lookahead, which moves it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cifar_fast.training.model import Network, tensors


class EMA:
    """An exponential moving average of all floating-point weights and statistics of a network.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(self, model: Network, decay: float) -> None:
        """Start from the weights of `model`; each `update` keeps `decay` of the average, 0 ... 1."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Network) -> None:
        """Move the average towards the weights that `model` has now."""
        for average, value in zip(tensors(self.model), tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)


class Lookahead:
    """Slow weights that follow the trained, fast ones, which then restart from the slow ones.

    Unlike an EMA it changes the training. Source: Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps
    forward, 1 step back", arXiv 1907.08610.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        """Start the slow weights at those of `model`; each `move` covers the share `alpha` of the way, 0 ... 1."""
        self.model, self.alpha = model, alpha
        self.slow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def move(self) -> None:
        """Move the slow weights towards the fast ones, and set the fast ones to the result."""
        for slow, fast in zip(self.slow, self.model.parameters(), strict=True):
            slow.lerp_(fast, self.alpha)
            fast.copy_(slow)
