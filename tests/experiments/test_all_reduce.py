"""The link gives back the published all-reduce times, and a ring sends what the link is charged for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cifar_fast.distributed.ranks import Ranks
from cifar_fast.errors import UserError
from cifar_fast.experiments import all_reduce
from cifar_fast.experiments.all_reduce import (
    ALL_REDUCE_TIMES,
    REPEATS,
    Link,
    all_reduce_task,
    link_all_reduce_seconds,
    published_link,
    ring_all_reduce,
)

LINK = Link("wire", latency_seconds=1e-3, bytes_per_second=1e9, source="made up for a test")


@pytest.mark.parametrize("row", ALL_REDUCE_TIMES, ids=lambda row: f"{row.link}-{row.n_bytes:.0f}")
def test_the_link_gives_the_published_times_back(row):
    link = published_link(row.link)
    found = link_all_reduce_seconds(row.n_bytes, row.n_workers, link)
    assert row.low_seconds <= found <= row.high_seconds or found == pytest.approx(row.low_seconds, rel=1e-9)
    assert found == pytest.approx((row.low_seconds + row.high_seconds) / 2, rel=1e-9)
    assert link.latency_seconds > 0 and link.most_workers == row.n_workers
    assert link.source.startswith(row.source.split(": ")[0]) and row.source.split(": ")[1] in link.source


def test_the_line_through_the_published_times_by_hand():
    link = published_link("nvlink_nccl")
    # Middles 0.085 and 0.13 ms: 0.045 ms for 8 MB more, of which each of 8 workers sends 2 x 7/8.
    assert link.latency_seconds == pytest.approx(0.04e-3)
    assert link.bytes_per_second == pytest.approx(1.75 * 8e6 / 0.045e-3)


def test_an_all_reduce_by_hand():
    assert link_all_reduce_seconds(1e6, 2, LINK) == pytest.approx(1e-3 + 1e-3)
    assert link_all_reduce_seconds(1e6, 4, LINK) == pytest.approx(1e-3 + 1.5e-3)
    assert link_all_reduce_seconds(1e6, 1, LINK) == 0


@pytest.mark.parametrize(("n_workers", "size"), [(2, 6), (3, 7), (8, 64), (8, 5), (1, 4)])
def test_a_ring_sums_and_sends_what_the_link_is_charged_for(n_workers, size):
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=random, dtype=torch.float64) for _ in range(n_workers)]
    total = torch.stack(gradients).sum(0)
    sent = list(ring_all_reduce(gradients))
    assert len(sent) == 2 * (n_workers - 1)
    for gradient in gradients:
        torch.testing.assert_close(gradient, total)
    if size % n_workers == 0:
        charged = link_all_reduce_seconds(size, n_workers, replace(LINK, latency_seconds=0.0, bytes_per_second=1.0))
        assert sum(sent) == pytest.approx(charged)


def test_an_unknown_link_names_those_there_are():
    with pytest.raises(UserError, match="'string'.*nvlink_nccl, nvlink_multicast"):
        published_link("string")


def test_the_task_of_a_rank_times_the_average_of_its_gradients(monkeypatch):
    rank = Ranks()
    calls = []
    monkeypatch.setattr(
        rank, "average_gradients", lambda network, **options: calls.append((network[0].grad.numel(), options))
    )
    assert all_reduce_task(rank, 1000, True) > 0
    assert calls == [(1000, {"half_precision": True})] * (1 + REPEATS)


def test_one_core_has_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(all_reduce, "cores", lambda: 1)
    assert all_reduce.measure_all_reduce(1000, precision="float32", device="cpu") is None
