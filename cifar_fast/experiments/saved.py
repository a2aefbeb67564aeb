"""Reads the measured results that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_fast.errors import RunError
from cifar_fast.experiments.ablation import AS_IT_IS, Ablation, points

RESULTS = Path(__file__).parents[1] / "results"
"""The installed package's copy of benchmarks/results."""


def results_folder() -> Path:
    """Return the folder of saved results: benchmarks/results in a clone, else the installed package's copy.

    Raises `RunError` when neither exists.
    """
    clone = Path(__file__).parents[2] / "benchmarks" / "results"
    for folder in (clone, RESULTS):
        if folder.is_dir():
            return folder
    raise RunError(f"neither {clone} nor {RESULTS} exists; reinstall the package, or clone the repository")


def saved_runs(name: str) -> list[dict[str, Any]]:
    """Return the saved runs in the folder `name` of `results_folder()`, each as `RunResult.to_dict()` gives it.

    The README in `results_folder()` says how each folder was measured and which of its clocks can be cited. Raises
    `RunError` when there is no such folder.
    """
    path = results_folder() / name / "results.jsonl"
    if not path.exists():
        names = ", ".join(sorted(file.parent.name for file in results_folder().glob("*/results.jsonl")))
        raise RunError(f"there are no saved runs named {name!r}; choose one of {names}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_ablation(*arms: str, folder: Path | str | None = None) -> Ablation | None:
    """Return the saved runs of the unchanged recipe and of `arms`, or None when one of them has no runs.

    Args:
        arms: their names in `benchmarks/ablation.py`, such as `label_smoothing=0`.
        folder: where that script saved them; None for `ablation` in `results_folder()`.
    """
    path = (Path(folder) if folder else results_folder() / "ablation") / "results.jsonl"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (AS_IT_IS, *arms)}
    if path.exists():
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if run["arm"] in found:
                found[run["arm"]].append(run)
    return Ablation(found) if all(found.values()) else None


FULL_RUNS = ("ablation", "ablation_without_tiles")
"""Folders of `results_folder()` with full training runs on all of CIFAR-10, each from one machine."""
SHORT_RUNS = "ablation_2_epochs"
"""The folder with training runs of two epochs on all of CIFAR-10."""


def full_scale_tables(*arms: str, results: Path | str | None = None) -> str:
    """Return as text the saved ablation of `arms` on all of CIFAR-10, one table for each machine.

    The tables show full training runs, or two-epoch runs where there are no others, and say what is missing. When two
    machines trained the same arm, a last line pools the differences, each of which compares runs on one machine.

    Args:
        arms: their names in `benchmarks/ablation.py`, such as `label_smoothing=0`.
        results: the folder to look in; None for `results_folder()`.
    """
    root = Path(results) if results else results_folder()
    machines = [found for name in FULL_RUNS if (found := saved_ablation(*arms, folder=root / name))]
    if machines:
        pooled = ["\n".join(_pooled(arm, machines) for arm in arms)] if len(machines) > 1 else []
        return "\n\n".join([*(machine.table() for machine in machines), *pooled])
    missing = f"not measured yet for {', '.join(arms)}; benchmarks/ablation.py measures it, in hours on two cores"
    short = saved_ablation(*arms, folder=root / SHORT_RUNS)
    return f"{short.table()}\nfull runs: {missing}" if short else f"full runs: {missing}"


def _pooled(arm: str, machines: Sequence[Ablation]) -> str:
    differences = [each for machine in machines for each in machine.differences(arm)]
    return f"{arm} on {len(machines)} machines, n = {len(differences)}: {points(differences)}"
