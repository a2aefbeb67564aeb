"""Whole small training runs on the simulated GPU, eager and captured, beside the CPU's."""

from __future__ import annotations

import pytest

from gpu_rehearsal import checks
from gpu_rehearsal.runtime import Rehearsal
from gpu_rehearsal.small import NAMES


@pytest.mark.parametrize("name, resolutions", [*((name, []) for name in NAMES), ("speedrun", [16, 24])])
def test_a_gpu_computes_the_cpus_weights_eager_and_captured(
    rehearsal: Rehearsal, name: str, resolutions: list[int]
) -> None:
    found = rehearsal.run("compare_with_cpu", name=name, resolutions=resolutions)
    eager, captured = found["eager"], found["captured"]
    assert found["learned"] > 50 * checks.CAPTURED_RATES  # else any weights would do
    assert eager["step_mode"] == "eager"
    checks.is_captured(captured)
    for run, tolerance in ((eager, checks.EXACT), (captured, checks.CAPTURED_RATES)):
        checks.has_the_cpus_weights(run, tolerance)
        checks.has_the_cpus_training_figures(run, tolerance)
        checks.waits_for_nothing(run)
        checks.sends_nothing(run)
