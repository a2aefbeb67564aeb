"""An average that is kept beside the network and never written back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifar_fast.training.averaging import EMA


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def shift(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += by


@given(st.floats(0.01, 0.99), st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_it_is_the_closed_formula(decay: float, shifts: list[float]) -> None:
    model = network()
    ema = EMA(model, decay)
    history = [copy.deepcopy(model.state_dict())]
    for by in shifts:
        shift(model, by)
        ema.update(model)
        history.append(copy.deepcopy(model.state_dict()))
    # decay^n of the start, (1 - decay) decay^(n - i) of the i-th weights.
    n = len(shifts)
    shares = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
    assert sum(shares) == pytest.approx(1)
    for name, average in ema.model.state_dict().items():
        if average.is_floating_point():
            expected = sum(share * weights[name] for share, weights in zip(shares, history, strict=True))
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-4)


def test_it_never_writes_back() -> None:
    model = network()
    ema = EMA(model, 0.5)
    shift(model, 1.0)
    before = copy.deepcopy(model.state_dict())
    ema.update(model)
    shift(ema.model, 7.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_statistics_are_averaged_and_counters_copied() -> None:
    model = network()
    ema = EMA(model, 0.75)
    model(torch.randn(8, 3, 6, 6) * 3 + 2)
    start = copy.deepcopy(ema.model[1].state_dict())
    ema.update(model)
    for name in ("running_mean", "running_var"):
        expected = 0.75 * start[name] + 0.25 * model[1].get_buffer(name)
        torch.testing.assert_close(ema.model[1].get_buffer(name), expected)
    assert ema.model[1].get_buffer("num_batches_tracked") == 1


def test_the_average_is_not_trained() -> None:
    assert not any(p.requires_grad for p in EMA(network(), 0.9).model.parameters())


def test_decay_zero_follows_and_decay_one_stays() -> None:
    for decay, followed in ((0.0, True), (1.0, False)):
        model = network()
        ema = EMA(model, decay)
        shift(model, 1.0)
        ema.update(model)
        assert torch.allclose(ema.model[0].weight, model[0].weight) == followed
