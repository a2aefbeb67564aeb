"""Made-up runs for the tests of this folder."""

from __future__ import annotations

from typing import Any

from cifar_fast.experiments.published import CIFAR10_FINGERPRINT
from cifar_fast.recipes import apple_8gpu

CIFAR10 = {"name": "CIFAR-10", "fingerprint": CIFAR10_FINGERPRINT, "n_train": 50_000, "n_test": 10_000}
MACHINE = {
    "device": "cpu", "gpu": None, "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 2, "torch": "2.14.1",
    "python": "3.11.7", "precision": "float32", "convolution": "winograd", "world_size": 1, "backend": None,
}  # fmt: skip


def a_run(number: int, accuracy: float, seconds: float, **changes: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    epoch = {"epoch": 1, "train_loss": 1.25, "train_accuracy": 0.875, "test_loss": 0.5, "test_accuracy": accuracy}
    clocks = {"train_seconds": seconds, "evaluate_seconds": seconds / 10, "total_seconds": 2 * seconds}
    line = {"run": number, "seed": number, "target": 0.94, "version": "0.1.0", "accuracy": accuracy, "loss": 0.5}
    recipe = apple_8gpu().to_dict()
    return line | clocks | {"recipe": recipe, "dataset": CIFAR10, "environment": MACHINE, "epochs": [epoch]} | changes


RUNS = [a_run(i, accuracy, 7 + i) for i, accuracy in enumerate((0.9401, 0.94, 0.9374, 0.9419, 0.9425))]
