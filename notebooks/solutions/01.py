"""Solutions to the exercises of notebook 01."""

# %% 01.1


def time_to_accuracy(epochs, target):
    for seconds, accuracy in epochs:
        if accuracy >= target:
            return seconds
    return float("inf")


# %% 01.2


def speed_up(waiting, factor):
    return 1 / (waiting + (1 - waiting) / factor)


# %% 01.3


def overlapped_seconds(waiting, computing):
    ready = done = 0.0
    for wait, compute in zip(waiting, computing, strict=True):
        ready += wait
        done = max(ready, done) + compute
    return done
