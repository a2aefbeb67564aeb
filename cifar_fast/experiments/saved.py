"""The measured results that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_fast.errors import RunError
from cifar_fast.experiments.ablation import AS_IT_IS, Ablation, points

RESULTS = Path(__file__).parents[1] / "results"
"""Where an installed package has the files of benchmarks/results; a clone has them there."""


def results_folder() -> Path:
    """Return the folder with what was measured at full scale: benchmarks/results of the clone, or the package's copy.

    Raises `RunError` when neither is there.
    """
    clone = Path(__file__).parents[2] / "benchmarks" / "results"
    for folder in (clone, RESULTS):
        if folder.is_dir():
            return folder
    raise RunError(f"neither {clone} nor {RESULTS} is there; install the package anew, or clone the repository")


def saved_runs(name: str) -> list[dict[str, Any]]:
    """Return the runs in the folder `name` of `results_folder()`, each as `RunResult.to_dict()` gives it.

    Raises `RunError` when there are none; the folder's README tells which of their clocks may be cited.
    """
    path = results_folder() / name / "results.jsonl"
    if not path.exists():
        there = ", ".join(sorted(file.parent.name for file in results_folder().glob("*/results.jsonl")))
        raise RunError(f"no runs are filed as {name!r}; there are {there}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_ablation(*arms: str, folder: Path | str | None = None) -> Ablation | None:
    """Return what `benchmarks/ablation.py` has filed of the recipe as it is and of `arms`, or None where one is
    missing.

    `arms`: the names under which the script files them. `folder`: the script's folder; without it `ablation` in
    `results_folder()`.
    """
    path = (Path(folder) if folder else results_folder() / "ablation") / "results.jsonl"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (AS_IT_IS, *arms)}
    if path.exists():
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if run["arm"] in found:
                found[run["arm"]].append(run)
    return Ablation(found) if all(found.values()) else None


WHOLE_TRAININGS = ("ablation", "ablation_without_tiles")
"""Folders of `results_folder()` with whole trainings on all of CIFAR-10, each from one machine."""
SHORT_TRAININGS = "ablation_2_epochs"
"""The folder with trainings of two epochs on all of CIFAR-10."""


def full_scale_tables(*arms: str, results: Path | str | None = None) -> str:
    """Return the tables of the longest trainings on all of CIFAR-10 that are filed for `arms`, and what is missing.

    Where two machines have trained them, a last line an arm puts together the differences of both, each between runs
    of one machine.

    `arms`: the names under which `benchmarks/ablation.py` files them. `results`: another folder than
    `results_folder()`.
    """
    root = Path(results) if results else results_folder()
    whole = [found for name in WHOLE_TRAININGS if (found := saved_ablation(*arms, folder=root / name))]
    if whole:
        together = ["\n".join(_together(arm, whole) for arm in arms)] if len(whole) > 1 else []
        return "\n\n".join([*(each.table() for each in whole), *together])
    missing = f"not measured yet for {', '.join(arms)}; benchmarks/ablation.py does it, in hours on two cores"
    short = saved_ablation(*arms, folder=root / SHORT_TRAININGS)
    return f"{short.table()}\nwhole trainings: {missing}" if short else f"full scale: {missing}"


def _together(arm: str, machines: Sequence[Ablation]) -> str:
    differences = [each for machine in machines for each in machine.differences(arm)]
    return f"{arm} on {len(machines)} machines, n = {len(differences)}: {points(differences)}"
