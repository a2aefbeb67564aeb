"""Whatever measures or predicts a step takes the very step that training takes: same losses, weights and averages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cifar_fast import recipes
from cifar_fast.distributed.processes import loopback_interface
from cifar_fast.experiments import number_formats, step_costs
from cifar_fast.hardware.cuda_graph import EAGER, StepMode
from cifar_fast.recipe import Recipe
from cifar_fast.training import capture, setup
from cifar_fast.training.alone import Alone
from cifar_fast.training.loop import train
from cifar_fast.training.setup import Setup
from cifar_fast.training.step import TrainingStep, Update

STEPS = 1 + step_costs.REPEATS
"""Steps that each program takes: as many as `measure_step` takes at one batch size."""
SMALL = {"epochs": 2.0, "convolution": "direct"}
RECIPES = {
    # Muon under autocast, and a compiled step.
    "smoke": replace(
        recipes.smoke(),
        widths=(4, 4, 4),
        n_shards=4,
        global_batch_size=32,
        precision="bfloat16",
        compile="auto",
        **SMALL,
    ),
    # Fused norms, micro-batches, an average that moves every other step, a whitening bias that freezes on the way.
    "laptop": replace(
        recipes.shortened(recipes.laptop(), 2.0),
        widths=(4, 4, 4),
        global_batch_size=32,
        ghost_batch_size=8,
        micro_batch_size=16,
        ema_decay=0.9,
        precision="float32",
        convolution="direct",
    ),
    "apple_8gpu": replace(
        recipes.apple_8gpu(),
        widths=(4, 4, 8, 8),
        global_batch_size=32,
        ghost_batch_size=2,
        flat_epochs=0.0,
        precision="float64",
        **SMALL,
    ),
}


@dataclass
class Taken:
    """One step: what came of it, and how it was computed."""

    loss: float
    weights: list[Tensor]
    averages: list[Tensor]
    update: str
    network: str
    autocast: list[bool]
    """Whether autocast was on, at each optimiser's step."""


class Compiled(nn.Module):
    """Stands for a network that torch.compile has compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Taken]]:
    """Collects every step; a recipe that may be compiled is, as on a GPU."""
    steps: list[Taken] = []
    autocast: list[bool] = []

    def watched(self: TrainingStep, images: Tensor, labels: Tensor) -> Any:
        autocast.clear()
        loss, correct = take(self, images, labels)
        # The same kind of update, whether the whitening bias is learned or frozen.
        ((update, network),) = {
            (type(each).__name__, type(each.model).__name__ if isinstance(each, Update) else "")
            for each in self.updates.values()
        }
        averages = self.ema.model.state_dict().values() if self.ema else ()
        steps.append(
            Taken(
                loss.item(),
                [value.clone() for value in self.model.state_dict().values()],
                [value.clone() for value in averages],
                update,
                network,
                list(autocast),
            )
        )
        return loss, correct

    def choose_step_mode(recipe: Recipe, *_: object) -> StepMode:
        return StepMode(compile=True) if recipe.compile != "off" else EAGER

    def compiled(function: Any, *_: object, **__: object) -> Any:
        return Compiled(function) if isinstance(function, nn.Module) else function

    take = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", watched)
    monkeypatch.setattr(setup, "choose_step_mode", choose_step_mode)
    monkeypatch.setattr(capture, "compiled", compiled)
    handle = register_optimizer_step_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    yield steps
    handle.remove()


STEADY_STEP = step_costs.steady_step


def learning_step(own: Setup) -> TrainingStep:
    """What `steady_step` returns, but at the first step of the run and with the recipe's learning rates."""
    groups = [group for optimizer in own.optimizers for group in optimizer.param_groups]
    rates = [group["peak_lr"] for group in groups]
    step = STEADY_STEP(own)
    assert step.done > 0 and {group["peak_lr"] for group in groups} == {0.0}
    step.done = 0
    for group, rate in zip(groups, rates, strict=True):
        group["peak_lr"] = rate
    return step


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> dict[str, Callable[[], object]]:
    """All that takes steps, by name. They learn here, from the first step on, where they measure without learning."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    cpu_step, parallel_step = (importlib.import_module(name) for name in ("cpu_step", "parallel_step"))
    n = STEPS * recipe.global_batch_size
    for module in (step_costs, number_formats, cpu_step, parallel_step):
        monkeypatch.setattr(module, "steady_step", learning_step)
    monkeypatch.setattr(parallel_step, "N_IMAGES", n)
    monkeypatch.setattr(parallel_step, "PREPARED", {})
    cpu_step.prepare.cache_clear()

    def measured_by_cpu_step() -> None:
        threads = torch.get_num_threads()
        execution = cpu_step.choose(Alone(), recipe, threads)
        setting = cpu_step.Setting(recipe, cpu_step.RANDOM, n, threads, execution)
        cpu_step.take_turn(Alone(), setting, cpu_step.OURS, 2)
        cpu_step.split_turn(Alone(), setting, STEPS - 2)

    def measured_by_number_formats() -> None:
        numerics = setup.choose_execution(recipe, torch.device("cpu")).numerics
        number_formats.training_step(recipe, step_costs.random_dataset(n), numerics, device=torch.device("cpu"))()

    return {
        "train": lambda: train(recipe, step_costs.random_dataset(n), device="cpu", progress=False),
        "plan": lambda: step_costs.measure_step(recipe, device="cpu", n_train=n, n_test=1, world_sizes=[1]),
        "cpu_step": measured_by_cpu_step,
        "parallel_step": lambda: parallel_step.time_steps(Alone(), recipe, STEPS, "flat"),
        "number_formats": measured_by_number_formats,
        "parallel_step with DDP": lambda: parallel_step.time_steps(Alone(), recipe, STEPS, "ddp"),
    }


def steps_of(program: Callable[[], object], taken: list[Taken]) -> list[Taken]:
    taken.clear()
    program()
    return list(taken)


def assert_same(found: list[Taken], expected: list[Taken]) -> None:
    assert found, "no step was taken by TrainingStep"
    for ours, training in zip(found, expected, strict=False):
        assert ours.loss == training.loss
        assert (ours.update, ours.autocast) == (training.update, training.autocast)
        for a, b in zip(ours.weights + ours.averages, training.weights + training.averages, strict=True):
            assert torch.equal(a, b)


def test_all_programs_take_the_step_of_training(
    recipe: Recipe, programs: dict[str, Callable[[], object]], taken: list[Taken]
) -> None:
    training = steps_of(programs["train"], taken)
    assert not torch.equal(training[0].weights[-1], training[STEPS - 1].weights[-1])  # it does learn
    half_precision = recipe.precision == "bfloat16"
    assert training[0].autocast == [half_precision] * (2 if recipe.optimizer == "muon" else 1)
    for name in ("plan", "cpu_step", "parallel_step"):
        found = steps_of(programs[name], taken)
        assert len(found) == STEPS
        assert {step.network for step in found} == {"Network" if recipe.compile == "off" else "Compiled"}
        assert_same(found, training)
    # Eager, since it compares formats alone.
    (found,) = steps_of(programs["number_formats"], taken)
    assert found.network == "Network"
    assert_same([found], training)


@pytest.mark.parametrize("recipe", [RECIPES["apple_8gpu"]], ids=["apple_8gpu"])
def test_the_side_with_ddp_takes_the_same_step(
    recipe: Recipe,
    programs: dict[str, Callable[[], object]],
    taken: list[Taken],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback_interface())
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        found = steps_of(programs["parallel_step with DDP"], taken)
    finally:
        dist.destroy_process_group()
    assert {step.network for step in found} == {"DistributedDataParallel"}
    assert_same(found, steps_of(programs["train"], taken))


@pytest.mark.parametrize("recipe", [RECIPES["apple_8gpu"]], ids=["apple_8gpu"])
def test_a_plan_for_several_workers_takes_the_step_of_one_rank(
    recipe: Recipe, taken: list[Taken], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_costs, "steady_step", learning_step)
    n = STEPS * recipe.global_batch_size
    rank = Alone(world_size=4, backend="gloo")
    training = steps_of(
        lambda: train(recipe, step_costs.random_dataset(n, 4), device="cpu", progress=False, ranks=rank), taken
    )
    planned = steps_of(
        lambda: step_costs.measure_step(recipe, device="cpu", n_train=n, n_test=4, world_sizes=[4]), taken
    )
    assert len(planned) == STEPS
    assert_same(planned, training)
