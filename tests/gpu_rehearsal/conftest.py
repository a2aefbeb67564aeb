"""The simulated GPU as a fixture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_rehearsal.runtime import CannotBuild, Rehearsal, build

# It takes a minute, and CI has twelve in all: pytest runs this file when it is named on the command line.
collect_ignore = ["test_compiled.py"]


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the fake CUDA runtime. Skips where it cannot be built, but not in CI (where CI=true)."""
    try:
        return build(tmp_path_factory.mktemp("runtime"))
    except CannotBuild as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def rehearsal(runtime: Path) -> Iterator[Rehearsal]:
    """The process that does tasks on the fake runtime, each in a fork."""
    with Rehearsal(runtime) as process:
        yield process
