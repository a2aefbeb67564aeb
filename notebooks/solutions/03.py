"""Solutions of the exercises in notebook 03."""

import math

import torch

# %% 03.1


def first_missing(dtype):
    number = 1
    while torch.tensor(number + 1, dtype=torch.float64).to(dtype).double() == number + 1:
        number *= 2  # all numbers up to a power of two exist if the one after it does
    return number + 1


# %% 03.2


def best_scale(gradients):
    largest = max(gradient.abs().max().item() for gradient in gradients)
    return 2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / largest))


# %% 03.3


def round_stochastically(x, generator):
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
