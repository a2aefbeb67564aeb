"""The public names of the package; those that need torch are loaded on first use, so that importing it is quick."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cifar_fast import recipes
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.recipes import ladder

if TYPE_CHECKING:  # what `__getattr__` does, for editors and type checkers
    from cifar_fast.data.dataset import Dataset
    from cifar_fast.data.load import load_cifar10, load_cifar100, load_or_synthetic
    from cifar_fast.data.synthetic import synthetic
    from cifar_fast.distributed.launch import Trainer, launch
    from cifar_fast.experiments import gpu_report, plan
    from cifar_fast.experiments.ablation import Ablation, ablation
    from cifar_fast.experiments.benchmark import Benchmark, benchmark, load_benchmark
    from cifar_fast.experiments.compare import Comparison, compare, load_comparison
    from cifar_fast.experiments.saved import full_scale_tables, results_folder, saved_ablation, saved_runs
    from cifar_fast.experiments.variance import Variance, variance
    from cifar_fast.teaching import (
        concept_plots,
        exercises,
        image_grids,
        lessons,
        network_plots,
        result_plots,
        scales,
    )
    from cifar_fast.teaching import widgets as widgets
    from cifar_fast.training.evaluate import evaluate
    from cifar_fast.training.loop import train
    from cifar_fast.training.pretrained import Pretrained, pretrained
    from cifar_fast.training.result import RunResult, load_run, save_run
    from cifar_fast.training.seeds import Seeds
    from cifar_fast.training.tricks import Tricks

__version__ = "0.1.0"

__all__ = [
    "Ablation",
    "Benchmark",
    "Comparison",
    "Dataset",
    "Pretrained",
    "Recipe",
    "RunResult",
    "Seeds",
    "Trainer",
    "Tricks",
    "UserError",
    "Variance",
    "__version__",
    "ablation",
    "benchmark",
    "changed_fields",
    "compare",
    "concept_plots",
    "evaluate",
    "exercises",
    "full_scale_tables",
    "gpu_report",
    "image_grids",
    "ladder",
    "launch",
    "lessons",
    "load_benchmark",
    "load_cifar10",
    "load_cifar100",
    "load_comparison",
    "load_or_synthetic",
    "load_run",
    "network_plots",
    "plan",
    "pretrained",
    "recipes",
    "replace",
    "result_plots",
    "results_folder",
    "save_run",
    "saved_ablation",
    "saved_runs",
    "scales",
    "synthetic",
    "train",
    "variance",
]

# `widgets` is not in __all__: without the extra `notebooks` it cannot be imported, and says so.
_MODULES = {
    "experiments": ("gpu_report", "plan"),
    "teaching": (
        "concept_plots",
        "exercises",
        "image_grids",
        "lessons",
        "network_plots",
        "result_plots",
        "scales",
        "widgets",
    ),
}
_NAMES = {
    "data.dataset": ("Dataset",),
    "data.load": ("load_cifar10", "load_cifar100", "load_or_synthetic"),
    "data.synthetic": ("synthetic",),
    "distributed.launch": ("Trainer", "launch"),
    "experiments.ablation": ("Ablation", "ablation"),
    "experiments.benchmark": ("Benchmark", "benchmark", "load_benchmark"),
    "experiments.compare": ("Comparison", "compare", "load_comparison"),
    "experiments.saved": ("full_scale_tables", "results_folder", "saved_ablation", "saved_runs"),
    "experiments.variance": ("Variance", "variance"),
    "training.evaluate": ("evaluate",),
    "training.loop": ("train",),
    "training.pretrained": ("Pretrained", "pretrained"),
    "training.result": ("RunResult", "load_run", "save_run"),
    "training.seeds": ("Seeds",),
    "training.tricks": ("Tricks",),
}


def __getattr__(name: str) -> Any:
    for room, modules in _MODULES.items():
        if name in modules:
            return import_module(f"cifar_fast.{room}.{name}")
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"cifar_fast.{module}"), name)
    raise AttributeError(f"module 'cifar_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "widgets"]
