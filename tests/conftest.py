"""What all tests share: no GPU test without a GPU, small data, and nobody's real cache."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from cifar_fast.data.dataset import Dataset

# No test depends on time or on luck: no deadlines, and the same examples on every machine.
settings.register_profile(
    "cifar_fast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("cifar_fast")


LONGEST = ("test_lab.py", "test_benchmark.py", "test_processes.py", "test_launch.py", "test_notebooks.py")
"""Files of minutes, which start first: else one test process is still at the last of them when the other has ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that runs the tests in the background has them ignore Ctrl-C, which what they start would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def user_data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """Hides the user's settings and cache from every test; the value is what CIFAR_FAST_DATA was before."""
    root = os.environ.get("CIFAR_FAST_DATA")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CIFAR_FAST_")]:
            patch.delenv(name)
        patch.setenv("CIFAR_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "agg")
        yield Path(root).absolute() if root else None


@pytest.fixture(scope="session")
def tiny_data() -> Dataset:
    """640 training and 200 test images of the synthetic set, 10 classes."""
    from cifar_fast.data.synthetic import synthetic

    return synthetic(640, 200, seed=0)


@pytest.fixture
def real_data(user_data_root: Path | None, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """CIFAR-10 from the user's CIFAR_FAST_DATA, which is set again while the test runs."""
    if user_data_root is None:
        pytest.skip("needs CIFAR-10: set CIFAR_FAST_DATA to the folder that holds it")
    from cifar_fast.data.load import load_cifar10

    monkeypatch.setenv("CIFAR_FAST_DATA", str(user_data_root))
    return load_cifar10(download=False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: three classes of one colour and noise, 40 training and 10 test pictures each."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("data") / "colours"
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """benchmarks/gpu.py, a fresh one for each file of tests."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", folder / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # where a script finds its neighbours
        spec.loader.exec_module(module)
    return module
