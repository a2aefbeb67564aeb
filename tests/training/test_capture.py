"""A compiled or captured step computes what the eager one does, and one that cannot be runs eagerly and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.ranks import Ranks
from cifar_fast.errors import TrainingError
from cifar_fast.hardware import cuda_graph as graph
from cifar_fast.hardware.cuda_graph import StepMode, compiled, release_captures
from cifar_fast.recipe import Recipe
from cifar_fast.training import capture, setup
from cifar_fast.training.alone import ALONE, Alone
from cifar_fast.training.capture import prepare_step, rolled_back
from cifar_fast.training.layers import GhostBatchNorm
from cifar_fast.training.loop import train
from cifar_fast.training.model import Network
from cifar_fast.training.optim import Muon, move_banks, recipe_optimizers
from cifar_fast.training.result import RunResult
from cifar_fast.training.setup import Setup, choose_execution, set_up
from cifar_fast.training.tricks import Tricks

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Five steps an epoch. The whitening bias is learned in the first of two epochs and frozen in the second.
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
BOTH = pytest.mark.parametrize("recipe", [MUON, SGD], ids=["muon", "sgd"])


def run(recipe: Recipe, data: Dataset, device: str = "cpu", **options: Any) -> RunResult:
    return train(recipe, data, device=device, progress=False, **options)


def prepared(recipe: Recipe, data: Dataset, mode: StepMode, device: torch.device = CPU, ranks: Alone = ALONE) -> Setup:
    execution = replace(choose_execution(recipe, device), step_mode=mode)
    return set_up(recipe, data, execution, device=device, ranks=ranks)


def assert_same_run(a: RunResult, b: RunResult, tolerance: float) -> None:
    for mine, other in zip(a.epochs, b.epochs, strict=True):
        assert mine.train_loss == pytest.approx(other.train_loss, rel=tolerance)
    states = a.model.state_dict(), b.model.state_dict()
    for name, value in states[0].items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, states[1][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def eager(data: Dataset) -> dict[str, RunResult]:
    """The eager run of each recipe."""
    return {recipe.name: run(recipe, data) for recipe in (MUON, SGD)}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every step choose a mode, on a CPU too."""

    def choose(**mode: bool) -> None:
        monkeypatch.setattr(setup, "choose_step_mode", lambda *_: StepMode(**mode))

    return choose


def test_auto_on_a_cpu_is_silent_and_on_warns(data: Dataset) -> None:
    recipe = replace(SGD, epochs=0.2, flat_epochs=0.0)
    plain = run(replace(recipe, cuda_graph="off"), data)
    automatic = run(replace(recipe, cuda_graph="auto", compile="auto"), data)  # a warning would be an error here
    with pytest.warns(UserWarning) as caught:
        asked = run(replace(recipe, cuda_graph="on", compile="on"), data)
    said = [str(warning.message) for warning in caught]
    assert [words.split(" is not used: ")[0] for words in said] == ["cuda_graph=on", "compile=on"]
    assert all("not a CUDA GPU" in words for words in said)
    assert_same_run(plain, automatic, tolerance=0)
    assert_same_run(plain, asked, tolerance=0)
    assert asked.environment["step_mode"] == "eager" and plain.environment["step_mode_reason"] == ""
    assert "not a CUDA GPU" in automatic.environment["step_mode_reason"]


# --- Capturing, with a stand-in for the GPU ---


class Replayed:
    """Does what `CapturedFunction` does, on a CPU: reads its own inputs, always writes the same outputs."""

    made: list[Replayed] = []

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, other: Replayed | None = None) -> None:
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
def replayed(monkeypatch: pytest.MonkeyPatch, always: Callable[..., None]) -> Iterator[type[Replayed]]:
    """Every step is captured, on the CPU."""
    always(cuda_graph=True)
    monkeypatch.setattr(capture, "CapturedFunction", Replayed)
    Replayed.made.clear()
    yield Replayed
    Replayed.made.clear()


@BOTH
def test_captured_steps_compute_what_eager_ones_do_and_batches_are_made_in_place(
    recipe: Recipe, data: Dataset, eager: dict[str, RunResult], replayed: type[Replayed]
) -> None:
    captured = run(recipe, data)
    # The learning rates are float32 in the device's memory, which is all the difference.
    assert_same_run(captured, eager[recipe.name], tolerance=1e-4)
    assert captured.environment["step_mode"] == "captured"
    assert 0 < captured.warm_up_seconds < captured.total_seconds
    # The making of a batch, and a step with the whitening bias learned and one with it frozen, where the recipe has it.
    make, *steps = replayed.made
    assert len(steps) == (2 if recipe is MUON else 1)
    assert make.copies == 10 * 8  # ten steps, eight choices for each image
    assert all(step.copies == 0 for step in steps)


def test_a_captured_run_has_a_step_for_each_size_of_the_images(data: Dataset, replayed: type[Replayed]) -> None:
    recipe = replace(MUON, resolutions=(16, 24), whitening_bias_epochs=0.4)
    captured = run(recipe, data)
    # Batches of either size, both states of the whitening bias with the first, and one with the second.
    assert captured.environment["step_mode"] == "captured" and len(replayed.made) == 2 + 3
    sizes = [made.outputs[0].shape[-1] for made in replayed.made[:2]]
    assert sizes == [24, 16] and all(made.copies for made in replayed.made[:2])
    assert [images.inputs[0].shape[-1] for images in replayed.made[2:]] == [24, 16, 16]


def test_a_step_that_cannot_be_captured_runs_eagerly(
    data: Dataset, eager: dict[str, RunResult], always: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: Callable[..., Any], *inputs: Tensor, **_: Any) -> None:
        function(*inputs)  # it fails after a step
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    always(cuda_graph=True)
    monkeypatch.setattr(capture, "CapturedFunction", refuse)
    with pytest.warns(
        UserWarning, match="cannot be captured .*: RuntimeError: operation not permitted when .* capturing$"
    ):
        result = run(MUON, data)
    assert result.environment["step_mode"] == "eager"
    assert result.environment["step_mode_reason"].endswith("not permitted when stream is capturing")
    assert_same_run(result, eager[MUON.name], tolerance=1e-4)


def test_among_several_ranks_one_that_cannot_capture_ends_all(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "CapturedFunction", refuse)
    setup = prepared(MUON, data, StepMode(cuda_graph=True), ranks=Alone(1, 2, "nccl"))
    with pytest.raises(TrainingError, match="rank 1 cannot capture its step: RuntimeError: no; .* cuda_graph=off"):
        prepare_step(setup)


@BOTH
def test_a_rolled_back_update_leaves_no_trace(recipe: Recipe, data: Dataset) -> None:
    ours, fresh = (prepared(recipe, data, graph.EAGER) for _ in range(2))
    update, other = ours.update(), fresh.update()
    first, second, *_ = ours.batches.epoch(0)
    addresses = [value.data_ptr() for value in ours.model.state_dict().values()]
    with rolled_back(ours.model, ours.optimizers):
        update(*second)
        update(*second)
        changed = ours.model.state_dict()["layers.linear.weight"].clone()
    assert not torch.equal(changed, fresh.model.state_dict()["layers.linear.weight"])
    assert [value.data_ptr() for value in ours.model.state_dict().values()] == addresses
    for batch in (first, second):
        assert torch.equal(update(*batch)[0], other(*batch)[0])
    for (name, value), expected in zip(ours.model.state_dict().items(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


# --- Compiling ---


@BOTH
def test_a_step_that_cannot_be_compiled_runs_eagerly(
    recipe: Recipe,
    data: Dataset,
    eager: dict[str, RunResult],
    always: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ZeroDivisionError("in the middle of it\nand more")

    always(compile=True)

    def broken(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        # Muon's update must not be compiled either, once the network has failed.
        return Broken() if isinstance(function, Network) or function is move_banks else function

    monkeypatch.setattr(capture, "compiled", broken)
    with pytest.warns(UserWarning, match="cannot be compiled .*: ZeroDivisionError: in the middle of it$"):
        result = run(recipe, data)
    assert result.environment["step_mode"] == "eager"
    assert result.environment["step_mode_reason"] == "no compile: ZeroDivisionError: in the middle of it"
    assert_same_run(result, eager[recipe.name], 1e-6 if recipe is MUON else 0)  # Muon's rate is now in float32


def test_a_step_that_another_rank_cannot_compile_runs_eagerly_here_too(
    data: Dataset, eager: dict[str, RunResult], always: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOfTwo(Alone):
        def all(self, condition: bool) -> bool:
            return False

    def counted(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        if isinstance(function, Network):
            return function
        calls[function] = 0

        def call(*arguments: Any) -> Any:
            calls[function] += 1
            return function(*arguments)

        return call

    always(compile=True)
    calls: dict[Any, int] = {}
    monkeypatch.setattr(capture, "compiled", counted)
    with pytest.warns(UserWarning, match="cannot be compiled .*: another rank failed to compile it"):
        result = run(MUON, data, ranks=OneOfTwo())
    assert_same_run(result, eager[MUON.name], 1e-6)
    assert calls[move_banks] == 1  # while it was tried out, and not in training


def test_a_reader_s_own_optimiser_takes_no_step_before_training(
    data: Dataset, always: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Muon):
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1
            super().step(closure)

    def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        sgd, muon = recipe_optimizers(model, recipe)
        made.append(Counting(muon.param_groups[0]["params"], recipe.muon_lr, recipe.muon_momentum))
        return [sgd, *made]

    made: list[Counting] = []
    monkeypatch.setattr(capture, "compiled", lambda function, **_: function)
    execution = replace(choose_execution(MUON, CPU), step_mode=StepMode(compile=True))
    ready = set_up(MUON, data, execution, device=CPU, tricks=Tricks(optimizers=optimizers))
    prepare_step(ready)
    assert ready.execution.step_mode.compile and made[0].steps == 0
    assert "update" not in vars(made[0]) and isinstance(made[0].param_groups[0]["lr"], float)


@pytest.mark.slow
@BOTH
def test_the_step_compiles_as_a_whole_and_once_for_all_runs(
    recipe: Recipe,
    data: Dataset,
    eager: dict[str, RunResult],
    always: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, other_seed = eager[recipe.name], run(recipe, data, seed=1)

    def as_on_a_gpu(norm: GhostBatchNorm, x: Tensor) -> Tensor:
        groups = norm.training and len(x) > norm.group_size
        return norm.all_groups_at_once(x) if groups else torch.nn.BatchNorm2d.forward(norm, x)

    monkeypatch.setattr(GhostBatchNorm, "forward", as_on_a_gpu)
    always(compile=True)
    # All of torch.compile but the code that it writes: graph breaks and guards are found without a GPU.
    monkeypatch.setattr(capture, "compiled", partial(compiled, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first = run(recipe, data)
    assert first.environment["step_mode"] == "compiled"
    # The making of a batch, the loss, and the network, once more where its first bias is frozen, and Muon's update.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 + (3 if recipe is MUON else 1)
    tolerance = 1e-6 if recipe is MUON else 1e-9  # Muon's learning rate is now in float32
    assert_same_run(first, plain, tolerance)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_run(run(recipe, data, seed=1), other_seed, tolerance)


# --- On a GPU ---


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("preload", [True, False])
def test_the_captured_step_gives_the_eager_steps_weights(recipe: Recipe, preload: bool, data: Dataset) -> None:
    recipe = replace(recipe, preload=preload, epochs=1.2, flat_epochs=0.0)
    eager, captured = (run(replace(recipe, cuda_graph=mode), data, "cuda") for mode in ("off", "on"))
    assert [result.environment["step_mode"] for result in (eager, captured)] == ["eager", "captured"]
    assert_same_run(captured, eager, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # compiling, with nothing on disk yet
@BOTH
@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_the_compiled_step_agrees_with_the_eager_one(
    recipe: Recipe, cuda_graph: str, data: Dataset, no_tf32: None
) -> None:
    # Not float64: it is slow to compile. One step: Muon brings even the faintest directions to length one.
    recipe = replace(recipe, precision="float32", epochs=0.2, flat_epochs=0.0)
    eager = run(replace(recipe, compile="off", cuda_graph="off"), data, "cuda")
    other = run(replace(recipe, compile="on", cuda_graph=cuda_graph), data, "cuda")
    assert other.environment["step_mode"] == {"off": "compiled", "on": "compiled and captured"}[cuda_graph]
    assert other.environment["step_mode_reason"] == ""
    assert other.epochs[0].train_loss == pytest.approx(eager.epochs[0].train_loss, rel=1e-4)
    assert other.epochs[0].test_loss == pytest.approx(eager.epochs[0].test_loss, rel=2e-2)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_captured_and_compiled_run_learns_in_half_precision(precision: str, tiny_data: Dataset) -> None:
    recipe = replace(
        recipes.speedrun(),
        widths=(16, 32, 32),
        n_shards=2,
        logit_scale=1 / 16,
        global_batch_size=32,
        peak_lr=recipes.speedrun().peak_lr * 32 / 1536,
        resolutions=(),  # five epochs would all have small images
        epochs=5.0,
        crop_padding=0,
        flip="none",
        color_jitter=0.0,
        precision=precision,
        cuda_graph="on",
        compile="on",
    )
    result = run(recipe, tiny_data, "cuda")
    assert result.environment["precision"] == precision
    assert result.environment["step_mode"] == "compiled and captured"
    assert result.accuracy > 0.3


@pytest.mark.gpu
def test_no_step_of_an_epoch_waits_for_the_gpu(data: Dataset) -> None:
    setup = prepared(replace(MUON, whitening_bias_epochs=0.4), data, StepMode(cuda_graph=True), GPU)
    step = prepare_step(setup)
    assert setup.execution.step_mode.cuda_graph
    stream = setup.batches.epoch(0)
    first = next(stream)  # what an epoch sends to the device has been sent
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*first)
        for images, labels in stream:
            step(images, labels)
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
@BOTH
def test_an_all_reduce_in_the_graph_changes_nothing_for_one_process(recipe: Recipe, data: Dataset, nccl: Ranks) -> None:
    alone = run(replace(recipe, cuda_graph="off"), data, "cuda")
    eager, captured = (run(replace(recipe, cuda_graph=mode), data, "cuda", ranks=nccl) for mode in ("off", "on"))
    assert captured.environment["step_mode"] == "captured" and captured.environment["backend"] == "nccl"
    assert_same_run(eager, alone, tolerance=1e-9)
    assert_same_run(captured, alone, tolerance=1e-4)
