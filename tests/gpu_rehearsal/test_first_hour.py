"""benchmarks/gpu.py, which measures on a real GPU, runs from its first part to its last on a simulated one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_rehearsal.runtime import REPOSITORY


@pytest.mark.timeout(300)  # each part is a process that imports torch
def test_the_first_hour_with_a_gpu_is_rehearsed(runtime: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--rehearse", "--runs", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    report = json.loads((tmp_path / "gpu.json").read_text())
    parts = report["parts"]
    assert list(parts) == ["tests", "speedrun", "airbench", "apple", "kernels", "ways", "recipes", "ladder"]
    assert {entry["state"] for entry in parts.values()} == {"done"} and report["verdicts"] == []
    assert parts["tests"]["found"]["passed"] >= 2 and not parts["tests"]["found"]["skipped"]
    for found in (parts["speedrun"]["found"]["speedrun"], parts["apple"]["found"]["apple_8gpu"]):
        assert found["summary"]["n"] == 1
        environment = found["about"]["environment"]
        assert environment["step_mode"] == "captured" and environment["gpu"]
    modes = [runs[1]["step_mode"] for runs in parts["ways"]["found"]["ways"].values()]
    assert modes == ["eager", "eager", "captured", "captured"]
    assert len(parts["ways"]["found"]["orthogonalise_us"]) == 2
    # There is no CUPTI that sees simulated kernels: the part says so, and keeps the rest.
    assert parts["kernels"]["found"]["limit"]["tflops"]["float16"] > 0
    assert len(parts["kernels"]["found"]["not_profiled"]) == 2
    ladder = parts["ladder"]["found"]
    assert ladder["runs"] == {"plain": 1} and ladder["about"]["environment"]["gpu"]
