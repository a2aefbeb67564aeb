"""Solutions to the exercises of notebook 05, activations and the place of max-pool."""

import torch
import torch.nn.functional as F

# %% 05.1


def numbers_read(position, channels, side):
    full, pooled = channels * side**2, channels * (side // 2) ** 2
    norm = pooled if position == "before_norm" else full
    activation = full if position == "after_activation" else pooled
    return norm + activation


# %% 05.2


def commutes_with_max_pool(f):
    y = f(torch.linspace(-10, 10, 10_001))
    return bool((y.diff() >= -1e-6).all())


# %% 05.3


def rising_silu(x):
    grid = torch.linspace(-3, 0, 30_001)
    lowest = grid[F.silu(grid).argmin()]
    return F.silu(x.clamp(min=lowest))
