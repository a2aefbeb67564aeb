"""Solutions of the exercises of notebook 08."""

import torch
import torch.nn.functional as F


# %% 08.1
def directions_needed(variances, share):
    held = variances.cumsum(0) / variances.sum()
    return int((held < share).sum()) + 1


# %% 08.2
def zca_filters(images, size, eps):
    patches = F.unfold(images, size).transpose(0, 1).flatten(1)
    covariance = patches @ patches.T / patches.shape[1]
    variances, directions = torch.linalg.eigh(covariance)
    whiten_and_turn_back = (directions / torch.sqrt(variances + eps)) @ directions.T
    return whiten_and_turn_back.reshape(-1, 3, size, size)


# %% 08.3
@torch.no_grad()
def shift_right_(weight):
    for c in range(min(weight.shape[:2])):
        weight[c] = 0
        weight[c, c, 1, 0] = 1  # the left neighbour of the window's centre
