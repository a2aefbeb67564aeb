"""Solutions of the exercises in notebook 02."""

import torch

# %% 02.1


def draw_offsets(n_images, padding, generator):
    return torch.randint(0, 2 * padding + 1, (n_images,), generator=generator)  # the upper end is excluded


# %% 02.2


def cutout(images, tops, lefts, size):
    rows = torch.arange(images.shape[2])[None, :, None]  # (1, H, 1)
    columns = torch.arange(images.shape[3])[None, None, :]  # (1, 1, W)
    tops, lefts = tops[:, None, None], lefts[:, None, None]  # (N, 1, 1)
    inside = (rows >= tops) & (rows < tops + size) & (columns >= lefts) & (columns < lefts + size)  # (N, H, W)
    return images.masked_fill(inside[:, None], 0)


# %% 02.3


def balanced_flips(n_images, epochs, generator):
    first = torch.zeros(n_images, dtype=torch.bool)
    first[torch.randperm(n_images, generator=generator)[: n_images // 2]] = True
    odd = torch.arange(epochs) % 2 == 1  # (epochs,)
    return first[None] ^ odd[:, None]
