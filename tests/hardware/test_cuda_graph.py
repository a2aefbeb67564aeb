"""How a step gets to a GPU: which mode is chosen and why, and what a captured function does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import Tensor

from cifar_fast.hardware import cuda_graph as graph
from cifar_fast.hardware.cuda_graph import CapturedFunction, StepMode, choose_step_mode, compiled, release_captures
from cifar_fast.recipe import Recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = Recipe(cuda_graph="auto", compile="auto")


# --- The mode of a step, and the reasons ---


@pytest.fixture
def has_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and a C compiler."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(graph.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_with_both_fields_off_the_step_is_eager_without_a_reason() -> None:
    for device in (CPU, GPU):
        assert choose_step_mode(Recipe(), device) == StepMode(False, False, ())


def test_a_gpu_with_a_compiler_captures_and_compiles(has_compiler: None) -> None:
    assert choose_step_mode(AUTO, GPU) == choose_step_mode(AUTO, GPU, "nccl") == StepMode(True, True, ())
    assert choose_step_mode(replace(AUTO, compile="off"), GPU) == StepMode(True, False, ())
    assert choose_step_mode(replace(AUTO, cuda_graph="off"), GPU) == StepMode(False, True, ())


def test_a_cpu_does_neither() -> None:
    mode = choose_step_mode(AUTO, CPU)
    assert not mode.cuda_graph and not mode.compile
    assert [reason.split(":")[0] for reason in mode.reasons] == ["no cuda_graph", "no compile"]
    assert all("not a CUDA GPU" in reason for reason in mode.reasons)


def test_gloo_rules_out_a_capture_and_changing_resolutions_rule_out_nothing(has_compiler: None) -> None:
    mode = choose_step_mode(AUTO, GPU, "gloo")
    assert (mode.cuda_graph, mode.compile) == (False, True) and "use NCCL" in mode.reasons[0]
    assert choose_step_mode(replace(AUTO, resolutions=(16, 32)), GPU) == StepMode(True, True, ())


def test_a_missing_compiler_is_named(has_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.setattr(graph.shutil, "which", lambda name: None if name == "my-cc" else f"/usr/bin/{name}")
    mode = choose_step_mode(AUTO, GPU)
    assert (mode.cuda_graph, mode.compile) == (True, False) and "there is no my-cc on the PATH" in mode.reasons[0]
    monkeypatch.delenv("CC")
    assert choose_step_mode(AUTO, GPU).compile
    monkeypatch.setattr(graph.shutil, "which", lambda name: None)
    assert "no gcc or clang or cc" in choose_step_mode(AUTO, GPU).reasons[0]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton is missing" in choose_step_mode(AUTO, GPU).reasons[0]


def test_after_a_failed_capture_the_process_tries_no_other(has_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedFunction, "refused", "operation not permitted")
    mode = choose_step_mode(AUTO, GPU)
    assert (mode.cuda_graph, mode.compile) == (False, True)
    assert "(operation not permitted); start it again" in mode.reasons[0]


def test_captures_that_still_exist_are_released_once() -> None:
    class Stub:
        def __init__(self) -> None:
            self.graph = Mock()

    kept, gone = Stub(), Stub()
    CapturedFunction.alive.update((kept, gone))
    reset_of_gone = gone.graph.reset
    del gone
    release_captures()
    release_captures()
    assert kept.graph.reset.call_count == 1 and reset_of_gone.call_count == 0


# --- Compiled code on disk ---


def test_compiled_code_stays_in_the_packages_cache_although_torch_has_set_its_own(tmp_path: Path) -> None:
    # A fresh process: here other tests may have changed the variable.
    script = (
        "import os, torch, torch._dynamo\n"
        "before = os.environ.get('TORCHINDUCTOR_CACHE_DIR')\n"
        "from cifar_fast.hardware.cuda_graph import compiled\n"
        "compiled(torch.sin)\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir\n"
        "print(before, cache_dir(), sep='\\n')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["CIFAR_FAST_CACHE"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    before, after = result.stdout.splitlines()
    assert before not in ("None", after)  # what this test is about: torch has set it
    assert after == str(tmp_path / "compiled")


def test_a_cache_that_the_user_has_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    compiled(torch.sin)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


# --- A captured function ---


class BrokenCapture:
    """Behaves like `torch.cuda.graph` when an operation inside the capture fails."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [RuntimeError("no .item() during a capture"), KeyboardInterrupt()], ids=type)
def test_a_failed_capture_raises_its_cause_and_not_what_follows(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_in_the_capture(values: Tensor) -> None:
        calls.append(values)
        if len(calls) > graph.WARM_UPS:
            raise error

    for name in ("device", "stream", "Stream", "current_stream", "set_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", BrokenCapture)
    monkeypatch.setattr(CapturedFunction, "refused", "")
    with pytest.raises(type(error)) as caught:
        CapturedFunction(fail_in_the_capture, torch.zeros(3))
    assert caught.value is error
    assert CapturedFunction.refused == f"{type(error).__name__}: {error}"


@pytest.mark.gpu
def test_a_captured_function_repeats_its_work_on_new_inputs() -> None:
    total = torch.zeros(3, device="cuda")

    def add(values: Tensor) -> Tensor:
        total.add_(values)
        return 2 * total

    given = torch.ones(3, device="cuda")
    captured = CapturedFunction(add, given)
    assert total.tolist() == [float(graph.WARM_UPS)] * 3, "the capture itself changes nothing"
    total.zero_()
    assert captured(given).tolist() == [2.0] * 3
    doubled = captured(torch.full((3,), 5.0, device="cuda"))
    assert doubled.tolist() == [12.0] * 3 and given.tolist() == [5.0] * 3
    captured(given)
    assert doubled.tolist() == [22.0] * 3, "the same tensor each time"


@pytest.mark.gpu
def test_a_gpu_names_the_operation_that_broke_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedFunction, "refused", "")
    with pytest.raises(RuntimeError) as caught:
        CapturedFunction(lambda values: values.sum().item(), torch.ones(3, device="cuda"))
    assert "previous error" not in str(caught.value)


@pytest.mark.gpu
def test_a_second_capture_fits_into_the_memory_of_the_first() -> None:
    def work(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 1
        return x.sum()

    sizes = (4_000_000, 3_000_000)  # MB-sized: small tensors share blocks in any case
    inputs = [torch.ones(size, device="cuda") for size in sizes]
    reserved: list[int] = []
    captured: list[CapturedFunction] = []
    for ones in inputs:
        captured.append(CapturedFunction(work, ones, other=captured[0] if captured else None))
        torch.cuda.empty_cache()  # of what only the warm-up needed
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[0]
    # In the order of their captures, and the other way round: each is right until the next.
    for number in (0, 1, 0):
        assert captured[number](inputs[number]).item() == 4 * sizes[number]
