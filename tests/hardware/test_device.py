"""The right device is selected, and a result names the machine that it stands on."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from cifar_fast.errors import UserError
from cifar_fast.hardware import device as devices
from cifar_fast.hardware.device import OTHER_GPUS, environment, has_float64, keep_freed_memory, select_device

CPU = torch.device("cpu")


def with_gpus(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


# --- Which device ---


def test_the_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert select_device() == CPU
    with_gpus(monkeypatch, 2)
    assert select_device() == torch.device("cuda")


def test_a_device_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert [select_device(name) for name in ("cpu", "cuda", "cuda:1")] == [
        CPU,
        torch.device("cuda"),
        torch.device("cuda", 1),
    ]


@pytest.mark.parametrize(("name", "n_gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_missing_gpu_is_refused(name: str, n_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, n_gpus)
    with pytest.raises(UserError, match=f"device '{name}' is not there: .*{n_gpus} GPUs"):
        select_device(name)


@pytest.mark.parametrize(
    ("name", "said"), [("gpu", "not known"), ("cuda:x", "not known"), ("", "not known"), ("meta", "not supported")]
)
def test_an_unknown_device_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}' is {said}.*cpu"):
        select_device(name)


def test_other_gpus_are_taken_only_by_name_and_refused_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    for kind in OTHER_GPUS:
        monkeypatch.setattr(devices, "count_other_gpus", lambda kind: 1)
        assert select_device(kind) == torch.device(kind) and select_device() == CPU
        assert not has_float64(torch.device(kind))
        with pytest.raises(UserError, match=f"device '{kind}:1' is not there"):
            select_device(f"{kind}:1")
        monkeypatch.setattr(devices, "count_other_gpus", lambda kind: 0)
        with pytest.raises(UserError, match=f"device '{kind}' is not there: this torch.* needs .*; use cpu or cuda"):
            monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
            monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: False)
            select_device(kind)
        with pytest.raises(UserError, match=f"device '{kind}' is not there: torch finds none: it needs"):
            monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
            monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: True)
            select_device(kind)


# --- What a result stands on ---


def test_the_environment_names_hardware_and_versions_in_plain_values() -> None:
    found = environment(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["gpu"] is None and found["cuda"] is None
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gb"] > 0


@pytest.mark.gpu
def test_the_environment_names_the_gpu() -> None:
    found = environment(torch.device("cuda"))
    assert found["gpu"] == torch.cuda.get_device_name() and found["cuda"] == torch.version.cuda


# --- Memory ---


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The C library of this system, of which only `mallopt` is there; `asked` is what it was called with."""
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)), asked=asked)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory.cache_clear()
    yield library
    keep_freed_memory.cache_clear()


def test_glibc_is_told_once_to_keep_freed_memory(libc: SimpleNamespace) -> None:
    keep_freed_memory()
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as in malloc.h
    assert dict(libc.asked) == {mmap_threshold: 1 << 30, trim_threshold: (1 << 31) - 1, top_pad: 64 << 20}
    libc.asked.clear()
    keep_freed_memory()
    assert libc.asked == []


def test_other_c_libraries_are_left_alone(libc: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        keep_freed_memory()
        assert libc.asked == []
    keep_freed_memory.cache_clear()
    del libc.mallopt  # musl's has none
    keep_freed_memory()
