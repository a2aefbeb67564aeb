"""Processes on this machine that run tasks, are watched while they do, and never stay behind."""

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
from multiprocessing import active_children, resource_tracker
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock, Timeout

from cifar_fast.distributed.failures import Failure, Progress, RankState, find_failure
from cifar_fast.distributed.ranks import PATIENCE, Ranks, rank_device, set_threads
from cifar_fast.errors import RankError, UserError
from cifar_fast.hardware.cuda_graph import release_captures
from cifar_fast.training.own_code import obstacle, pack

HEARTBEAT_SECONDS = 0.5
LOOK_SECONDS = 0.25
"""How often, at most, the caller checks for silent ranks: a check costs about a millisecond per process."""
MEETING_PREFIX = "cifar_fast-meeting-"
_starting = threading.Lock()


class WatchedProcesses:
    """`world_size` processes that meet through a file in a private folder and talk over the loopback interface."""

    def __init__(self, world_size: int, *, device: str, backend: str, timeout: float = 10.0) -> None:
        """Start the processes and wait until all have met.

        Args:
            world_size: number of processes.
            device: `cuda`, one GPU for each, or `cpu`, whose cores they divide.
            backend: `nccl` or `gloo`.
            timeout: seconds within which one rank that died or no longer answers ends all of them.

        Raises:
            UserError: the timeout is too short.
            RankError: a process could not start.
        """
        if not timeout >= 2:  # catches nan, too
            raise UserError(f"timeout={timeout} must be at least 2 seconds, because each rank reports twice a second")
        self.world_size, self.device, self.timeout = world_size, device, timeout
        _remove_left_over()
        self.folder = Path(tempfile.mkdtemp(prefix=MEETING_PREFIX))  # for this user alone
        weakref.finalize(self, shutil.rmtree, self.folder, True)  # in case nobody calls `close`
        self._held = FileLock(self.folder / "held")
        self._held.acquire()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        before = set(active_children())
        try:
            self._start(backend)
            self._watch("starting", None)
        except BaseException:
            if not self._processes and threading.active_count() == 1:  # with more threads they may belong to another
                # `spawn` itself failed, perhaps after it had started some.
                self._processes = [process for process in active_children() if process not in before]
            self._kill()
            raise

    def _start(self, backend: str) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # Its start would undo the signal mask that the processes should inherit from `_interrupts_held`.
            resource_tracker.ensure_running()
        with _interrupts_held():
            ends = [Pipe() for _ in range(self.world_size)]
            self._connections = [ours for ours, _ in ends]
            theirs = [end for _, end in ends]
            with _nothing_inherited():
                in_main_thread = threading.current_thread() is threading.main_thread()
                arguments = (theirs, self.device, backend, str(self.folder), in_main_thread)
                context = mp.spawn(_work, arguments, nprocs=self.world_size, join=False, daemon=True)
            self._processes = context.processes
            for end in theirs:
                end.close()  # so that our end reports EOF when the process ends

    @property
    def pids(self) -> list[int]:
        """The process numbers, by rank."""
        return [process.pid for process in self._processes]

    def run(
        self, function: Callable[..., Any], *args: Any, on_message: Callable[[int, Any], None] | None = None
    ) -> list:
        """Run `function(ranks, *args)` on every rank.

        When this raises, Ctrl-C included, no process is left.

        Args:
            function: its first argument is the rank's `Ranks`. It may be defined in a notebook cell or a script.
            args: its other arguments, which must be picklable.
            on_message: called in this process as `on_message(rank, message)` with what the ranks `report`.

        Returns:
            What each rank returned, by rank.

        Raises:
            UserError: the function or an argument cannot travel to other processes, or it raised a `UserError` itself.
            RankError: a rank raised anything else, died, no longer answers or has hung; or the processes have ended.
        """
        if not self._processes:
            raise RankError("these processes have ended; start new ones")
        try:
            task = pack((function, args))
        except Exception as error:  # pickling fails in as many ways as there are objects
            found = obstacle((function, args))
            raise UserError(f"{function.__qualname__} cannot be sent to other processes: it holds {found}") from error
        try:
            for connection in self._connections:
                with suppress(OSError):  # that process has ended; `_watch` says which one and why
                    connection.send_bytes(task)
            return self._watch("working", on_message)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """End the processes and remove their folder."""
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
        """Receive from every rank until all are done; raise as soon as one fails."""
        states = [RankState(rank, heartbeat=doing == "working") for rank in range(self.world_size)]
        last_look = time.monotonic() - LOOK_SECONDS
        while not all(state.done for state in states):
            self._wait_for_news(states)
            now = time.monotonic()
            if now - last_look >= LOOK_SECONDS:
                for state in states:
                    # Time in which the machine was asleep, or in a long callback, does not count as silence.
                    state.advance_clock(min(now - last_look, 1.0), self._processes[state.rank].pid)
                last_look = now
            for state in states:
                self._receive(state, on_message)
            for state in states:
                self._note_exit(state, on_message)
            if error := find_failure(states, doing=doing, timeout=self.timeout, device=self.device):
                raise error
        return [state.value for state in states]

    def _wait_for_news(self, states: list[RankState]) -> None:
        connected = [state.rank for state in states if not state.disconnected]
        messages = [self._connections[rank] for rank in connected]
        exits = [self._processes[rank].sentinel for rank in connected]
        wait([*messages, *exits], timeout=LOOK_SECONDS)

    def _receive(self, state: RankState, on_message: Callable[[int, Any], None] | None) -> None:
        """Take in what a rank has sent."""
        connection = self._connections[state.rank]
        while not state.disconnected:
            try:
                if not connection.poll():
                    return
                kind, content = connection.recv()
            except (EOFError, OSError):
                state.disconnected = True
                return
            state.note(kind, content)
            if kind == "message" and on_message:
                on_message(state.rank, content)
            elif kind == "warning" and state.rank == 0:
                warnings.warn(content, stacklevel=6)

    def _note_exit(self, state: RankState, on_message: Callable[[int, Any], None] | None) -> None:
        """Note that a process has ended without a result, once all that it sent has been received."""
        if state.done or state.failure is not None:
            return
        process = self._processes[state.rank]
        if state.disconnected:
            process.join(1.0)
        if process.exitcode is not None:
            self._receive(state, on_message)
            state.exit_code = process.exitcode

    def _kill(self) -> None:
        """End every process, whatever it is doing, and remove the private folder."""
        with _interrupts_held():
            for process in self._processes:
                if process.exitcode is None:  # else the number may belong to another process by now
                    _kill_tree(process)
            for process in self._processes:
                process.join(5.0)  # one that hangs in the kernel ends when the kernel lets it go
            for connection in self._connections:
                connection.close()
            self._processes, self._connections = [], []
            self._held.release()
            shutil.rmtree(self.folder, ignore_errors=True)


def _kill_tree(process: Any) -> None:
    """Kill a process and all that it has started."""
    children: list[psutil.Process] = []
    with suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    process.kill()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the block ends; processes that are started in it never receive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    # Processes inherit the mask. Ctrl-C in a terminal reaches them all, and only this one should act on it.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if old is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        # None: a handler that was installed from C cannot be put back.
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
    if held:
        signal.raise_signal(signal.SIGINT)  # Python's own handler raises KeyboardInterrupt


@contextmanager
def _nothing_inherited() -> Iterator[None]:
    """Have spawned processes start without importing the caller's `__main__`, which then needs no guard."""
    with _starting:  # two threads that swapped it at the same time would lose it
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _remove_left_over() -> None:
    """Remove the folders that killed callers left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{MEETING_PREFIX}*"):
        with suppress(OSError, Timeout):  # Timeout: its caller is alive
            state = folder.lstat()
            if hasattr(os, "getuid") and (state.st_uid != os.getuid() or folder.is_symlink()):
                continue  # another user's folder, or a link
            if time.time() - state.st_mtime < 60:
                continue  # its caller may be about to lock it
            with FileLock(folder / "held", timeout=0):
                shutil.rmtree(folder)


def loopback_interface() -> str:
    """Return the name of the network interface with the address 127.0.0.1; raise `RankError` if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return name
    raise RankError("no network interface of this machine has the address 127.0.0.1, over which processes talk")


# --- in the started process ---


def _work(rank: int, ends: list[Connection], device: str, backend: str, folder: str, in_main_thread: bool) -> None:
    """Meet the other ranks, then run one task after the other; a top-level function, so that it can be imported."""
    for number, end in enumerate(ends):
        if number != rank:
            end.close()
    connection, world_size = ends[rank], len(ends)
    _end_with_parent(in_main_thread)
    sending = threading.Lock()

    def send(kind: str, content: Any = None) -> None:
        with sending:
            connection.send((kind, content))

    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(connection, tasks), daemon=True).start()
    warnings.showwarning = lambda message, *_: send("warning", str(message))
    ranks = Ranks(rank, world_size, backend)
    try:
        ranks.device = rank_device(device, rank)
        ranks.report = lambda message: send("message", message)
        set_threads(world_size)
        os.environ["GLOO_SOCKET_IFNAME"] = interface = loopback_interface()
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the sign NCCL takes it for a prefix
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        ranks.barrier()
        send("done")
        while task := tasks.get():
            with _heartbeat(ranks, send):
                function, args = pickle.loads(task)
                value = function(ranks, *args)
            send("done", value)
        release_captures()
        dist.destroy_process_group()
    except BaseException as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        send("failed", Failure(_portable(error), traceback.format_exc(), ranks.waiting, notes))
        # Its sockets stay open until the caller knows, so that those that wait for this rank do not fail first.
        threading.Event().wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking down an interpreter with torch in it costs half a second


def _portable(error: BaseException) -> UserError | None:
    """Return a `UserError` in a form that can be pickled, None for any other exception."""
    if not isinstance(error, UserError):
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))


def _receive_tasks(connection: Connection, tasks: queue.SimpleQueue[bytes]) -> None:
    """Queue tasks from the caller; when the caller is gone, end this process, whatever it is doing."""
    try:
        while True:
            tasks.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def _heartbeat(ranks: Ranks, send: Callable[[str, Any], None]) -> Iterator[None]:
    """Report twice a second, while the task runs, how far this rank is and whether it waits for others."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the caller is gone, and `_receive_tasks` ends this process
                send("heartbeat", Progress(ranks.ticks, ranks.waiting, ranks.settled, ranks.longest_work))

    ranks.begin()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end_with_parent(in_main_thread: bool) -> None:
    """Ask Linux to kill this process when its parent dies, even if it is stopped at that moment.

    To Linux, the parent is the thread that started this process. Unless that was the main thread, it may end before its
    process does; then only `_receive_tasks` watches.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL if in_main_thread else 0, 0, 0, 0)
