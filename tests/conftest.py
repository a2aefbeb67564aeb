"""What all tests share: no GPU test without a GPU, small data, and nobody's real cache."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from cifar_fast.data.dataset import Dataset
    from cifar_fast.kernels.compile import Library

# No test depends on time or on luck: no deadlines, and the same examples on every machine.
settings.register_profile(
    "cifar_fast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("cifar_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of all tests of a session, in all its processes: kernels are compiled into it once."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def user_data_root(cache_folder: Path) -> Iterator[Path | None]:
    """Hides the user's settings and cache from the tests of a file; the value is what CIFAR_FAST_DATA was before.

    Notebooks, which the same process may run between two files of tests, see them.
    """
    root = os.environ.get("CIFAR_FAST_DATA")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CIFAR_FAST_")]:
            patch.delenv(name)
        patch.setenv("CIFAR_FAST_CACHE", str(cache_folder))
        patch.setenv("MPLBACKEND", "agg")
        yield Path(root).absolute() if root else None


@pytest.fixture(scope="session")
def emulated_amx() -> Library:
    """`amx.c` with the instructions of AMX and AVX-512 in plain C, which runs on any processor."""
    from cifar_fast.kernels import amx, fused
    from cifar_fast.kernels import compile as native

    header = Path(__file__).with_name("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", (*native.FLAGS, "-DCIFAR_FAST_EMULATE_AMX", f"-I{header}"))
        patch.setattr(native, "FILES", ("amx.c",))
        library = replace(amx.LIBRARY)
        usable, why_not = library.available()
    if not usable and not fused.available()[0]:
        pytest.skip(why_not)
    assert usable, why_not
    return library


@pytest.fixture
def amx_everywhere(emulated_amx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX is available in this test, emulated where the processor has none."""
    from cifar_fast.kernels import amx

    if not amx.available()[0]:
        monkeypatch.setattr(amx, "LIBRARY", emulated_amx)
        monkeypatch.setattr(amx, "available", emulated_amx.available)


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
