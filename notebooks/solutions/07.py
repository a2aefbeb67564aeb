"""Solutions to the exercises of notebook 07, frozen scales and the biases' learning rate."""


# %% 07.1
def absorb(gamma, beta, alpha, filters):  # number, (C,), number, (K, C, 3, 3) -> new_beta, new_alpha, new_filters
    return beta / gamma, alpha / gamma, filters * gamma


# %% 07.2
def decay_matrices_only(model, lr, weight_decay):  # -> [group, group]
    learned = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learned if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]


# %% 07.3
def factors_of_the_rewriting(gamma):  # -> factor of alpha, of the learning rate, of the weight decay
    return 1 / gamma, 1 / gamma**2, gamma**2
