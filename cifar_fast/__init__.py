"""The public names of the package; those that need torch are loaded on first use, so that importing it is quick."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cifar_fast import recipe as recipes
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe, changed_fields, ladder

if TYPE_CHECKING:  # what `__getattr__` does, for editors and type checkers
    from cifar_fast import exercises, figures, galleries, gpu_results, plan, plots, scales
    from cifar_fast import widgets as widgets
    from cifar_fast.ablation import Ablation, ablation, filed, full_scale, measured, results_folder
    from cifar_fast.benchmark import Benchmark, benchmark, load_benchmark
    from cifar_fast.data import Dataset, load_cifar10, load_or_synthetic, synthetic
    from cifar_fast.evaluate import evaluate
    from cifar_fast.parallel import Trainer, launch
    from cifar_fast.result import RunResult, load_run, save_run
    from cifar_fast.train import train

__version__ = "0.1.0"

__all__ = [
    "Ablation",
    "Benchmark",
    "Dataset",
    "Recipe",
    "RunResult",
    "Trainer",
    "UserError",
    "__version__",
    "ablation",
    "benchmark",
    "changed_fields",
    "evaluate",
    "exercises",
    "figures",
    "filed",
    "full_scale",
    "galleries",
    "gpu_results",
    "ladder",
    "launch",
    "load_benchmark",
    "load_cifar10",
    "load_or_synthetic",
    "load_run",
    "measured",
    "plan",
    "plots",
    "recipes",
    "replace",
    "results_folder",
    "save_run",
    "scales",
    "synthetic",
    "train",
]

# `widgets` is not in __all__: without the extra `notebooks` it cannot be imported, and says so.
_MODULES = ("exercises", "figures", "galleries", "gpu_results", "plan", "plots", "scales", "widgets")
_MODULE_OF = {
    "Ablation": "ablation",
    "ablation": "ablation",
    "filed": "ablation",
    "full_scale": "ablation",
    "measured": "ablation",
    "results_folder": "ablation",
    "Benchmark": "benchmark",
    "benchmark": "benchmark",
    "load_benchmark": "benchmark",
    "Dataset": "data",
    "load_cifar10": "data",
    "load_or_synthetic": "data",
    "synthetic": "data",
    "evaluate": "evaluate",
    "Trainer": "parallel",
    "launch": "parallel",
    "RunResult": "result",
    "load_run": "result",
    "save_run": "result",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"cifar_fast.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cifar_fast' has no attribute {name!r}")
    return getattr(import_module(f"cifar_fast.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "widgets"]


class _Package(ModuleType):
    """Whoever imports a module that is named as its function is, the name goes on meaning the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("ablation", "train", "evaluate", "benchmark") and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
