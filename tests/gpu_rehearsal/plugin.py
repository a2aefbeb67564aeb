"""pytest -p gpu_rehearsal.plugin -m gpu: the tests marked `gpu`, on the simulated GPU in numeric mode."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from gpu_rehearsal.numeric import SimulatedGPU


def pytest_sessionstart() -> None:
    """Refuse to run without the fake runtime: the tests would all skip."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("the fake CUDA runtime is not preloaded: torch.cuda.is_available() is False")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let no test marked `gpu` skip: it has its GPU."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped on the simulated GPU: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def simulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute what a test marked `gpu` asks of CUDA tensors."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    # The kernels that a compiler makes compute nothing here; that it makes them is shown by test_compiled.py.
    with SimulatedGPU(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        yield
