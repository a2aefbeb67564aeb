"""Solutions of the exercises of notebook 09."""

import numpy as np


# %% 09.1
def apple_schedule(epoch, epochs):
    return np.interp(epoch, [0, epochs / 5, epochs - 2], [0, 1, 0.1])


# %% 09.2
def decoupled_step(weights, gradient, velocity, lr, momentum, weight_decay):
    velocity = momentum * velocity + gradient
    weights = (1 - lr * weight_decay) * weights
    return weights - lr * (gradient + momentum * velocity), velocity


# %% 09.3
def newton_schulz_multiplications(m, n, steps):
    m, n = min(m, n), max(m, n)
    gram, square, product = m * n * m, m * m * m, m * m * n
    return steps * (gram + square + product)
