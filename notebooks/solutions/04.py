"""Solutions to the exercises of notebook 04, label smoothing."""

import torch
import torch.nn.functional as F

# %% 04.1


def lowest_loss(smoothing, n_classes):
    target = torch.full((n_classes,), smoothing / n_classes)
    target[0] += 1 - smoothing
    return torch.special.entr(target).sum().item()  # -p log p, and 0 where p is 0


# %% 04.2


def best_temperature(logits, labels):
    temperatures = torch.logspace(-1, 1, 201).tolist()
    losses = [F.cross_entropy(logits / t, labels).item() for t in temperatures]
    return temperatures[losses.index(min(losses))]


# %% 04.3


def grouped_target(labels, groups, smoothing):
    hard = F.one_hot(labels, len(groups)).double()
    same_group = (groups[labels][:, None] == groups).double()  # (N, K)
    return (1 - smoothing) * hard + smoothing * same_group / same_group.sum(1, keepdim=True)
