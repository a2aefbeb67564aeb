"""Processes that tests kill."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")


def in_a_child(do: Callable[[], None]) -> int:
    """Call `do` in a forked process; return the signal that ended it, or 0."""
    if (pid := os.fork()) == 0:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
