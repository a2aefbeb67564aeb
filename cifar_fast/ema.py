"""A running average of a network's weights, kept beside it and never written back."""

from __future__ import annotations

import copy

import torch

from cifar_fast.model import Network


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
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - self.decay)
            else:
                average.copy_(value)
