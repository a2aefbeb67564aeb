"""Processes do what they are told; when one fails, it is named, within the timeout, and none stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tasks
import torch

from cifar_fast.distributed import processes as workers
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.errors import RankError, RecipeError, UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as Linux and macOS have them")


@pytest.fixture(scope="module")
def four() -> Iterator[WatchedProcesses]:
    with WatchedProcesses(4, device="cpu", backend="gloo") as started:
        yield started


def wait_until(condition, seconds: float = 60.0) -> bool:
    """Wait generously for what must come; a test fails by the condition, never by being slow."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def gone(pids: list[int]) -> bool:
    def ended(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(ended, pids))


def test_every_rank_answers_and_all_agree(four):
    answers = four.call(tasks.add_ranks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert answers == [(rank, 7, 6.0, max(1, cores // 4)) for rank in range(4)]


def test_messages_arrive_while_the_task_runs(four):
    heard: list[tuple[int, str]] = []
    assert four.call(tasks.tell_twice, "hello", on_message=lambda *message: heard.append(message)) == ["hello"] * 4
    for rank in range(4):
        assert [text for number, text in heard if number == rank] == [f"hello {rank}", f"hello again {rank}"]


def test_a_warning_is_given_once_in_the_caller(four):
    with pytest.warns(UserWarning) as caught:
        four.call(tasks.warn)
    assert [str(warning.message) for warning in caught] == ["a warning of rank 0"]


@pytest.mark.parametrize(("half_precision", "scale"), [(False, 1.0), (False, 512.0), (True, 512.0)])
def test_gradients_become_their_mean(four, half_precision, scale):
    results = four.call(tasks.average, half_precision, scale)
    assert all(result == results[0] for result in results)  # bit for bit
    shapes = [(4, 3, 3, 3), (4,), (2, 5), (2,), (1, 1)]
    *means, none = results[0]
    assert none is None
    for shape, mean in zip(shapes, means, strict=True):
        expected = torch.stack([tasks.gradient(torch.Size(shape), rank) for rank in range(4)]).mean(0)
        tolerance = 2e-10 if half_precision else 1e-15  # a float16 has 11 bits, and 512 * 1e-8 is among its subnormals
        torch.testing.assert_close(torch.tensor(mean), expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(("half_precision", "scale"), [(False, 1.0), (True, 512.0)])
def test_gradients_in_one_buffer_get_the_same_means(four, half_precision, scale):
    assert four.call(tasks.average_in_one_buffer, half_precision, scale) == [True] * 4


def test_statistics_become_their_mean(four):
    assert four.call(tasks.average_statistics) == [([1.5, 1.5], [15.0, 15.0])] * 4


def test_all_start_from_the_weights_of_rank_0(four):
    assert four.call(tasks.copy_from_main) == [[1.0] * 54] * 4


def test_nothing_listens_but_on_the_loopback_interface(four):
    listening = [
        connection.laddr.ip
        for pid in four.pids
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening, "four processes that talk have to listen somewhere"
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_meeting_place_is_private(four):
    assert four.folder.stat().st_mode & 0o777 == 0o700


def test_close_leaves_nothing():
    with WatchedProcesses(2, device="cpu", backend="gloo") as pair:
        pids, folder = pair.pids, pair.folder
        assert not gone(pids) and folder.exists()
    assert gone(pids) and not folder.exists()
    with pytest.raises(RankError, match="have ended; start new ones"):
        pair.call(tasks.add_ranks)


FAULTS = {
    "raise": r"rank 1 failed:.*Traceback.*tasks\.py.*ZeroDivisionError: thrown on purpose",
    "raise what cannot travel": r"rank 1 failed:.*Stubborn",
    "kill": "rank 1 was ended by SIGKILL while working; the system does that when memory runs out$",
    "exit 0": "rank 1 exited with status 0 without a result while working",
    "sys.exit": r"rank 1 failed:.*SystemExit: 0",
    "stop": "rank 1 has stopped answering",
    "sleep": "rank 1 has hung",
    "spin": "rank 1 has hung",
    "sleep at the end": "rank 1 has hung",
    "memory": "rank 1 failed:.*(memory|alloc)",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_rank_that_fails_is_named_and_ends_all(how):
    if how == "memory" and sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    started = WatchedProcesses(3, device="cpu", backend="gloo", timeout=3.0)
    pids, folder = started.pids, started.folder
    with pytest.raises(RankError) as caught:
        started.call(tasks.fail, how, 1)
    assert re.search(FAULTS[how], str(caught.value), re.DOTALL), str(caught.value)
    assert gone(pids) and not folder.exists()


def test_a_slow_rank_has_not_hung():
    with WatchedProcesses(2, device="cpu", backend="gloo", timeout=2.0) as pair:
        # Set-up may take long; after it a step of 2.5 s is no sign of a hang where one has taken 1 s before.
        assert pair.call(tasks.take_turns_being_slow, 1.0, 2.5) == ["done", "done"]


class Situation:
    """Ranks as their caller knows them, without any process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
        monkeypatch.setattr(workers, "seconds_in_run_queue", lambda pid: {})
        self.workers = object.__new__(WatchedProcesses)
        self.workers.timeout, self.workers.device = 10.0, device
        self.workers._processes = [SimpleNamespace(exitcode=None, pid=0)] * 2
        self.ranks = [workers._Rank(number) for number in range(2)]
        for rank in self.ranks:
            rank.heard_at = 0.0

    def after(self, seconds: float, **said: workers._Progress) -> str | None:
        """Return what is found wrong when `seconds` have passed and the ranks named have said this in the end."""
        for rank in self.ranks:
            rank.live(seconds, pid=0)
            if (progress := said.get(f"rank{rank.number}")) is not None:
                rank.hear("alive", progress)
        try:
            self.workers._raise_failure(self.ranks, "working")
        except RankError as error:
            return str(error)
        return None


def at_work(ticks: int, longest_work: float = 0.1) -> workers._Progress:
    return workers._Progress(ticks, waiting=False, settled=True, longest_work=longest_work)


def waiting(ticks: int, longest_work: float = 0.1) -> workers._Progress:
    return workers._Progress(ticks, waiting=True, settled=True, longest_work=longest_work)


def test_silence_is_noticed_in_time_to_end_all_within_the_timeout(monkeypatch):
    silent = Situation(monkeypatch)
    assert silent.after(7.9, rank0=at_work(1)) is None
    assert "rank 1 has stopped answering" in str(silent.after(0.2, rank0=at_work(2)))


def test_a_hang_is_noticed_in_time_to_end_all_within_the_timeout(monkeypatch):
    hung = Situation(monkeypatch)
    assert hung.after(0.5, rank0=waiting(9), rank1=at_work(8)) is None
    assert hung.after(7.9, rank0=waiting(9), rank1=at_work(8)) is None
    assert "rank 1 has hung: it has done nothing for 8 s, and the others" in str(
        hung.after(0.2, rank0=waiting(9), rank1=at_work(8))
    )


def test_a_step_as_long_as_others_were_is_no_hang(monkeypatch):
    slow = Situation(monkeypatch)
    slow.after(0.5, rank0=waiting(9, 20.0), rank1=at_work(8, 18.0))
    for _ in range(59):
        assert slow.after(1.0, rank0=waiting(9, 20.0), rank1=at_work(8, 18.0)) is None
    assert "rank 1 has hung" in str(slow.after(1.1, rank0=waiting(9, 20.0), rank1=at_work(8, 18.0)))


def test_both_at_work_is_no_hang_on_a_cpu_and_may_be_one_on_a_gpu(monkeypatch):
    for device in ("cpu", "cuda"):
        both = Situation(monkeypatch, device)
        both.after(0.5, rank0=at_work(9), rank1=at_work(8))
        assert ("rank 1 has hung" in str(both.after(8.1, rank0=at_work(9), rank1=at_work(8)))) == (device == "cuda")


def test_setting_up_may_take_long(monkeypatch):
    fresh = workers._Progress(3)
    start = Situation(monkeypatch)
    start.after(0.5, rank0=fresh, rank1=fresh)
    for _ in range(int(workers.START_SECONDS)):
        assert start.after(1.0, rank0=fresh, rank1=fresh) is None
    assert "has hung: it has done nothing for 301 s while working" in str(start.after(1.0, rank0=fresh, rank1=fresh))


def test_the_first_to_fail_is_named_not_the_one_that_lost_it(monkeypatch):
    failing = Situation(monkeypatch)
    failing.ranks[0].hear("failed", workers._Failure(None, "lost rank 1", waiting=True))
    assert failing.after(0.1) is None  # another one's failure is about to show
    failing.ranks[1].hear("failed", workers._Failure(None, "thrown", waiting=False))
    assert "rank 1 failed:\nthrown" in str(failing.after(0.1))


@pytest.mark.parametrize("timeout", [0.0, 1.9, float("nan")])
def test_a_timeout_shorter_than_what_ranks_need_to_answer(timeout):
    with pytest.raises(UserError, match="must be at least 2 seconds"):
        WatchedProcesses(2, device="cpu", backend="gloo", timeout=timeout)


def test_a_rank_that_gets_no_core_is_slow_not_silent(monkeypatch):
    rank = workers._Rank(0)
    queued = {"1": 5.0, "2": 7.0}
    monkeypatch.setattr(workers, "seconds_in_run_queue", lambda pid: dict(queued))
    rank.live(0.25, pid=1)  # what it waited before the task does not count
    assert rank.clock == pytest.approx(0.25)
    queued["2"] += 0.2
    rank.live(0.25, pid=1)
    assert rank.clock == pytest.approx(0.30)
    queued.update({"1": 9.0, "3": 100.0})  # a thread that is new, and one that waited longer than we looked away
    rank.live(0.25, pid=1)
    assert rank.clock == pytest.approx(0.30)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell who waits for a core")
def test_the_wait_for_a_core_is_read():
    before = workers.seconds_in_run_queue(os.getpid())
    assert str(threading.get_native_id()) in before and all(seconds >= 0 for seconds in before.values())
    assert workers.seconds_in_run_queue(2**30) == {}


def test_a_mistake_for_people_stays_one():
    started = WatchedProcesses(2, device="cpu", backend="gloo")
    pids = started.pids
    with pytest.raises(RecipeError, match="a mistake to mend"):
        started.call(tasks.fail, "raise for people", 1)
    assert gone(pids)


def test_an_exception_in_the_callback_ends_all():
    started = WatchedProcesses(2, device="cpu", backend="gloo")
    pids = started.pids

    def on_message(rank: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        started.call(tasks.tell_twice, "hello", on_message=on_message)
    assert gone(pids)


def test_workers_outlive_the_thread_that_started_them():
    started: list[WatchedProcesses] = []
    thread = threading.Thread(target=lambda: started.append(WatchedProcesses(2, device="cpu", backend="gloo")))
    thread.start()
    thread.join()
    with started[0] as pair:
        assert [rank for rank, *_ in pair.call(tasks.add_ranks)] == [0, 1]


def test_a_function_of_a_notebook_is_refused(four, monkeypatch):
    def cell() -> None: ...

    monkeypatch.setattr(cell, "__module__", "__main__")
    with pytest.raises(UserError, match="put it into a module"):
        four.call(cell)


# A caller without a guard, as a script or a notebook has it: it may not be run again in the processes it starts.
CALLER = """
import sys, time
sys.path[:0] = {path!r}
from cifar_fast.workers import WatchedProcesses
import tasks
started = WatchedProcesses(2, device="cpu", backend="gloo")
print("pids", *started.pids, started.folder, flush=True)
started.call(tasks.fail, "sleep", -1)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_caller(how, tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])]))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as caller:
        assert caller.stdout is not None and caller.stderr is not None
        word, *numbers, folder = caller.stdout.readline().split()
        pids = [int(number) for number in numbers]
        assert word == "pids" and len(pids) == 2 and not gone(pids)
        if sys.platform == "linux":  # Ctrl-C is the caller's alone, in a process's first launch as in later ones
            masks = [re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
            assert all(mask and int(mask[1], 16) >> (signal.SIGINT - 1) & 1 for mask in masks)
        if how == signal.SIGINT:  # Ctrl-C in a terminal reaches every process of the group
            os.killpg(caller.pid, how)
        else:
            caller.send_signal(how)
        errors = caller.stderr.read()
        caller.wait()
    assert wait_until(lambda: gone(pids))
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1 and not Path(folder).exists(), errors
    else:
        assert errors == ""


def test_a_stopped_process_does_not_outlive_its_caller_either(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux kills with the parent")
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])]))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pids = [int(number) for number in caller.stdout.readline().split()[1:-1]]
        os.kill(pids[0], signal.SIGSTOP)
        caller.kill()
    assert wait_until(lambda: gone(pids))


def test_what_killed_callers_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, recent = tmp_path / f"{workers.MEETING_PREFIX}old", tmp_path / f"{workers.MEETING_PREFIX}new"
    held = tmp_path / f"{workers.MEETING_PREFIX}held"
    for folder in (left, recent, held):
        folder.mkdir()
    for folder in (left, held):
        os.utime(folder, (0, 0))
    with workers.FileLock(held / "held"):
        os.utime(held, (0, 0))
        workers._remove_left_over()
        assert not left.exists() and recent.exists() and held.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_launches_at_the_same_moment_do_not_collide():
    answers: list[list] = []

    def launch() -> None:
        with WatchedProcesses(2, device="cpu", backend="gloo", timeout=400.0) as pair:
            answers.append([rank for rank, *_ in pair.call(tasks.add_ranks)])

    main = sys.modules["__main__"]
    threads = [threading.Thread(target=launch) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[0, 1]] * 20
    assert sys.modules["__main__"] is main
