"""Each C file is compiled once, all of them in parallel, whole or not at all; without one, torch computes instead."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.kernels import amx, fused, winograd
from cifar_fast.kernels import compile as native
from cifar_fast.training.layers import GhostBatchNorm

needs_compiler = pytest.mark.skipif(not fused.available()[0], reason=fused.available()[1])
KERNELS = (winograd, fused, amx)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))  # compiles faster
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library is loaded anew when the test needs it, and again after the test."""
    for kernel in KERNELS:
        monkeypatch.setitem(vars(kernel.LIBRARY), "_loaded", None)
        del vars(kernel.LIBRARY)["_loaded"]


# --- Compiling ---


@needs_compiler
def test_a_file_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.load("fused.c")
    assert [path.suffix for path in cache.iterdir()] == [".so"] * len(native.FILES)  # nothing else is left
    monkeypatch.setattr(native, "_run", lambda *command: pytest.fail(f"compiled again: {command}"))
    assert native.load("fused.c")._name == first._name
    native.load("winograd.c")


@needs_compiler
def test_another_compiler_compiles_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FILES", ("amx.c",))
    first = native.load("amx.c")._name
    other = tmp_path / "other"
    other.write_text('#!/bin/sh\ncase "$1" in --version) echo other ;; *) exec cc "$@" ;; esac\n')
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    assert native.load("amx.c")._name != first
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_the_compilers_message_is_passed_on_and_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) echo 1 ;; *) echo "no room" >&2; exit 1 ;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(OSError, match=r"broken .* failed: no room"):
        native.load("fused.c")
    assert list(cache.iterdir()) == []


def test_every_c_file_of_the_package_is_compiled() -> None:
    assert sorted(path.name for path in Path(native.__file__).parent.glob("*.c")) == sorted(native.FILES)
    assert sorted(kernel.LIBRARY.source for kernel in KERNELS) == sorted(native.FILES)


# --- Machines that lack something ---


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_each_kernel_gives_the_reason_and_torch_computes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    reason = "no C compiler `no-such-compiler` on the path: install gcc, or set CC to its name"
    for kernel in KERNELS:
        assert kernel.available() == (False, reason)
        with pytest.raises(OSError, match="no C compiler"):
            kernel.LIBRARY.functions  # noqa: B018
    assert not cache.exists()
    x, weight = images(16), torch.randn(16, 16, 3, 3)
    require_conv2d(winograd.winograd_conv2d, winograd.winograd_conv2d_max_pool, x, weight)
    require_conv2d(amx.amx_conv2d, amx.amx_conv2d_max_pool, x.bfloat16(), weight.bfloat16())
    norm = GhostBatchNorm(16, 2, eps=1e-5, momentum=0.1, freeze_scale=False)
    assert torch.equal(copy.deepcopy(norm).then(nn.ReLU(), x), nn.ReLU()(norm(x)))


@pytest.mark.usefixtures("fresh")
def test_where_the_system_does_not_permit_amx_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda name: SimpleNamespace(permit=lambda: -1))
    require_no_amx()


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_compiled_for_a_processor_without_amx_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-fopenmp", "-fPIC"))
    monkeypatch.setattr(native, "FILES", ("amx.c",))
    require_no_amx()


def require_no_amx() -> None:
    usable, reason = amx.available()
    assert not usable and "does not support AMX" in reason
    x, weight = images(16).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16()
    require_conv2d(amx.amx_conv2d, amx.amx_conv2d_max_pool, x, weight)


def require_conv2d(convolve, convolve_and_pool, x: torch.Tensor, weight: torch.Tensor) -> None:
    y = F.conv2d(x, weight, padding=1)
    assert torch.equal(convolve(x, weight), y)
    assert torch.equal(convolve_and_pool(x, weight), F.max_pool2d(y, 2))


def images(channels: int) -> torch.Tensor:
    return torch.randn(4, channels, 8, 8).contiguous(memory_format=torch.channels_last)
