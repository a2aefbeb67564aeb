"""The compiled step: Inductor generates for a GPU, and Triton compiles for its compute capability 9.0, without one."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_rehearsal.runtime import Rehearsal

RECIPE = "apple_8gpu"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiling_leaves_half_the_kernels(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(**changes: Any) -> dict[str, Any]:
        return rehearsal.run("measure_launches", name=RECIPE, captured=True, seconds=500, **changes)

    # Without our own kernels first: they leave little to compile.
    eager = measured(fuse_norm=False)
    # A fork of its own each time: the second finds what the first has left on disk.
    cold, warm = (measured(compile="on", fuse_norm=False) for _ in range(2))
    fused = measured(compile="on")
    for compiled in (cold, warm, fused):
        assert (compiled["step mode"], compiled["reason"]) == ("compiled and captured", "")
        assert compiled["violations"] == []
    assert warm["kernels of a step"] == cold["kernels of a step"]
    assert warm["kernels of a step"]["compiled by Triton"] > 20
    before, after, least = (sum(found["kernels of a step"].values()) for found in (eager, warm, fused))
    conversions = [found["kernels of a step"].get("copy or cast", 0) for found in (eager, warm)]
    seconds = [f"{found['warm-up seconds']:.1f} s" for found in (cold, warm)]
    with capsys.disabled():
        print(f"\n{RECIPE}, a captured step: {before} kernels, compiled {after}, with fused norms {least}")
        print(f"casts and copies: {conversions[0]}, compiled {conversions[1]}")
        print(f"compiled in {seconds[0]} cold, {seconds[1]} warm")
    assert least < after < before / 2 and conversions[1] < conversions[0] / 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiling_changes_no_arithmetic_of_the_network(rehearsal: Rehearsal) -> None:
    eager, compiled = (
        rehearsal.run("count_work", name="airbench_2024", n_train=4096, compile=compile, seconds=500)
        for compile in ("off", "on")
    )
    assert compiled["step mode"] == "compiled and captured"
    for state, rows in eager["steps"].items():
        flop = [sum(row[5] * row[-1] for row in step if row[5]) for step in (rows, compiled["steps"][state])]
        assert flop[0] == flop[1], state
    layers = {row[0] for row in compiled["steps"]["frozen"]}
    assert layers == {"batch", "network", "loss", "optimiser"}
    fused = [row for row in compiled["steps"]["frozen"] if row[2].startswith("fused by Inductor")]
    assert len(fused) > 20 and all(row[4] > 0 for row in fused)
