"""Processes run tasks; one that fails is named, ends all within the timeout, and none stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tasks
import torch

from cifar_fast.distributed import processes
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import Ranks
from cifar_fast.errors import RankError, RecipeError, UserError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals as Linux and macOS have them"),
    pytest.mark.timeout(600),  # for hangs: on a busy machine a start may take a minute
]


def start(world_size: int, *, timeout: float = 60.0) -> WatchedProcesses:
    return WatchedProcesses(world_size, device="cpu", backend="gloo", timeout=timeout)


@pytest.fixture(scope="module")
def shared() -> Iterator[Callable[[int], WatchedProcesses]]:
    """A function that returns processes for many tests, new ones if an earlier test has lost them."""
    started: dict[int, WatchedProcesses] = {}

    def get(world_size: int) -> WatchedProcesses:
        if world_size not in started or not started[world_size].pids:
            started[world_size] = start(world_size)
        return started[world_size]

    yield get
    for group in started.values():
        group.close()


@pytest.fixture
def pair(shared) -> WatchedProcesses:
    return shared(2)


@pytest.fixture
def four(shared) -> WatchedProcesses:
    return shared(4)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Wait generously for what must come; a test fails because it does not, never because it is slow."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def gone(pids: list[int]) -> bool:
    def ended(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(ended, pids))


# --- what ranks exchange ---


def test_every_rank_answers_and_all_agree(four):
    answers = four.run(tasks.add_ranks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert answers == [(rank, 7, 6.0, max(1, cores // 4)) for rank in range(4)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_values_of_any_size_are_gathered_in_the_order_of_the_ranks(shared, world_size):
    expected = [7, "long " * 1000, None, {"rank": 3}][:world_size]
    assert shared(world_size).run(tasks.gather) == [expected] * world_size


def test_a_single_rank_gathers_its_own_value():
    assert tasks.gather(Ranks()) == [7]


def test_ranks_started_alike_agree(pair):
    assert pair.run(tasks.agree_on_execution, "nothing") == ["direct"] * 2


@pytest.mark.parametrize("different", ["recipe", "data set", "seed"])
def test_a_rank_that_was_started_differently_is_named_on_every_rank(four, different):
    errors = four.run(tasks.agree_on_execution, different)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"rank 3 was started with a different {different} from rank 0: ")
    if different == "seed":
        assert "5, where rank 0 has 0; start all ranks with the same command" in errors[0]


def test_all_ranks_do_without_kernels_that_one_rank_lacks(pair):
    assert pair.run(tasks.agree_with_a_rank_without_kernels) == [("direct", False)] * 2


@pytest.mark.parametrize(("half_precision", "scale"), [(False, 1.0), (False, 512.0), (True, 512.0)])
def test_gradients_become_their_mean(four, half_precision, scale):
    results = four.run(tasks.average, half_precision, scale)
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
    assert four.run(tasks.average_in_one_buffer, half_precision, scale) == [True] * 4


def test_statistics_become_their_mean(four):
    assert four.run(tasks.average_statistics) == [([1.5, 1.5], [15.0, 15.0])] * 4


def test_all_start_from_the_weights_of_rank_0(four):
    assert four.run(tasks.copy_from_main) == [[1.0] * 54] * 4


# --- what reaches the caller, and what listens ---


def test_messages_arrive_while_the_task_runs(four):
    received: list[tuple[int, str]] = []
    answers = four.run(tasks.report_twice, "hello", on_message=lambda *message: received.append(message))
    assert answers == ["hello"] * 4
    for rank in range(4):
        assert [text for number, text in received if number == rank] == [f"hello {rank}", f"hello again {rank}"]


def test_a_warning_is_given_once_in_the_caller(four):
    with pytest.warns(UserWarning) as caught:
        four.run(tasks.warn)
    assert [str(warning.message) for warning in caught] == ["a warning of rank 0"]


def test_nothing_listens_except_on_the_loopback_interface(four):
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


def test_a_function_of_a_notebook_runs_and_what_cannot_travel_is_refused_by_name(pair):
    factor, lock = 10, threading.Lock()

    def cell(ranks: Ranks) -> int:
        return factor * ranks.rank

    def locked(ranks: Ranks) -> None:
        lock.acquire()

    assert pair.run(cell) == [0, 10]
    with pytest.raises(UserError, match="locked cannot be sent to other processes: it holds 'lock', a lock"):
        pair.run(locked)
    assert pair.run(cell) == [0, 10], "the processes are still there"


# --- how they start and end ---


def test_processes_outlive_the_thread_that_started_them_and_closing_leaves_nothing(capfd):
    started: list[WatchedProcesses] = []
    thread = threading.Thread(target=lambda: started.append(start(2)))
    thread.start()
    thread.join()
    with started[0] as two:
        pids, folder = two.pids, two.folder
        assert [rank for rank, *_ in two.run(tasks.add_ranks)] == [0, 1]
        two.run(tasks.print_rank)
        assert not gone(pids) and folder.exists()
    assert gone(pids) and not folder.exists()
    assert "printed by rank 0" in (printed := capfd.readouterr().out) and "printed by rank 1" in printed
    with pytest.raises(RankError, match="have ended; start new ones"):
        two.run(tasks.add_ranks)


@pytest.mark.parametrize("timeout", [0.0, 1.9, float("nan")])
def test_a_timeout_shorter_than_ranks_need_to_answer_is_refused(timeout):
    with pytest.raises(UserError, match="must be at least 2 seconds"):
        start(2, timeout=timeout)


def test_a_process_that_cannot_start_ends_all(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().children()
    with pytest.raises(UserError, match="'tpu' is one device"):
        WatchedProcesses(2, device="tpu", backend="gloo", timeout=60.0)
    assert not list(tmp_path.glob(f"{processes.MEETING_PREFIX}*"))
    assert gone([child.pid for child in psutil.Process().children() if child not in before])


FAULTS = {
    "raise": (RankError, r"rank 1 failed:.*Traceback.*tasks\.py.*ZeroDivisionError: thrown on purpose"),
    "raise for people": (RecipeError, "^a mistake to mend$"),
    "raise what cannot travel": (RankError, r"rank 1 failed:.*Stubborn"),
    "kill": (RankError, "rank 1 was ended by SIGKILL while working; the system does that when memory runs out$"),
    "exit 0": (RankError, "rank 1 exited with status 0 without a result while working"),
    "sys.exit": (RankError, r"rank 1 failed:.*SystemExit: 0"),
    "memory": (RankError, "rank 1 failed:.*(memory|alloc)"),
    "stop": (RankError, "rank 1 has stopped answering"),
    "sleep": (RankError, "rank 1 has hung"),
    "spin": (RankError, "rank 1 has hung"),
    "sleep at the end": (RankError, "rank 1 has hung"),
}
HANGS = ("stop", "sleep", "spin", "sleep at the end")
"""Faults that only the timeout shows; the others are noticed without it."""


@pytest.mark.parametrize("how", FAULTS)
def test_a_rank_that_fails_is_named_and_ends_all(how):
    if how == "memory" and sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    started = start(2, timeout=3.0 if how in HANGS else 300.0)
    pids, folder = started.pids, started.folder
    error, message = FAULTS[how]
    with pytest.raises(error) as caught:
        started.run(tasks.fail, how, 1)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert gone(pids) and not folder.exists()


def test_an_exception_in_the_callback_ends_all(pair):
    pids = pair.pids

    def on_message(rank: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.run(tasks.report_twice, "hello", on_message=on_message)
    assert gone(pids)


def test_a_slow_rank_has_not_hung():
    with start(2, timeout=2.0) as two:
        # A step of 2 s, longer than the 1.6 s of silence, is no hang after a step of 1 s.
        assert two.run(tasks.take_turns_being_slow, 1.0, 2.0) == ["done", "done"]


# A caller without a guard, like a script or a notebook: the processes that it starts must not run it again.
CALLER = """
import sys
sys.path[:0] = {path!r}
from cifar_fast.distributed.processes import WatchedProcesses
import tasks
started = WatchedProcesses(2, device="cpu", backend="gloo", timeout=300.0)
print("pids", *started.pids, started.folder, flush=True)
started.run(tasks.fail, "sleep", -1)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_caller(how, tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(path=[str(Path(tasks.__file__).parent), str(Path(__file__).parents[2])]))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as caller:
        assert caller.stdout is not None and caller.stderr is not None
        line = caller.stdout.readline()
        assert line.startswith("pids"), caller.stderr.read()
        *numbers, folder = line.split()[1:]
        pids = [int(number) for number in numbers]
        assert len(pids) == 2 and not gone(pids)
        if sys.platform == "linux":  # Ctrl-C is the caller's alone, in a process's first launch as in later ones
            masks = [re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
            assert all(mask and int(mask[1], 16) >> (signal.SIGINT - 1) & 1 for mask in masks)
        if how == signal.SIGKILL and sys.platform == "linux":  # only Linux kills stopped processes with their parent
            os.kill(pids[0], signal.SIGSTOP)
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


def test_folders_that_killed_callers_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, recent, held = (tmp_path / f"{processes.MEETING_PREFIX}{name}" for name in ("old", "new", "held"))
    for folder in (left, recent, held):
        folder.mkdir()
    for folder in (left, held):
        os.utime(folder, (0, 0))
    with processes.FileLock(held / "held"):
        os.utime(held, (0, 0))
        processes._remove_left_over()
        assert not left.exists() and recent.exists() and held.exists()


@pytest.mark.slow
def test_six_launches_at_the_same_moment_do_not_collide():
    answers: list[list] = []

    def launch() -> None:
        with start(2, timeout=400.0) as two:
            answers.append([rank for rank, *_ in two.run(tasks.add_ranks)])

    main = sys.modules["__main__"]
    threads = [threading.Thread(target=launch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[0, 1]] * 6
    assert sys.modules["__main__"] is main
