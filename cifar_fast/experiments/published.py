"""Holds the times and accuracies that others have published, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CIFAR10_FINGERPRINT = "9048fcbac9c08a64"
"""`Dataset.fingerprint` of the official CIFAR-10, the only data set with which published figures can be compared."""


@dataclass(frozen=True)
class Published:
    """Published runs on CIFAR-10: accuracies as shares 0 ... 1, times in seconds."""

    name: str
    source: str
    hardware: str
    runs: int
    target: float
    at_target: int
    min_accuracy: float
    median_accuracy: float
    mean_seconds: float
    max_seconds: float
    clock: str
    run_log: str
    """What the publication's own log of its runs says about the times, where that differs."""


APPLE_2019 = Published(
    name="Apple 2019 on 8 V100",
    source="Apple, ml-cifar-10-faster (github.com/apple/ml-cifar-10-faster), 2019",
    hardware="8 V100-SXM2 32 GB, one 20-core Xeon Gold 6148",
    runs=50,
    target=0.94,
    at_target=41,
    min_accuracy=0.9374,
    median_accuracy=0.9419,
    mean_seconds=7.81,
    max_seconds=10.31,
    clock="training with preprocessing, without validation; its code excludes about 0.47 s of whitening statistics",
    run_log="mean 7.885 s, median 7.819 s, minimum 7.787 s",
)


@dataclass(frozen=True)
class Record:
    """A published time of training to 94 % test accuracy on CIFAR-10, by the publication's own clock."""

    system: str
    year: int
    hardware: str
    seconds: float
    added: str
    """What was new; `-` if we found no description."""
    source: str


_DAWNBENCH = "DAWNBench's list of entries, 2017 to 2020"
_PAGE = 'David Page, "How to train your ResNet", 2018 and 2019'
_AIRBENCH = "Keller Jordan, arXiv 2404.00498"
_FULCRUM = "Fulcrum's report, July 2026 (n = 200); the keeper of the record has not acknowledged it"

RECORDS = (
    Record("DAWNBench's first, ResNet-164", 2017, "16 vCPU", 79 * 3600.0, "the clock to beat", _DAWNBENCH),
    Record("DAWNBench's best on one GPU", 2018, "1 V100", 341.0, "where Page's posts of 2018 start", _PAGE),
    Record("fast.ai", 2018, "8 V100", 174.0, "-", _DAWNBENCH),
    Record("Page, DAWNBench", 2018, "1 V100", 75.0, "a small ResNet-9: baseline_2018", _PAGE),
    Record("Page, bag of tricks", 2019, "1 V100", 26.0, "the ladder of 00: page_2019", _PAGE),
    Record("Baidu", 2019, "8 V100", 44.0, "-", _DAWNBENCH),
    Record("Kakao Brain", 2019, "4 V100", 28.0, "-", _DAWNBENCH),
    Record("Apple, ml-cifar-10-faster", 2019, "8 V100", 9.43, "Page's tricks on 8 GPUs: apple_8gpu", _DAWNBENCH),
    Record("Arasanipalai", 2020, "4 V100", 10.7, "-", _DAWNBENCH),
    Record("hlb-CIFAR10", 2023, "1 A100", 6.3, "Page's system rewritten, memory format, tuning", "its repository"),
    Record(
        "airbench94",
        2024,
        "1 A100",
        3.83,
        "dirac weights, 2x2 whitening, alternating flip, Lookahead, 6-view TTA",
        _AIRBENCH,
    ),
    Record("airbench94, compiled", 2024, "1 A100", 3.09, "the same through torch.compile", _AIRBENCH),
    Record(
        "airbench94 with Muon",
        2024,
        "1 A100",
        2.59,
        "Muon: orthogonalised momentum on the filters",
        "Keller Jordan's account of Muon, 2024: from 3.3 s to 2.6 s, both compiled",
    ),
    Record(
        "tinygrad",
        2025,
        "1 RTX 4090",
        2.47,
        "another framework, which falls short of 94 %",
        "its closed pull request 17223",
    ),
    Record(
        "Hiverge",
        2025,
        "1 A100",
        1.99,
        "batched Newton-Schulz, colour jitter, TTA on unsure images only",
        "its blog; its repository says 2.095 s, and Fulcrum measured 1.978 s",
    ),
    Record("Fulcrum", 2026, "1 A100", 1.828, "images of 24, 28 and 32 pixels, the whole run captured", _FULCRUM),
    Record("Fulcrum, two GPUs", 2026, "2 A100", 1.14, "the same on two GPUs", _FULCRUM),
)
"""Each by its own clock; since 2023 they exclude compilation. Apple's entry counts to the first epoch at 94 %."""

LADDER_2019 = {
    "baseline_2018": 75.0,
    "preload_2019": 70.0,
    "pool_before_activation_2019": 67.0,
    "pool_before_norm_retuned_2019": 64.0,
    "label_smoothing_retuned_2019": 59.0,
    "celu_retuned_2019": 52.0,
    "ghost_batch_norm_retuned_2019": 46.0,
    "bias_lr_retuned_2019": 43.0,
    "whitening_retuned_2019": 36.0,
    "ema_retuned_2019": 33.5,
    "page_2019": 26.0,
}
"""Page's published training seconds on one V100, by rung of `recipes.ladder()`; the mean accuracy of 50 runs is 94.1 %
on each. Source: David Page, "How to train your ResNet 8: bag of tricks", 2019."""


def comparable(dataset: Mapping[str, Any]) -> bool:
    """Return whether this data set is CIFAR-10 to the last pixel, so that its figures compare with published ones."""
    return dataset["fingerprint"] == CIFAR10_FINGERPRINT
