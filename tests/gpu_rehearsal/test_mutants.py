"""Faults planted on purpose: each is caught by the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

from gpu_rehearsal import checks
from gpu_rehearsal.mutants import ANOTHER_RANK, MUTANTS
from gpu_rehearsal.runtime import Rehearsal

ALL_CHECKS = (
    checks.is_captured,
    checks.has_the_cpus_weights,
    checks.has_the_cpus_training_figures,
    checks.waits_for_nothing,
    checks.sends_nothing,
)
CAUGHT_BY: dict[str, Callable[..., None]] = {
    "a number read in the step": checks.is_captured,
    "the loss read after every step": checks.waits_for_nothing,
    "a learning rate recorded as a number": checks.has_the_cpus_weights,
    "a tensor made on the CPU": checks.is_captured,
    "channels_last forgotten for the weights": checks.converts_no_more,
    f"gradients set to None between captures ({ANOTHER_RANK})": checks.has_the_cpus_weights,
    "gradients never cleared": checks.has_the_cpus_weights,
    "SGD not fused": checks.is_captured,
    "a warm-up on the default stream that keeps its graph": checks.is_captured,
    "no warm-up": checks.has_the_cpus_weights,
    "nothing rolled back": checks.has_the_cpus_weights,
    "results not copied": checks.has_the_cpus_training_figures,
    "pageable copies in every step": checks.sends_nothing,
}


@pytest.fixture(scope="module", params=["", ANOTHER_RANK], ids=["alone", "another_rank"])
def without_fault(request: pytest.FixtureRequest, rehearsal: Rehearsal) -> Mapping[str, Any]:
    return rehearsal.run("run_mutant", name=request.param)


def test_without_a_fault_every_check_passes(without_fault: Mapping[str, Any]) -> None:
    for check in ALL_CHECKS:
        check(without_fault)


@pytest.fixture(scope="module")
def conversions(rehearsal: Rehearsal) -> Mapping[str, int]:
    return rehearsal.run("run_mutant", name="")["conversions"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught(rehearsal: Rehearsal, name: str, conversions: Mapping[str, int]) -> None:
    found = rehearsal.run("run_mutant", name=name)
    assert "error" not in found, found["error"]
    check = CAUGHT_BY[name]
    if check is checks.converts_no_more:
        check = partial(checks.converts_no_more, budget=conversions)
    with pytest.raises(AssertionError):
        check(found)
