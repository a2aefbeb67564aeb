"""What a training run on the simulated GPU has to fulfil; `tests/gpu_rehearsal/test_mutants.py` shows what each sees.

Each takes what `tasks.observe` returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

CAPTURED_RATES = 1e-6
"""How far weights may be off where the learning rate is a float32 number on the device."""
EXACT = 1e-10
"""How far they may be off in float64 otherwise: a GPU adds some sums in another order."""


def is_captured(found: Mapping[str, Any]) -> None:
    """The step was captured, and CUDA refused nothing."""
    assert "error" not in found, found["error"]
    assert found["step_mode"] == "captured" and found["step_mode_reason"] == "", found["step_mode_reason"]
    assert found["violations"] == []


def has_the_cpus_weights(found: Mapping[str, Any], tolerance: float = CAPTURED_RATES) -> None:
    """Weights, statistics and test figures are those of a CPU."""
    assert "error" not in found, found["error"]
    assert found["weights"] < tolerance and found["test_loss"] < tolerance and found["test_accuracy"] == 0, found


def has_the_cpus_training_figures(found: Mapping[str, Any], tolerance: float = CAPTURED_RATES) -> None:
    """Training loss and accuracy of each epoch are those of a CPU."""
    assert "error" not in found, found["error"]
    assert found["train_loss"] < tolerance and found["train_accuracy"] == 0, found


def waits_for_nothing(found: Mapping[str, Any]) -> None:
    """No step makes the host wait for the GPU."""
    assert "error" not in found, found["error"]
    assert found["calls of the steps"].get("synchronisation", 0) == 0, found["calls of the steps"]


def sends_nothing(found: Mapping[str, Any]) -> None:
    """No step copies from or to the host: choices are sent once an epoch."""
    assert "error" not in found, found["error"]
    assert found["copies of the steps"] == {}, found["copies of the steps"]


def converts_no_more(found: Mapping[str, Any], budget: Mapping[str, int]) -> None:
    """No change of dtype or layout has been added."""
    assert "error" not in found, found["error"]
    added = Counter(found["conversions"]) - Counter(budget)
    assert not added, f"conversions that the budget does not hold: {dict(added)}"
