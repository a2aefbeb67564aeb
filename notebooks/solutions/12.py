# Solutions to the exercises of notebook 12.

import torch


# %% 12.1
def paired_interval(a, b, t):
    differences = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    half_width = t * differences.std() / len(differences) ** 0.5
    return differences.mean() - half_width, differences.mean() + half_width


# %% 12.2
def runs_for_width(share, width, wilson):
    n = 1
    while True:
        low, high = wilson(share * n, n)
        if high - low <= width:
            return n  # 226 for a share of 0.82 and a width of 0.1
        n += 1


# %% 12.3
def visible_difference(deviation, pairs, t):
    noise = torch.randn(50_000, pairs, generator=torch.Generator().manual_seed(0))

    def share_seen(difference):
        found = difference + deviation * noise
        return (found.mean(1).abs() > t * found.std(1) / pairs**0.5).double().mean().item()

    low, high = 0.0, 10 * deviation
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share_seen(middle) < 0.8 else (low, middle)
    return high
