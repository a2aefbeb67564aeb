"""Solutions of the exercises in notebook 13."""

import numpy as np
import torch
import torch.nn.functional as F


# %% 13.1
def poly_loss(logits, labels, epsilon):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll + epsilon * (1 - torch.exp(-nll))


# %% 13.2
def some_grey(images, labels, generator, share):
    chosen = torch.rand(len(images), generator=generator).to(images.device) < share
    grey = images.mean(1, keepdim=True)
    return torch.where(chosen[:, None, None, None], grey, images), labels


# %% 13.3
def cosine(epochs):
    def factor(epoch):
        if epoch < 0.5:
            return epoch / 0.5
        return (1 + np.cos(np.pi * (epoch - 0.5) / (epochs - 0.5))) / 2

    return factor
