"""A rank that died, raised, went silent or hung is told from one that is slow; no process and no clock needed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cifar_fast.distributed import failures
from cifar_fast.distributed.failures import Failure, Progress, RankState, find_failure
from cifar_fast.errors import RankError, RecipeError


class Situation:
    """Two ranks as their caller knows them, with a timeout of 10 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str = "cpu", *, doing: str = "working") -> None:
        monkeypatch.setattr(failures, "seconds_in_run_queue", lambda pid: {})
        self.device, self.doing = device, doing
        self.ranks = [RankState(rank, heartbeat=doing == "working") for rank in range(2)]

    def after(self, seconds: float, *reports: Progress) -> str:
        """Return the error found when `seconds` have passed and then the ranks, rank 0 first, sent these reports."""
        for rank in self.ranks:
            rank.advance_clock(seconds, pid=0)
        for rank, progress in zip(self.ranks, reports, strict=False):
            rank.note("heartbeat", progress)
        error = find_failure(self.ranks, doing=self.doing, timeout=10.0, device=self.device)
        assert error is None or isinstance(error, RankError)
        return str(error or "")


def at_work(ticks: int, longest_work: float = 0.1) -> Progress:
    return Progress(ticks, waiting=False, settled=True, longest_work=longest_work)


def waiting(ticks: int, longest_work: float = 0.1) -> Progress:
    return Progress(ticks, waiting=True, settled=True, longest_work=longest_work)


def test_silence_is_noticed_in_time_to_end_all_within_the_timeout(monkeypatch):
    silent = Situation(monkeypatch)
    assert silent.after(7.9, at_work(1)) == ""
    assert "rank 1 has stopped answering: it sent nothing for 8 s (timeout=10)" in silent.after(0.2, at_work(2))


def test_nobody_is_silent_while_ranks_start(monkeypatch):
    starting = Situation(monkeypatch, doing="starting")
    assert starting.after(failures.START_SECONDS) == ""
    assert "rank 0 has hung: no progress for 301 s while starting" in starting.after(1.0)


def test_a_hang_is_noticed_in_time_to_end_all_within_the_timeout(monkeypatch):
    hung = Situation(monkeypatch)
    assert hung.after(0.5, waiting(9), at_work(8)) == ""
    assert hung.after(7.9, waiting(9), at_work(8)) == ""
    error = hung.after(0.2, waiting(9), at_work(8))
    assert "rank 1 has hung: no progress for 8 s, and the others wait for it" in error
    assert "raise timeout=10" in error


def test_a_rank_that_hangs_after_the_others_are_done_is_noticed(monkeypatch):
    last = Situation(monkeypatch)
    last.after(0.5, at_work(9), at_work(8))
    last.ranks[0].note("done", 1)
    assert last.after(7.9) == ""
    last.ranks[1].note("heartbeat", at_work(8))
    assert "rank 1 has hung" in last.after(0.2)


def test_a_step_up_to_three_times_as_long_as_an_earlier_one_is_no_hang(monkeypatch):
    slow = Situation(monkeypatch)
    slow.after(0.5, waiting(9, 20.0), at_work(8, 18.0))
    for _ in range(59):
        assert slow.after(1.0, waiting(9, 20.0), at_work(8, 18.0)) == ""
    assert "rank 1 has hung" in slow.after(1.1, waiting(9, 20.0), at_work(8, 18.0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_at_work_is_no_hang_on_a_cpu_and_may_be_one_on_a_gpu(monkeypatch, device):
    both = Situation(monkeypatch, device)
    both.after(0.5, at_work(9), at_work(8))
    assert ("rank 1 has hung" in both.after(8.1, at_work(9), at_work(8))) == (device == "cuda")


def test_setting_up_may_take_long(monkeypatch):
    fresh = Progress(ticks=3)
    start = Situation(monkeypatch)
    start.after(0.5, fresh, fresh)
    for _ in range(int(failures.START_SECONDS)):
        assert start.after(1.0, fresh, fresh) == ""
    assert "has hung: no progress for 301 s while working" in start.after(1.0, fresh, fresh)


def test_the_first_to_fail_is_named_not_the_one_that_lost_it(monkeypatch):
    failing = Situation(monkeypatch)
    failing.ranks[0].note("failed", Failure(None, "lost rank 1", waiting=True))
    assert failing.after(0.1) == ""  # the rank that it lost is about to show
    failing.ranks[1].note("failed", Failure(None, "thrown", waiting=False))
    assert "rank 1 failed:\nthrown" in failing.after(0.1)


def test_a_rank_that_failed_while_it_waited_is_named_if_no_other_fails(monkeypatch):
    alone = Situation(monkeypatch)
    alone.ranks[0].note("failed", Failure(None, "connection lost", waiting=True))
    alone.ranks[0].failed_at -= failures.AFTERMATH_SECONDS
    assert "rank 0 failed:\nconnection lost" in alone.after(0.1)


def test_a_death_explains_the_failure_of_the_rank_that_waited(monkeypatch):
    died = Situation(monkeypatch)
    died.ranks[0].note("failed", Failure(None, "lost rank 1", waiting=True))
    died.ranks[1].exit_code = 3
    assert died.after(0.1) == "rank 1 exited with status 3 without a message while working"


def test_a_mistake_of_the_user_keeps_its_class(monkeypatch):
    mistaken = Situation(monkeypatch)
    mistaken.ranks[1].note("failed", Failure(RecipeError("a mistake to mend"), "", waiting=False))
    error = find_failure(mistaken.ranks, doing="working", timeout=10.0, device="cpu")
    assert isinstance(error, RecipeError) and str(error) == "a mistake to mend"


def test_a_rank_that_gets_no_core_is_slow_not_silent(monkeypatch):
    rank = RankState(0)
    queued = {"1": 5.0, "2": 7.0}
    monkeypatch.setattr(failures, "seconds_in_run_queue", lambda pid: dict(queued))
    rank.advance_clock(0.25, pid=1)  # waits from before the task do not count
    assert rank.clock == pytest.approx(0.25)
    queued["2"] += 0.2
    rank.advance_clock(0.25, pid=1)
    assert rank.clock == pytest.approx(0.30)
    queued.update({"1": 9.0, "3": 100.0})  # a thread that waited longer than the caller looked away, and a new one
    rank.advance_clock(0.25, pid=1)
    assert rank.clock == pytest.approx(0.30)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not say who waits for a core")
def test_the_wait_for_a_core_is_read():
    before = failures.seconds_in_run_queue(os.getpid())
    assert str(threading.get_native_id()) in before and all(seconds >= 0 for seconds in before.values())
    assert failures.seconds_in_run_queue(2**30) == {}
