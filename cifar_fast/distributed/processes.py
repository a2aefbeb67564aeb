"""Processes on this machine that do what they are told, are watched while they do it, and never stay behind."""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, resource_tracker
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock, Timeout

from cifar_fast.distributed.ranks import PATIENCE, Ranks, rank_device, set_threads
from cifar_fast.errors import RankError, UserError
from cifar_fast.hardware.cuda_graph import release_captures

HEARTBEAT_SECONDS = 0.5
LOOK_SECONDS = 0.25
"""How often, at most, the caller looks whether a rank is silent: the look costs it about a millisecond a process."""
START_SECONDS = 300.0
"""How long a rank may take to start, and to set a task up and do its first step, which may hold a compilation."""
MEETING_PREFIX = "cifar_fast-meeting-"
_starting = threading.Lock()


class WatchedProcesses:
    """`world_size` processes that meet through a file in a private folder and talk over the loopback interface."""

    def __init__(self, world_size: int, *, device: str, backend: str, timeout: float = 10.0) -> None:
        """Start them and wait until all have met.

        Arguments:
            world_size: number of processes.
            device: `cuda`, one GPU for each, or `cpu`, whose cores they divide.
            backend: `nccl` or `gloo`.
            timeout: seconds within which a rank that died or no longer answers has ended them all.

        Raises:
            RankError: a rank failed.
        """
        if not timeout >= 2:  # nan is not, either
            raise UserError(f"timeout={timeout} must be at least 2 seconds: each rank is heard of twice a second")
        self.world_size, self.device, self.timeout = world_size, device, timeout
        _remove_left_over()
        self.folder = Path(tempfile.mkdtemp(prefix=MEETING_PREFIX))  # for this user alone
        weakref.finalize(self, shutil.rmtree, self.folder, True)  # should nobody call `close`
        self._held = FileLock(self.folder / "held")
        self._held.acquire()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        before = set(active_children())
        if hasattr(signal, "pthread_sigmask"):
            resource_tracker.ensure_running()  # its start would undo what `_interrupts_held` has the workers inherit
        try:
            with _interrupts_held():
                ends = [Pipe() for _ in range(world_size)]
                self._connections = [ours for ours, _ in ends]
                theirs = [end for _, end in ends]
                with _nothing_inherited():
                    lasting = threading.current_thread() is threading.main_thread()
                    arguments = (theirs, device, backend, str(self.folder), lasting)
                    context = mp.spawn(_work, arguments, nprocs=world_size, join=False, daemon=True)
                self._processes = context.processes
                for end in theirs:
                    end.close()  # so that ours ends when the worker does
            self._watch("starting", None)
        except BaseException:
            if not self._processes and threading.active_count() == 1:  # else they may be another thread's
                # `spawn` itself failed, and some may have been started.
                self._processes = [process for process in active_children() if process not in before]
            self._kill()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes' numbers, by rank."""
        return [process.pid for process in self._processes]

    def call(
        self, function: Callable[..., Any], *args: Any, on_message: Callable[[int, Any], None] | None = None
    ) -> list:
        """Call `function(ranks, *args)` on every rank and return what each returned, by rank.

        `function` is a top-level one of an importable module. `on_message(rank, message)` is called in this process
        with what the ranks `tell` meanwhile. Raises `RankError`, or the rank's own `UserError`, when one fails; then,
        and when this call is interrupted, no process is left.
        """
        if not self._processes:
            raise RankError("these processes have ended; start new ones")
        if function.__module__ == "__main__":
            raise UserError(
                f"{function.__qualname__} is defined in a notebook cell or a script, which other processes cannot "
                "import; put it into a module"
            )
        task = pickle.dumps((function, args))
        try:
            for connection in self._connections:
                with suppress(OSError):  # it is gone; `_watch` says who and why
                    connection.send_bytes(task)
            return self._watch("working", on_message)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """End the processes and remove what they met through."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + 5
        try:
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            self._kill()

    def __enter__(self) -> WatchedProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self, doing: str, on_message: Callable[[int, Any], None] | None) -> list:
        """Hear from every rank until each has said that it is done, or one fails."""
        ranks = [_Rank(number) for number in range(self.world_size)]
        if doing == "working":
            for rank in ranks:
                rank.heard_at = 0.0  # from now on each says something twice a second
        last = time.monotonic()
        looked = last - LOOK_SECONDS
        while not all(rank.done for rank in ranks):
            waiting_for: list[Any] = [self._connections[rank.number] for rank in ranks if not rank.gone]
            wait(
                [*waiting_for, *(self._processes[rank.number].sentinel for rank in ranks if not rank.gone)],
                timeout=0.25,
            )
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                for rank in ranks:
                    # A machine that was asleep, or a callback that took long, is nobody's silence.
                    rank.live(min(now - last, 1.0), self._processes[rank.number].pid)
                looked = last = now
            for rank in ranks:
                for kind, content in self._received(rank):
                    rank.hear(kind, content)
                    if kind == "told" and on_message:
                        on_message(rank.number, content)
                    elif kind == "warned" and rank.number == 0:
                        warnings.warn(content, stacklevel=5)
            self._raise_failure(ranks, doing)
        return [rank.value for rank in ranks]

    def _received(self, rank: _Rank) -> Iterator[tuple[str, Any]]:
        connection = self._connections[rank.number]
        try:
            while not rank.gone and connection.poll():
                yield connection.recv()
        except (EOFError, OSError):
            rank.gone = True

    def _raise_failure(self, ranks: list[_Rank], doing: str) -> None:
        """Raise what is wrong, if anything is, with the rank that it began with."""
        for rank in ranks:
            if not rank.done and rank.failure is None:
                process = self._processes[rank.number]
                if rank.gone:
                    process.join(1.0)
                if process.exitcode is not None:
                    # What it said last may still be in the pipe.
                    for kind, content in self._received(rank):
                        rank.hear(kind, content)
                    if not rank.done and rank.failure is None:
                        raise RankError(f"rank {rank.number} {_how_it_ended(process.exitcode, doing)}")
        failed = [rank for rank in ranks if rank.failure is not None]
        first = [rank for rank in failed if not rank.failure.waiting]  # type: ignore[union-attr]
        # A rank that failed while it waited for others most likely lost one of them: who that is will show in a second.
        if first or any(time.monotonic() - rank.failed_at > 1.0 for rank in failed):
            rank = min(first or failed, key=lambda rank: rank.failed_at)
            assert rank.failure is not None
            raise rank.failure.exception(rank.number)
        if failed:
            return
        silent = 0.8 * self.timeout  # the rest is for ending the others
        for rank in ranks:
            if rank.heard_at is not None and not rank.done and rank.clock - rank.heard_at > silent:
                raise RankError(
                    f"rank {rank.number} has stopped answering: nothing was heard of it for "
                    f"{rank.clock - rank.heard_at:.0f} s (timeout={self.timeout:g})"
                )
        pending = [rank for rank in ranks if not rank.done]
        settled = all(rank.progress.settled for rank in pending)
        # Ranks work side by side, so the others' piece of work should not take much longer than one did before.
        patience = max(silent, 3 * max(rank.progress.longest_work for rank in ranks)) if settled else START_SECONDS
        stuck = [rank for rank in pending if rank.clock - rank.moved_at > patience]
        others_wait = len(pending) < len(ranks) or any(rank.progress.waiting for rank in stuck)
        # A GPU's host runs ahead of it and may stand still without saying that it waits.
        if stuck and (others_wait or self.device == "cuda" or not settled):
            late = [rank for rank in pending if not rank.progress.waiting] or pending
            rank = min(late, key=lambda rank: rank.progress.ticks)
            idle = f"rank {rank.number} has hung: it has done nothing for {rank.clock - rank.moved_at:.0f} s"
            if not settled:
                raise RankError(f"{idle} while {doing}")
            raise RankError(
                f"{idle}, and the others wait for it; if a step may take this long, raise timeout={self.timeout:g}"
            )

    def _kill(self) -> None:
        """End every process at once, with whatever it has started, and remove the private folder."""
        with _interrupts_held():
            for process in self._processes:
                if process.exitcode is not None:
                    continue  # its number may be another's by now
                with suppress(psutil.Error):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        with suppress(psutil.Error):
                            child.kill()
                process.kill()
            for process in self._processes:
                process.join(5.0)  # one that hangs in the kernel ends when that lets it go
            for connection in self._connections:
                connection.close()
            self._processes, self._connections = [], []
            self._held.release()
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class _Failure:
    """What a rank says when its task raised."""

    error: UserError | None
    """The exception itself where it is one for people."""
    text: str
    waiting: bool
    """Whether it was waiting for other ranks at that moment."""

    def exception(self, rank: int) -> Exception:
        if self.error is not None:
            return self.error
        return RankError(f"rank {rank} failed:\n{self.text}")


@dataclass
class _Progress:
    """What a rank says of itself twice a second; fields as in `Ranks`."""

    ticks: int = 0
    waiting: bool = False
    settled: bool = False
    longest_work: float = 0.0


class _Rank:
    """What is known of one rank during one task; its times are those of a clock of its own, in seconds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.clock = 0.0
        self._queued: dict[str, float] = {}
        self.done = False
        self.gone = False
        self.value: Any = None
        self.failure: _Failure | None = None
        self.failed_at = 0.0
        self.heard_at: float | None = None
        self.progress = _Progress()
        self.moved_at = 0.0

    def live(self, seconds: float, pid: int) -> None:
        """Let its clock run, but not while it had work and no core to do it on: it is slow then, not silent."""
        queued = seconds_in_run_queue(pid)
        held = max((total - self._queued.get(thread, total) for thread, total in queued.items()), default=0.0)
        self.clock += max(0.0, seconds - held)
        self._queued = queued

    def hear(self, kind: str, content: Any) -> None:
        self.heard_at = self.clock
        if kind == "done":
            self.done, self.value = True, content
        elif kind == "failed":
            self.failure, self.failed_at = content, time.monotonic()
        elif kind == "alive":
            if content.ticks != self.progress.ticks or content.waiting != self.progress.waiting:
                self.moved_at = self.clock
            self.progress = content


def seconds_in_run_queue(pid: int) -> dict[str, float]:
    """Return for each thread of a process how long it has waited for a core so far; empty where Linux does not tell."""
    waited = {}
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # the thread has just ended
            waited[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return waited


def _how_it_ended(exitcode: int, doing: str) -> str:
    if exitcode == 0:
        return f"exited with status 0 without a result while {doing}"
    if exitcode > 0:
        return f"exited with status {exitcode} and no word while {doing}"
    name = signal.Signals(-exitcode).name
    hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name} while {doing}{hint}"


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C until the block is left, and from the processes that are started in it for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    # The mask is inherited: Ctrl-C in a terminal reaches all processes, and only this one should act on it.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if old is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        # What was installed from C cannot be put back.
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
    if held:
        signal.raise_signal(signal.SIGINT)  # to whoever handles it: Python's own raises KeyboardInterrupt


@contextmanager
def _nothing_inherited() -> Iterator[None]:
    """Let spawned processes start without importing the caller's `__main__`, which needs no guard then."""
    with _starting:  # two threads that swap it at once would lose it
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _remove_left_over() -> None:
    """Remove the folders of callers that were killed before they could do so."""
    for folder in Path(tempfile.gettempdir()).glob(f"{MEETING_PREFIX}*"):
        with suppress(OSError, Timeout):  # held by a caller that lives
            state = folder.lstat()
            if hasattr(os, "getuid") and (state.st_uid != os.getuid() or folder.is_symlink()):
                continue  # another user's, or not what it seems
            if time.time() - state.st_mtime < 60:
                continue  # its owner may be about to take hold of it
            with FileLock(folder / "held", timeout=0):
                shutil.rmtree(folder)


def loopback_interface() -> str:
    """Return the name of the interface that has the address 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return name
    raise RankError("no interface of this machine has the address 127.0.0.1, over which the processes talk")


# --- in the started process ---


def _work(rank: int, ends: list[Connection], device: str, backend: str, folder: str, lasting: bool) -> None:
    """Meet the other ranks, then do one task after the other; a top-level function, so that it can be imported."""
    for number, end in enumerate(ends):
        if number != rank:
            end.close()
    connection, world_size = ends[rank], len(ends)
    _end_with_parent(lasting)
    speaking = threading.Lock()

    def say(kind: str, content: Any = None) -> None:
        with speaking:
            connection.send((kind, content))

    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    warnings.showwarning = lambda message, *_: say("warned", str(message))
    ranks = Ranks(rank, world_size, backend)
    try:
        ranks.device = rank_device(device, rank)
        ranks.tell = lambda message: say("told", message)
        set_threads(world_size)
        os.environ["GLOO_SOCKET_IFNAME"] = interface = loopback_interface()
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the sign NCCL takes a prefix
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        ranks.barrier()
        say("done")
        while coded := tasks.get():
            with _heartbeat(ranks, say):
                function, args = pickle.loads(coded)
                value = function(ranks, *args)
            say("done", value)
        release_captures()
        dist.destroy_process_group()
    except BaseException as error:
        say("failed", _Failure(_portable(error), traceback.format_exc(), ranks.waiting))
        # Its sockets stay open until the caller has heard of it, so that it is not blamed on those that wait for it.
        threading.Event().wait()


def _portable(error: BaseException) -> UserError | None:
    """Return an error for people if it survives the way to another process."""
    if not isinstance(error, UserError):
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))


def _listen(connection: Connection, tasks: queue.SimpleQueue[bytes]) -> None:
    """Take tasks from the caller; when it is gone, end this process, whatever it is doing."""
    try:
        while True:
            tasks.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def _heartbeat(ranks: Ranks, say: Callable[[str, Any], None]) -> Iterator[None]:
    """Say twice a second, while the task runs, how far this rank is and whether it waits for others."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the caller is gone, and `_listen` ends this process
                say("alive", _Progress(ranks.ticks, ranks.waiting, ranks.settled, ranks.longest_work))

    ranks.begin()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end_with_parent(lasting: bool) -> None:
    """Ask Linux to kill this process when the one that started it dies, even if it is stopped by then.

    To Linux the parent is the thread; one that may end before its process, not `lasting`, is left to `_listen`.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL if lasting else 0, 0, 0, 0)
