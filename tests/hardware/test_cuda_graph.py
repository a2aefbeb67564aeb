"""A step that is recorded or compiled computes what the eager one does, and what cannot be is said and done without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.ranks import ALONE, Ranks, flat_gradients
from cifar_fast.errors import TrainingError
from cifar_fast.hardware import cuda_graph as graph
from cifar_fast.hardware.cuda_graph import StepMode, choose_step_mode, compiled, release_captures, rolled_back
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.loop import train
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.optim import build_optimizers, fuse
from cifar_fast.training.result import RunResult
from cifar_fast.training.setup import prepare_steps
from cifar_fast.training.step import TrainingStep, forward_backward, freeze_whitening_bias

training = import_module("cifar_fast.train")  # the module: `cifar_fast.train` is the function

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# The whitening bias is learned in the first of two epochs and frozen in the second.
MUON = replace(
    recipes.smoke(), widths=(4, 8, 8), n_shards=2, global_batch_size=32, whitening_bias_epochs=1.0, precision="float64"
)
SGD = replace(
    recipes.apple_8gpu(),
    widths=(4, 4, 8, 8),
    n_shards=2,
    global_batch_size=32,
    ghost_batch_size=8,
    epochs=2.0,
    flat_epochs=0.2,
    precision="float64",
    compile="off",
)
AUTO = Recipe(cuda_graph="auto", compile="auto")


@pytest.fixture(scope="module")
def data(tiny_data: Dataset) -> Dataset:
    """160 training and 40 test images: five steps an epoch."""
    return replace(
        tiny_data,
        train_images=tiny_data.train_images[:160],
        train_labels=tiny_data.train_labels[:160],
        test_images=tiny_data.test_images[:40],
        test_labels=tiny_data.test_labels[:40],
    )


def run(recipe: Recipe, data: Dataset, device: str = "cpu", **options: Any) -> RunResult:
    return train(recipe, data, device=device, progress=False, **options)


def assert_same_training(a: RunResult, b: RunResult, tolerance: float) -> None:
    for mine, other in zip(a.epochs, b.epochs, strict=True):
        assert mine.train_loss == pytest.approx(other.train_loss, rel=tolerance)
    states = a.model.state_dict(), b.model.state_dict()
    for name, value in states[0].items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, states[1][name], rtol=tolerance, atol=tolerance, msg=name)


# --- What is chosen, and the words for what is not ---


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and a C compiler."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(graph.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_with_both_fields_off_nothing_is_chosen_and_nothing_need_be_explained() -> None:
    for device in (CPU, GPU):
        assert choose_step_mode(Recipe(), device) == StepMode(False, False, ())


def test_a_gpu_with_all_there_records_and_compiles(all_there: None) -> None:
    assert choose_step_mode(AUTO, GPU) == choose_step_mode(AUTO, GPU, "nccl") == StepMode(True, True, ())
    assert choose_step_mode(replace(AUTO, compile="off"), GPU) == StepMode(True, False, ())
    assert choose_step_mode(replace(AUTO, cuda_graph="off"), GPU) == StepMode(False, True, ())


def test_a_cpu_does_neither() -> None:
    launch = choose_step_mode(AUTO, CPU)
    assert not launch.cuda_graph and not launch.compile
    assert [reason.split(":")[0] for reason in launch.reasons] == ["no cuda_graph", "no compile"]
    assert all("no CUDA GPU" in reason for reason in launch.reasons)


def test_what_stands_against_recording_is_said(all_there: None) -> None:
    launch = choose_step_mode(AUTO, GPU, "gloo")
    assert (launch.cuda_graph, launch.compile) == (False, True) and "use NCCL" in launch.reasons[0]
    launch = choose_step_mode(replace(AUTO, resolutions=(16, 32)), GPU)
    assert (launch.cuda_graph, launch.compile) == (False, False) and "resolutions=(16, 32)" in launch.reasons[0]


def test_what_the_compiler_lacks_is_said(all_there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.setattr(graph.shutil, "which", lambda name: None if name == "my-cc" else f"/usr/bin/{name}")
    launch = choose_step_mode(AUTO, GPU)
    assert (launch.cuda_graph, launch.compile) == (True, False) and "there is no my-cc on the path" in launch.reasons[0]
    monkeypatch.delenv("CC")
    assert choose_step_mode(AUTO, GPU).compile
    monkeypatch.setattr(graph.shutil, "which", lambda name: None)
    assert "no gcc or clang or cc" in choose_step_mode(AUTO, GPU).reasons[0]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton is missing" in choose_step_mode(AUTO, GPU).reasons[0]


def test_after_a_recording_has_failed_the_process_tries_no_other(
    all_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph.CapturedFunction, "refused", "operation not permitted")
    launch = choose_step_mode(AUTO, GPU)
    assert (launch.cuda_graph, launch.compile) == (False, True)
    assert "(operation not permitted); start it again" in launch.reasons[0]


def test_what_is_recorded_is_given_up_once_and_those_that_are_gone_are_not_asked() -> None:
    class Stub:
        def __init__(self) -> None:
            self.graph = Mock()

    kept, gone = Stub(), Stub()
    graph.CapturedFunction.alive.update((kept, gone))
    asked = gone.graph.reset
    del gone
    release_captures()
    release_captures()
    assert kept.graph.reset.call_count == 1 and asked.call_count == 0


def test_auto_on_a_cpu_is_silent_and_on_is_not(data: Dataset) -> None:
    recipe = replace(SGD, epochs=0.2, flat_epochs=0.0)
    plain = run(replace(recipe, cuda_graph="off"), data)
    automatic = run(replace(recipe, cuda_graph="auto", compile="auto"), data)  # a warning would be an error here
    with pytest.warns(UserWarning) as caught:
        asked = run(replace(recipe, cuda_graph="on", compile="on"), data)
    said = [str(warning.message) for warning in caught]
    assert [words.split(" is not used: ")[0] for words in said] == ["cuda_graph=on", "compile=on"]
    assert all("no CUDA GPU" in words for words in said)
    assert_same_training(plain, automatic, tolerance=0)
    assert_same_training(plain, asked, tolerance=0)
    assert asked.environment["launch"] == "kernel by kernel" and asked.environment["compiled"] is False
    assert "no CUDA GPU" in automatic.environment["launch_reason"] and plain.environment["launch_reason"] == ""


# --- Recording, with a stand-in for the GPU ---


class Replayed:
    """Does what `CapturedFunction` does, on a CPU: reads its own inputs, writes always the same outputs."""

    made: list[Replayed] = []

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        self.function, self.inputs, self.copies = function, inputs, 0
        for _ in range(graph.WARM_UPS):
            self.outputs = function(*inputs)
        Replayed.made.append(self)

    def __call__(self, *arguments: Tensor) -> Any:
        for own, given in zip(self.inputs, arguments, strict=True):
            if given is not own:
                own.copy_(given)
                self.copies += 1
        for static, value in zip(self.outputs, self.function(*self.inputs), strict=True):
            static.copy_(value)
        return self.outputs


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Replayed]]:
    """Every step is recorded, on the CPU."""
    monkeypatch.setattr(training, "choose_step_mode", lambda *_: StepMode(cuda_graph=True))
    monkeypatch.setattr(training, "CapturedFunction", Replayed)
    Replayed.made.clear()
    yield Replayed


@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_recorded_steps_compute_what_the_others_do(recipe: Recipe, data: Dataset, request: Any) -> None:
    eager = run(recipe, data)
    replayed = request.getfixturevalue("replayed")
    recorded = run(recipe, data)
    # The learning rates are float32 in the device's memory, which is all the difference.
    assert_same_training(recorded, eager, tolerance=1e-4)
    assert recorded.environment["launch"] == "cuda graph"
    assert 0 < recorded.warm_up_seconds < recorded.total_seconds and eager.warm_up_seconds < 0.1 * eager.total_seconds
    # Batches, and a step while the whitening bias is learned and one when it is frozen, where the recipe has both.
    assert len(replayed.made) == (3 if recipe is MUON else 2)


def test_a_batch_made_on_the_gpu_is_not_copied(data: Dataset, replayed: type[Replayed]) -> None:
    run(MUON, data)
    make, *steps = replayed.made
    assert len(steps) == 2 and all(step.copies == 0 for step in steps)
    assert make.copies == 10 * 8  # ten steps, eight choices for each image


def test_a_gpu_that_cannot_record_goes_on_without(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run(MUON, data)

    def refuse(function: Callable[..., Any], *inputs: Tensor) -> None:
        function(*inputs)  # steps have been made when it fails
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(training, "choose_step_mode", lambda *_: StepMode(cuda_graph=True))
    monkeypatch.setattr(training, "CapturedFunction", refuse)
    with pytest.warns(UserWarning, match="the CUDA graph is done without: operation not permitted"):
        result = run(MUON, data)
    assert result.environment["launch"] == "kernel by kernel"
    assert result.environment["launch_reason"].endswith("not permitted when stream is capturing")
    assert_same_training(result, eager, tolerance=1e-4)


def step_of(recipe: Recipe, data: Dataset, device: torch.device = CPU) -> tuple[TrainingStep, TrainBatches]:
    mean, std = pixel_statistics(data.train_images)
    model = build_model(recipe, 10, mean, std).to(device, torch.float64, memory_format=torch.channels_last)
    whiten_first_layer(model, recipe, data.train_images.to(device))
    batches = TrainBatches(data.train_images, data.train_labels, recipe, device=device, dtype=torch.float64)
    optimizers = build_optimizers(model, recipe)
    if device.type == "cuda":
        fuse(optimizers)
    return TrainingStep(model, optimizers, recipe, torch.float64, ALONE), batches


def test_among_several_ranks_one_that_cannot_record_ends_all(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(training, "CapturedFunction", refuse)
    take, batches = step_of(MUON, data)
    with pytest.raises(TrainingError, match="rank 1 cannot record its step: no; train with cuda_graph=off"):
        prepare_steps(replace(take, ranks=Ranks(1, 2, "nccl")), batches, StepMode(cuda_graph=True), {True})


@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_what_is_undone_has_never_been(recipe: Recipe, data: Dataset) -> None:
    (take, batches), (fresh, _) = step_of(recipe, data), step_of(recipe, data)
    first, second, *_ = batches.epoch(0)
    addresses = [value.data_ptr() for value in take.model.state_dict().values()]
    with rolled_back(take.model, take.optimizers):
        take(*second)
        take(*second)
        changed = take.model.state_dict()["layers.linear.weight"].clone()
    assert not torch.equal(changed, fresh.model.state_dict()["layers.linear.weight"])
    assert [value.data_ptr() for value in take.model.state_dict().values()] == addresses
    for batch in (first, second):
        assert torch.equal(take(*batch)[0], fresh(*batch)[0])
    for (name, value), expected in zip(take.model.state_dict().items(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_gradients_in_one_buffer_are_those_without(recipe: Recipe, data: Dataset) -> None:
    (take, batches), (other, _) = step_of(recipe, data), step_of(recipe, data)
    buffer = flat_gradients(take.model)
    images, labels = next(batches.epoch(0))
    for _ in range(2):  # they add up, in place
        forward_backward(take.model, images, labels, recipe, torch.float64)
        forward_backward(other.model, images, labels, recipe, torch.float64)
    assert buffer.any()
    for (name, p), q in zip(take.model.named_parameters(), other.model.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None and p.grad.stride() == p.stride()
            assert p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    replace(take, gradients=buffer).clear_gradients()
    assert not buffer.any() and all(p.grad is not None for p in take.model.parameters() if p.requires_grad)


def test_a_frozen_bias_stays_although_its_gradient_is_a_zero_in_the_buffer(data: Dataset) -> None:
    take, batches = step_of(MUON, data)
    take = replace(take, gradients=flat_gradients(take.model), ranks=Silent())
    stream, bias = batches.epoch(0), take.model.get_parameter("layers.whiten.bias")
    training.set_learning_rates(take.optimizers, training.lr_schedule(MUON), 0.5)
    before = bias.detach().clone()
    take(*next(stream))
    learned = bias.detach().clone()
    assert not torch.equal(learned, before)
    freeze_whitening_bias(take.model, True)
    training.set_learning_rates(take.optimizers, training.lr_schedule(MUON), MUON.whitening_bias_epochs)
    take(*next(stream))
    assert torch.equal(bias, learned)


class Silent(Ranks):
    """Averages over itself alone."""

    def average_buffer(self, *_: Any, **__: Any) -> None:
        pass


# --- Compiling ---


def test_what_is_compiled_is_kept_in_the_packages_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled(torch.sin)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    compiled(torch.sin)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_a_compiler_that_fails_is_done_without(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ZeroDivisionError("in the middle of it\nand more")

    plain = run(SGD, data)
    monkeypatch.setattr(training, "choose_step_mode", lambda *_: StepMode(compile=True))
    monkeypatch.setattr(training, "compiled", lambda function: Broken() if isinstance(function, Network) else function)
    with pytest.warns(UserWarning, match="torch.compile is done without: ZeroDivisionError: in the middle of it$"):
        result = run(SGD, data)
    assert result.environment["compiled"] is False
    assert result.environment["launch_reason"] == "no compile: ZeroDivisionError: in the middle of it"
    assert_same_training(result, plain, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_compiled_as_a_whole_it_computes_the_same_and_is_compiled_once_for_all_runs(
    recipe: Recipe, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(recipe, data), run(recipe, data, seed=1)

    def as_on_a_gpu(norm: GhostBatchNorm, x: Tensor) -> Tensor:
        groups = norm.training and len(x) > norm.group_size
        return norm.all_groups_at_once(x) if groups else torch.nn.BatchNorm2d.forward(norm, x)

    monkeypatch.setattr(GhostBatchNorm, "forward", as_on_a_gpu)
    monkeypatch.setattr(training, "choose_step_mode", lambda *_: StepMode(compile=True))
    # All of torch.compile but the code that it writes: graph breaks and guards are found without a GPU.
    monkeypatch.setattr(training, "compiled", partial(compiled, backend="eager"))
    torch._dynamo.reset()
    first = run(recipe, data)
    assert first.environment["compiled"] is True
    assert_same_training(first, plain[0], tolerance=1e-9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_training(run(recipe, data, seed=1), plain[1], tolerance=1e-9)


# --- On a GPU ---


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
def test_what_is_recorded_is_done_again_with_new_inputs() -> None:
    total = torch.zeros(3, device="cuda")

    def add(values: Tensor) -> Tensor:
        total.add_(values)
        return 2 * total

    given = torch.ones(3, device="cuda")
    recorded = graph.CapturedFunction(add, given)
    assert total.tolist() == [float(graph.WARM_UPS)] * 3, "the recording itself does nothing"
    total.zero_()
    assert recorded(given).tolist() == [2.0] * 3
    doubled = recorded(torch.full((3,), 5.0, device="cuda"))
    assert doubled.tolist() == [12.0] * 3 and given.tolist() == [5.0] * 3
    recorded(given)
    assert doubled.tolist() == [22.0] * 3, "the same tensor each time"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
@pytest.mark.parametrize("preload", [True, False])
def test_the_recorded_step_gives_the_eager_steps_weights(recipe: Recipe, preload: bool, data: Dataset) -> None:
    recipe = replace(recipe, preload=preload, epochs=1.2, flat_epochs=0.0)
    eager, recorded = (run(replace(recipe, cuda_graph=mode), data, "cuda") for mode in ("off", "on"))
    assert [result.environment["launch"] for result in (eager, recorded)] == ["kernel by kernel", "cuda graph"]
    assert_same_training(recorded, eager, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # compiling, with nothing on disk yet
@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_the_compiled_step_agrees_with_the_eager_one(
    recipe: Recipe, cuda_graph: str, data: Dataset, no_tf32: None
) -> None:
    # Not float64: it is slow to compile. One step: Muon brings even the faintest directions to length one.
    recipe = replace(recipe, precision="float32", epochs=0.2, flat_epochs=0.0)
    eager = run(replace(recipe, compile="off", cuda_graph="off"), data, "cuda")
    other = run(replace(recipe, compile="on", cuda_graph=cuda_graph), data, "cuda")
    assert other.environment["compiled"] is True and other.environment["launch_reason"] == ""
    assert other.epochs[0].train_loss == pytest.approx(eager.epochs[0].train_loss, rel=1e-4)
    assert other.epochs[0].test_loss == pytest.approx(eager.epochs[0].test_loss, rel=2e-2)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_recorded_and_compiled_training_learns_in_half_precision(precision: str, tiny_data: Dataset) -> None:
    recipe = replace(
        recipes.speedrun(),
        widths=(16, 32, 32),
        n_shards=2,
        logit_scale=1 / 16,
        global_batch_size=32,
        peak_lr=recipes.speedrun().peak_lr * 32 / 1536,
        epochs=5.0,
        crop_padding=0,
        flip="none",
        color_jitter=0.0,
        precision=precision,
        cuda_graph="on",
        compile="on",
    )
    result = run(recipe, tiny_data, "cuda")
    assert result.environment["precision"] == precision and result.environment["launch"] == "cuda graph"
    assert result.accuracy > 0.3


@pytest.mark.gpu
def test_no_step_of_an_epoch_waits_for_the_gpu(data: Dataset) -> None:
    take, batches = step_of(MUON, data, GPU)
    steps, launch = prepare_steps(take, batches, StepMode(cuda_graph=True), {False, True})
    assert launch.cuda_graph
    stream = batches.epoch(0)
    first = next(stream)  # what an epoch sends to the device has been sent
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps[False](*first)
        for images, labels in stream:
            freeze_whitening_bias(take.model, True)
            training.set_learning_rates(take.optimizers, training.lr_schedule(MUON), 0.5)
            steps[True](images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[Ranks]:
    """This process as a group of one, over NCCL."""
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield Ranks(0, 1, "nccl", device)
    release_captures()
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])
def test_an_all_reduce_in_the_graph_changes_nothing_for_one_process(recipe: Recipe, data: Dataset, nccl: Ranks) -> None:
    alone = run(replace(recipe, cuda_graph="off"), data, "cuda")
    eager, recorded = (run(replace(recipe, cuda_graph=mode), data, "cuda", ranks=nccl) for mode in ("off", "on"))
    assert recorded.environment["launch"] == "cuda graph" and recorded.environment["backend"] == "nccl"
    assert_same_training(eager, alone, tolerance=1e-9)
    assert_same_training(recorded, alone, tolerance=1e-4)
