"""The tests marked `gpu`, which skip on a machine without a GPU, run on the simulated one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpu_rehearsal.runtime import run_pytest


@pytest.mark.timeout(900)
def test_every_gpu_test_passes_on_the_simulated_gpu(runtime: Path) -> None:
    done = run_pytest(runtime, ["-m", "gpu", "-p", "no:cacheprovider", "tests"], n_gpus=2, seconds=800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= 10, summary
