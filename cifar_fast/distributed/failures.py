"""What the caller knows about the ranks it started, and how it tells that one died, raised, went silent or hung."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_fast.errors import RankError, UserError

START_SECONDS = 300.0
"""How long a rank may take to start, or to set up a task and take its first step, which may include a compilation."""
AFTERMATH_SECONDS = 1.0
"""How long to look for the cause when a rank fails while it waits: it has probably lost one of the others."""


@dataclass
class Failure:
    """What a rank sends when its task raised an error."""

    error: UserError | None
    """The exception itself, if it is one that the user can fix."""
    traceback: str
    waiting: bool
    """Whether the rank was waiting for others at that moment."""
    notes: str = ""
    """Which function of the reader's own raised it, if one did."""

    def exception(self, rank: int) -> Exception:
        """Return the exception to raise in the caller."""
        return self.error or RankError(f"rank {rank} failed{self.notes and f' ({self.notes})'}:\n{self.traceback}")


@dataclass
class Progress:
    """What a rank reports about itself twice a second; the fields are those of `Ranks`."""

    ticks: int = 0
    waiting: bool = False
    settled: bool = False
    longest_work: float = 0.0


class RankState:
    """What the caller knows about one rank during one task.

    Silence and idleness are measured on a clock of the rank's own, in seconds. It stands still while the rank has work
    but gets no core to do it on: such a rank is slow, not silent.
    """

    def __init__(self, rank: int, *, heartbeat: bool = True) -> None:
        """Begin with nothing known about the rank; without `heartbeat` it does not report before it is done."""
        self.rank = rank
        self.done = False
        self.value: Any = None
        self.failure: Failure | None = None
        self.failed_at = 0.0  # time.monotonic
        self.disconnected = False
        self.exit_code: int | None = None
        self.progress = Progress()
        self.clock = 0.0
        self._last_message: float | None = 0.0 if heartbeat else None
        self._last_progress = 0.0
        self._queued: dict[str, float] = {}

    @property
    def silent_for(self) -> float:
        """Seconds since its last message, 0 while none is due."""
        return 0.0 if self._last_message is None else self.clock - self._last_message

    @property
    def idle_for(self) -> float:
        """Seconds since it last reported progress."""
        return self.clock - self._last_progress

    def advance_clock(self, seconds: float, pid: int) -> None:
        """Let its clock run for `seconds`, less the time that process `pid` has been waiting for a core."""
        queued = seconds_in_run_queue(pid)
        held = max((total - self._queued.get(thread, total) for thread, total in queued.items()), default=0.0)
        self.clock += max(0.0, seconds - held)
        self._queued = queued

    def note(self, kind: str, content: Any) -> None:
        """Take in one of its messages."""
        self._last_message = self.clock
        if kind == "done":
            self.done, self.value = True, content
        elif kind == "failed":
            self.failure, self.failed_at = content, time.monotonic()
        elif kind == "heartbeat":
            if (content.ticks, content.waiting) != (self.progress.ticks, self.progress.waiting):
                self._last_progress = self.clock
            self.progress = content


def seconds_in_run_queue(pid: int) -> dict[str, float]:
    """Return how long each thread of a process has waited for a core so far; empty where the system does not say."""
    waited = {}
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # the thread has just ended
            waited[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return waited


def find_failure(states: Sequence[RankState], *, doing: str, timeout: float, device: str) -> Exception | None:
    """Return the error of the rank that failed first, or None while all is well.

    Args:
        states: what is known of each rank.
        doing: `starting` or `working`, for the message.
        timeout: seconds within which one failed rank ends all of them.
        device: `cpu` or `cuda`.

    Returns:
        A `RankError` that names the rank, or the rank's own `UserError`.
    """
    if error := _died(states, doing):
        return error
    if any(state.failure for state in states):
        return _raised(states)  # while it is not known which one failed first, nobody else is blamed either
    silence = 0.8 * timeout  # the rest is for ending the others
    return _silent(states, silence, timeout) or _hung(states, doing, silence, timeout, device)


def _died(states: Sequence[RankState], doing: str) -> RankError | None:
    for state in states:
        if state.exit_code is not None and not state.done and state.failure is None:
            return RankError(f"rank {state.rank} {_how_it_ended(state.exit_code, doing)}")
    return None


def _how_it_ended(exit_code: int, doing: str) -> str:
    if exit_code == 0:
        return f"exited with status 0 without a result while {doing}"
    if exit_code > 0:
        return f"exited with status {exit_code} without a message while {doing}"
    name = signal.Signals(-exit_code).name
    hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name} while {doing}{hint}"


def _raised(states: Sequence[RankState]) -> Exception | None:
    """Return the exception of the first rank that failed by itself, or, if none shows up, of the first that failed."""
    failed = [(state.failed_at, state.rank, state.failure) for state in states if state.failure is not None]
    by_themselves = [entry for entry in failed if not entry[2].waiting]
    failed_at, rank, failure = min(by_themselves or failed, key=lambda entry: entry[0])
    if not by_themselves and time.monotonic() - failed_at <= AFTERMATH_SECONDS:
        return None
    return failure.exception(rank)


def _silent(states: Sequence[RankState], patience: float, timeout: float) -> RankError | None:
    for state in states:
        if not state.done and state.silent_for > patience:
            return RankError(
                f"rank {state.rank} has stopped answering: it sent nothing for {state.silent_for:.0f} s "
                f"(timeout={timeout:g})"
            )
    return None


def _hung(states: Sequence[RankState], doing: str, silence: float, timeout: float, device: str) -> RankError | None:
    """Return the error of a rank that reports, but makes no progress."""
    pending = [state for state in states if not state.done]
    settled = all(state.progress.settled for state in pending)
    # Ranks work side by side, so a piece of work should not take much longer than one of any rank's did before.
    patience = max(silence, 3 * max(state.progress.longest_work for state in states)) if settled else START_SECONDS
    idle = [state for state in pending if state.idle_for > patience]
    others_wait = len(pending) < len(states) or any(state.progress.waiting for state in idle)
    # On a CPU an idle rank that nobody waits for is slow. A GPU's host may stand still without saying that it waits.
    if not idle or (settled and device == "cpu" and not others_wait):
        return None
    culprit = min(
        [state for state in pending if not state.progress.waiting] or pending, key=lambda state: state.progress.ticks
    )
    hung = f"rank {culprit.rank} has hung: no progress for {culprit.idle_for:.0f} s"
    if not settled:
        return RankError(f"{hung} while {doing}")
    return RankError(f"{hung}, and the others wait for it; if a step may take this long, raise timeout={timeout:g}")
