"""What each recipe asks of a GPU at full size, part by part: no more than its budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gpu_rehearsal.launches import family
from gpu_rehearsal.runtime import REPOSITORY, Rehearsal
from gpu_rehearsal.small import NAMES

COLUMNS = ("speedrun", "apple_8gpu", "airbench_2024", "page_2019")
# One step has the whitening bias frozen, and moves no average. The test set has 10,000 images, in batches of 500.
BUDGETS: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "kernels of a step": {
        "arithmetic, element by element": (30, 22, 34, 22),
        "norm, activation and pool by our kernels": (36, 48, 36, 48),  # three forward and three backward for each norm
        "copy or cast": (36, 28, 36, 28),
        "convolution": (19, 24, 19, 24),
        "matrix product": (12, 3, 12, 3),
        "optimiser over many tensors": (12, 7, 12, 7),
        "fill": (5, 3, 5, 3),
        "moving averages over many tensors": (6, 8, 6, 8),
        "reduction": (5, 4, 5, 4),
        "copy in memory": (11, 2, 11, 2),
        "loss and softmax": (4, 4, 4, 4),
        "gather or scatter": (3, 3, 3, 3),
        "max-pool": (2, 2, 2, 2),
        "fill with zeros": (1, 0, 1, 0),
    },
    "conversions of a step": {
        "float32 to float16": (12, 12, 12, 12),
        "float16 to float32": (14, 10, 14, 10),
        "channels first to channels last": (1, 1, 1, 1),  # the batch of images
        "uint8 to float32": (1, 1, 1, 1),
    },
    "setting up": {
        "kernel": (111, 110, 94, 93),
        "synchronisation": (45, 56, 45, 56),
        "copy from pageable memory": (49, 60, 42, 53),
    },
    "end of an epoch": {
        "synchronisation": (2, 2, 2, 2),
        "copy to the host": (2, 2, 2, 2),
    },
    "evaluation": {  # the first one, which sends the test images to the device
        "kernel": (911, 1051, 911, 1051),
        "synchronisation": (3, 3, 3, 3),
        "copy from pageable memory": (2, 2, 2, 2),
    },
    "evaluation with tta": {
        "kernel": (5111, 2031, 5111, 2031),
        "synchronisation": (1, 1, 1, 1),
        "copy from pageable memory": (0, 0, 0, 0),
    },
    # The rest is for captured steps only: a replay's arguments are copied in, one kernel for those of a type, and each
    # learning rate is filled in.
    "added by capturing": {
        "copy of many tensors": (3, 3, 3, 3),
        "fill": (4, 2, 4, 2),
    },
    "calls of the host in a captured step": {
        "graph launch": (2, 2, 2, 2),
        "copy on the device": (2, 2, 2, 2),
        "kernel": (7, 5, 7, 5),
    },
}


def budget(part: str, name: str) -> Counter[str]:
    column = COLUMNS.index(name)
    return Counter({row: counts[column] for row, counts in BUDGETS[part].items()})


def test_the_readme_says_how_many_kernels_the_budgets_allow() -> None:
    text = (REPOSITORY / "benchmarks" / "results" / "README.md").read_text()
    sums = " | ".join(str(budget("kernels of a step", name).total()) for name in COLUMNS)
    assert f"| kernels of a step, eager | {sums} |" in text


def kernels_of(families: Counter[str], names: dict[str, int]) -> str:
    """List the kernels of some families, so that a new one among them can be told."""
    lines = [f"    {count:4} {name[:110]}" for name, count in names.items() if family(name) in families]
    return "\n".join(sorted(lines, reverse=True))


def over_budget(found: dict[str, Any], name: str, *, captured: bool) -> list[str]:
    """Say where a recipe asks for more than its budget, and for what."""
    over = []
    for part in ("setting up", "end of an epoch", "evaluation", "evaluation with tta"):
        asked = Counter({row: found[part].get(row, 0) for row in BUDGETS[part]})
        if added := asked - budget(part, name):
            over.append(f"{part}: {dict(added)} more")
    kernels = budget("kernels of a step", name)
    if captured:
        kernels += budget("added by capturing", name)
        if added := Counter(found["step"]) - budget("calls of the host in a captured step", name):
            over.append(f"calls of the host in a captured step: {dict(added)} more")
    if added := Counter(found["kernels of a step"]) - kernels:
        over.append(f"kernels of a step: {dict(added)} more, among these:\n{kernels_of(added, found['names'])}")
    if added := Counter(found["conversions of a step"]) - budget("conversions of a step", name):
        over.append(f"conversions of a step: {dict(added)} more")
    return over


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_asks_for_no_more_than_its_budget(rehearsal: Rehearsal, name: str, captured: bool) -> None:
    found = rehearsal.run("measure_launches", name=name, captured=captured)
    assert (found["step mode"], found["reason"]) == ("captured" if captured else "eager", "")
    assert found["violations"] == []
    waiting = {
        "synchronisation",
        "copy from pageable memory",
        "copy from pinned memory",
        "copy to the host",
        "allocation",
    }
    assert not waiting & set(found["steps of an epoch"]), found["steps of an epoch"]
    over = over_budget(found, name, captured=captured)
    assert not over, f"{name} is over its budget; what is worth it goes into BUDGETS:\n" + "\n".join(over)


def test_small_images_are_captured_too_and_cost_one_kernel_more(rehearsal: Rehearsal) -> None:
    found = rehearsal.run("measure_launches", name="speedrun", captured=True, resolutions=[32, 24])
    assert (found["step mode"], found["reason"], found["violations"]) == ("captured", "", [])
    # Two sizes, and both states of the whitening bias with the first.
    assert len(found["nodes of the graphs"]) == 2 + 3
    assert found["kernels of a step"].pop("resize") == 1
    over = over_budget(found, "speedrun", captured=True)
    assert not over, "\n".join(over)


def test_what_is_over_budget_is_named(rehearsal: Rehearsal) -> None:
    found = rehearsal.run("measure_launches", name="page_2019", captured=True)
    found["conversions of a step"]["float32 to bfloat16"] = 1
    found["kernels of a step"]["copy or cast"] += 1
    found["names"]["bfloat16_copy_kernel_cuda"] = 1
    found["evaluation"]["synchronisation"] += 20
    text = "\n".join(over_budget(found, "page_2019", captured=True))
    assert "conversions of a step: {'float32 to bfloat16': 1} more" in text
    assert "kernels of a step: {'copy or cast': 1} more" in text and "bfloat16_copy_kernel_cuda" in text
    assert "evaluation: {'synchronisation': 20} more" in text
